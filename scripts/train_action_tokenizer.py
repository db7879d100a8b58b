"""Trains an action vocabulary (FAST) on the chunks that a config's runs train on.

    python scripts/train_action_tokenizer.py --config configs/tabletop.py --config.data.data_dir=runs/data \\
        --output runs/tabletop_actions.json
    python scripts/train_action_tokenizer.py --config configs/tabletop.py --config.data.kind=memory \\
        --config.data.episodes="tabletop_pusher=100 tabletop_gripper=100 tabletop_arm=100" --output actions.json

Samples come as in training, from the same mixture with the same normalisation; pictures are not read. Used are chunks
that lie within their episode to the last step; dimensions that a dataset does not have are 0. Prints how many tokens
chunks take, what is clipped and how far actions come back changed, for the training chunks and those of held-out
episodes. What the words mean and how to choose: docs/heads.md, "Action tokens: FAST".
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

# Samples that are looked at for each chunk that is wanted, before it is said that there are none.
PATIENCE = 20
FEW = 4  # different chunks for each token: fewer are learned by heart
HELD_OUT = (16, 256)  # samples of a batch, batches of a dataset


def main(argv=None) -> int:
    from octo_like.common.config import ConfigError, parse_command_line
    from octo_like.common.storage import StorageError

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--head", default="action", help="whose horizon, dimensions and datasets (default: %(default)s)"
    )
    parser.add_argument("--chunks", type=int, default=20_000, help="to train on (default: %(default)s)")
    parser.add_argument("--vocab_size", type=int, default=1024, help="tokens at most (default: %(default)s)")
    parser.add_argument(
        "--scale", type=float, default=10.0, help="larger: finer, and more tokens (default: %(default)s)"
    )
    parser.add_argument(
        "--max_tokens", type=int, help="of a chunk; default: horizon x dimensions, enough for any chunk"
    )
    parser.add_argument(
        "--clip_share",
        type=float,
        default=0.0,
        help="of the coefficients that may be clipped at each end (default: %(default)s)",
    )
    parser.add_argument("--output", required=True, help="the file that is written, e.g. my_actions.json")
    # The vocabulary that a head of the config names may be the one that is made here.
    flags, config = parse_command_line(parser, argv, read_vocabularies=False)

    from octo_like.common.fast import FastError
    from octo_like.data.errors import DataError

    try:
        print(trained(flags, config))
    except (ConfigError, DataError, FastError, StorageError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def trained(flags: argparse.Namespace, config: Any) -> str:
    """Trains and writes the vocabulary. What there is to say about it."""
    from octo_like.common import fast, fast_report
    from octo_like.data.inputs import inputs_from_config

    config, spec, size = without_pictures(config, flags.head)
    inputs = inputs_from_config(config, spec, None)
    with contextlib.closing(inputs.stream) as stream:
        chunks = some_chunks(stream, flags.chunks, flags.head, size)
        vocabulary = fast.train(
            chunks, flags.vocab_size, flags.scale, max_tokens=flags.max_tokens, clip_share=flags.clip_share
        )
        measured = {"training": fast_report.measure(vocabulary, chunks)}
        for name, batches in inputs.validation.items():
            found = [whole_chunks(batch, flags.head, size) for batch in batches]
            if len(held_out := np.concatenate(found)):
                measured[f"held out of {name}"] = fast_report.measure(vocabulary, held_out)
    vocabulary.save(flags.output)
    different = distinct(chunks)
    lines = [
        f"head {flags.head!r}: chunks of {size[0]} steps of {size[1]} dimensions, {different:,} different ones",
        fast_report.describe(vocabulary),
        fast_report.table(measured),
    ]
    if different < FEW * vocabulary.vocab_size:
        lines.append(
            f"warning: {different:,} different chunks are few for {vocabulary.vocab_size:,} tokens: many a token is a "
            "whole chunk, and chunks that have not been seen take more. Use more episodes or a smaller --vocab_size"
        )
    return "\n".join([*lines, f"written: {flags.output} ({vocabulary.fingerprint})"])


def without_pictures(config: Any, head: str) -> tuple[Any, Any, tuple[int, int]]:
    """(config, batch spec, (horizon, dim)) of a run that reads actions of the head's datasets and little else."""
    from ml_collections import ConfigDict

    from octo_like.common.config import ConfigError, to_dict
    from octo_like.common.defaults import batch_spec
    from octo_like.common.words import suggest
    from octo_like.data.oxe.mixes import datasets_from_config
    from octo_like.data.spec import DatasetSpec

    config = ConfigDict(to_dict(config))
    # A config of finetune.py has the heads that it adds or changes in `surgery`.
    model = config.model or config.get("surgery") or {}
    heads = dict(model.get("heads") or {})
    if head not in heads:
        adds = "" if config.model else " (of an adaptation: those in config.surgery.heads)"
        raise ConfigError(f"--head {head}: the config has no such head{adds}; {suggest(head, heads)}")
    fields = ("action_horizon", "action_dim")
    sizes = {
        name: {key: one[key] for key in fields} for name, one in heads.items() if all(key in one for key in fields)
    }
    if head not in sizes:
        raise ConfigError(f"--head {head}: the config does not give its action_horizon and action_dim")
    spec = batch_spec(config, {"heads": sizes})
    spec = dataclasses.replace(
        spec, window_size=1, image_sizes={}, depth_sizes={}, goal_images=(), proprio_dim=None, language_length=None
    )
    config.eval.update(batch_size=HELD_OUT[0], batches=HELD_OUT[1])
    config.data.update(image_dropout_prob=0.0, image_dropout_keep=None, paraphrases=None)
    if config.data.kind != "synthetic":
        datasets = datasets_from_config(config.data)
        specs = {name: DatasetSpec.from_dict(one, name) for name, one in datasets.items()}
        learning = {name for name, one in specs.items() if one.head == head and one.action_key is not None}
        if not learning:
            raise ConfigError(f"--head {head}: no dataset of the config trains it; their `head` names others")
        views = dict(image_keys={}, depth_keys={}, point_keys={}, text_keys={}, bgr_slots=())
        config.data.mix, config.data.mix_only = None, ()
        with config.data.ignore_type():
            config.data.datasets = {
                name: {**fields, **views, **({} if name in learning else {"weight": 0.0})}
                for name, fields in datasets.items()
                if specs[name].action_key is not None
            }
    return config, spec, (sizes[head]["action_horizon"], sizes[head]["action_dim"])


