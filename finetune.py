r"""Adaptation of a pretrained policy to another robot: load -> surgery -> what is trained -> the loop of pretraining.

    python finetune.py --config configs/finetune.py:lora,language --workdir runs/mine \
        --config.pretrained=runs/pretrain/export --config.data.data_dir=DIR \
        --config.data.datasets.target.name=my_robot --config.data.datasets.target.image_keys.primary=image

It prints which parameters were loaded, resized, new and frozen, and writes the same to WORKDIR/weights.txt and .json.
Running the same command again continues from the newest checkpoint. See docs/finetune.md.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import logging
from typing import Any

from octo_like.common.checks import check_run, check_workdir
from octo_like.common.config import ConfigError, parse_command_line, to_dict
from octo_like.training.arguments import add_arguments


def arguments(argv=None, **options: Any) -> tuple[argparse.Namespace, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics and the export go here; gs:// too")
    add_arguments(parser)
    return parse_command_line(parser, argv, default="configs/finetune.py", **options)


def check(flags: argparse.Namespace, config: Any) -> None:
    check_workdir(flags.workdir)
    check_run(config, adapts=True)


if __name__ == "__main__":
    arguments(check=check)  # --help and mistakes are answered before anything is imported that takes seconds

import jax

from octo_like import Policy
from octo_like.common.defaults import batch_spec
from octo_like.common.vocabularies import targets_of
from octo_like.data.inputs import inputs_from_config
from octo_like.model.octo import build_model, check_acting, explained
from octo_like.policy.surgery import check_inputs, condition, operate, replaced, untaught
from octo_like.training.adaptation import (
    check_actions,
    check_settings,
    check_weights,
    load_pretrained,
    make_weights,
    own_modules,
    text_tokenizer,
    with_inputs,
    with_schedule,
)
from octo_like.training.attempt import Attempt, command
from octo_like.training.loop import run_loop
from octo_like.training.own_words import check as check_own_subtasks
from octo_like.training.program import own_subtasks
from octo_like.training.resume import as_begun, kept_since_begun
from octo_like.training.run import Run, asked_words, check_taught, check_words, describe
from octo_like.training.sharding import check_batch_size, make_mesh


def main(argv=None) -> int:
    # --------------------------------------------------------------------------------------- command line, machine
    flags, config = arguments(argv)
    check(flags, config)
    check_settings(config)
    with Attempt(flags, config) as attempt:
        config = as_begun(config, flags.workdir) if attempt.resumes else config
        return adapt(flags, config, attempt)


def adapt(flags: argparse.Namespace, config: Any, attempt: Attempt) -> int:
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    check_batch_size(config.batch_size, mesh, config.accumulate)

    # ------------------------------------------------------------------------------------------ pretrained, surgery
    if config.init_from:
        raise ConfigError("init_from is for train.py; here the weights come from config.pretrained")
    modules = own_modules(config)
    with attempt.phase("restore"):
        pretrained = load_pretrained(config.pretrained, modules) if config.pretrained else None
    base = pretrained.model if pretrained else to_dict(config)["model"]
    if base is None:
        raise ConfigError("nothing to start from: set config.pretrained, or config.model to train from scratch")
    for message in replaced(base, to_dict(config)["surgery"]) if pretrained else ():
        logging.warning(message)
    model_config, goal_images = condition(
        operate(base, to_dict(config)["surgery"]), config.conditioning, tuple(config.goal_images)
    )
    config = with_inputs(config, model_config, goal_images, pretrained.batch_spec if pretrained else None)
    tokenizer = text_tokenizer(config, model_config, pretrained)
    spec = batch_spec(config, model_config, tokenizer)
    check_inputs(model_config, spec)
    vocab_size = tokenizer.vocab_size if tokenizer else 0
    with explained():
        model = build_model(model_config, vocab_size=vocab_size, modules=modules)
    check_acting(model, spec)
    check_own_subtasks(own_subtasks(config), model, tokenizer)
    check_weights(config, model, model_config, spec, pretrained, vocab_size=vocab_size)

    # --------------------------------------------------------------------------------------------------------- data
    with attempt.phase("data"):
        processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
        inputs = inputs_from_config(
            config, spec, tokenizer, targets=targets_of(model_config), workdir=flags.workdir, **processes
        )
    transitions = sum(entry["num_transitions"] for entry in inputs.statistics.values())
    config = with_schedule(config, transitions, validated=bool(inputs.validation))
    check_actions(model, inputs.statistics)
    known = base if pretrained else {}
    new = untaught(known, model_config)
    check_words(model, inputs.stream.order_spec, new=new, **asked_words(config))
    made = {f"auxiliaries_{name}" for name in new}
    made |= {f"heads_{name}" for name in model.heads if name not in known.get("heads", {})}
    words = spec.language_length is not None
    untrained = check_taught(model, inputs, new=made.__contains__, words=words, resumes=attempt.resumes)
    untrained = kept_since_begun(untrained, flags.workdir) if attempt.resumes else untrained

    # ------------------------------------------------------------------------------------------------------ weights
    weights = make_weights(config, model, model_config, spec, pretrained, vocab_size=vocab_size, untrained=untrained)
    if weights.report is not None:
        logging.info("weights of %s\n%s", config.pretrained, weights.report)

    # --------------------------------------------------------------------------------------------------------- loop
    policy_config = {"model": model_config, "batch_spec": spec.to_json(), "pretrained": config.pretrained}
    run = Run(
        config=config,
        workdir=flags.workdir,
        mesh=mesh,
        model=weights.model(model),
        init_params=lambda loaded: loaded,
        init_from=weights.params,
        inputs=inputs,
        make_policy=lambda params: Policy(policy_config, weights.merged(params), inputs.statistics, tokenizer),
        attempt=attempt,
        loaded_from=config.pretrained,
        frozen=weights.frozen,
        documents=weights.documents(),
    )
    logging.info(describe(run))
    return run_loop(run)


if __name__ == "__main__":
    command(main)
