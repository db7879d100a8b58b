"""Adaptation of a pretrained policy to another robot: load -> surgery -> freeze -> the same loop as pretraining.

    python finetune.py --config configs/finetune.py --workdir runs/mine --config.pretrained=runs/pretrain/export \
        --config.data.data_dir=DIR --config.data.datasets.target.name=my_robot \
        --config.data.datasets.target.image_keys.primary=image

It prints which parameters were loaded, resized, new and frozen, and writes the same to WORKDIR/weights.json.
Running the same command again continues from the newest checkpoint.
"""

import argparse
import json
import logging
import sys

import jax
import numpy as np

from octo_like.common.config import ConfigError, parse_command_line, to_dict
from octo_like.common.defaults import batch_spec
from octo_like.common.text import TextTokenizer
from octo_like.data.inputs import inputs_from_config
from octo_like.model.octo import build_model, init_params
from octo_like.model.policy import Policy, spec_to_json
from octo_like.model.pretrained import merge_params, replace_parts
from octo_like.training import distributed, exits
from octo_like.training.checkpoint import CheckpointError
from octo_like.training.loop import Run, describe, frozen_from_config, run_loop
from octo_like.training.sharding import make_mesh


def main(argv=None) -> int:
    # --------------------------------------------------------------------------------------- command line, machine
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics and the export go here; gs:// too")
    distributed.add_arguments(parser)
    flags, config = parse_command_line(parser, argv, default="configs/finetune.py")
    distributed.start(flags, config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)

    # ------------------------------------------------------------------------------------------ pretrained, surgery
    if config.init_from:
        raise ConfigError("init_from is for train.py; here the weights come from config.pretrained")
    pretrained = Policy.load_pretrained(config.pretrained) if config.pretrained else None
    base = pretrained.config["model"] if pretrained else to_dict(config)["model"]
    if base is None:
        raise ConfigError("nothing to start from: set config.pretrained, or config.model to train from scratch")
    model_config = replace_parts(base, to_dict(config)["surgery"])
    if pretrained is not None:
        tokenizer = pretrained.text_tokenizer
    else:
        tokenizer = TextTokenizer.load(config.text.model, config.text.max_length) if config.text.model else None
    spec = batch_spec(config, model_config, tokenizer)
    model = build_model(model_config, vocab_size=tokenizer.vocab_size if tokenizer else 0)

    # --------------------------------------------------------------------------------------------------------- data
    inputs = inputs_from_config(
        config, spec, tokenizer, process_index=jax.process_index(), process_count=jax.process_count()
    )

    # ------------------------------------------------------------------------------------------------------ weights
    params = init_params(model, spec, jax.random.key(config.seed))
    frozen = frozen_from_config(params, config)
    report = None
    if pretrained is not None:
        params, report = merge_params(
            jax.device_get(params), pretrained.params, reinitialize=tuple(config.reinitialize), frozen=frozen
        )
        logging.info("weights of %s\n%s", config.pretrained, report)
    params = jax.tree.map(np.asarray, params)
    documents = {}
    if report is not None:
        documents = {"weights.json": json.dumps(report.to_dict(), indent=1), "weights.txt": f"{report}\n"}

    # --------------------------------------------------------------------------------------------------------- loop
    policy_config = {"model": model_config, "batch_spec": spec_to_json(spec), "pretrained": config.pretrained}
    run = Run(
        config=config,
        workdir=flags.workdir,
        mesh=mesh,
        model=model,
        init_params=lambda loaded: loaded,
        init_from=params,
        inputs=inputs,
        make_policy=lambda params: Policy(policy_config, params, inputs.statistics, tokenizer),
        frozen=frozen,
        documents=documents,
    )
    logging.info(describe(run))
    return run_loop(run)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        # Mistakes in config or data say what is wrong; a traceback would hide it.
        print(f"finetune.py: error: {error}", file=sys.stderr)
        sys.exit(exits.ERROR if isinstance(error, CheckpointError) else exits.USAGE)