def whole_chunks(batch: Mapping[str, Any], head: str, size: tuple[int, int]) -> np.ndarray:
    """(n, H, A) chunks of a batch that the head learns from and that lie within their episodes, padding 0."""
    horizon, dim = size
    rows = batch["action_head_mask"][head]
    action = batch["action"][rows, -1, :horizon, :dim]
    mask = batch["action_pad_mask"][rows, -1, :horizon, :dim]
    return np.where(mask, action, 0)[mask.any(-1).all(-1)]


def some_chunks(stream: Iterator, count: int, head: str, size: tuple[int, int]) -> np.ndarray:
    """(count, H, A) chunks of the stream's first samples."""
    from tqdm import tqdm

    from octo_like.data.errors import DataError

    found, seen, have = [np.zeros((0, *size), np.float32)], 0, 0
    with tqdm(total=count, desc="chunks", unit="chunk", disable=None) as bar:
        while have < count:
            batch = next(stream)
            found.append(whole_chunks(batch, head, size)[: count - have])
            seen, have = seen + len(batch["sample_id"]), have + len(found[-1])
            bar.update(len(found[-1]))
            if have < count and seen > PATIENCE * count:
                raise DataError(
                    f"only {have:,} of {seen:,} samples have {size[0]} steps for head {head!r} within their episode; "
                    "give the head a shorter action_horizon, or ask for fewer --chunks"
                )
    return np.concatenate(found)


def distinct(chunks: np.ndarray) -> int:
    """How many different chunks there are: a small dataset gives the same ones again and again."""
    return len({chunk.tobytes() for chunk in chunks})


if __name__ == "__main__":
    sys.exit(main())
