"""Pretraining: config -> mesh -> model -> data -> loop.

    python train.py --config configs/tabletop.py --workdir runs/tabletop --config.data.data_dir=runs/data
    python train.py --config configs/octo_small.py --workdir runs/smoke --config.data.kind=synthetic

Running the same command again continues from the newest checkpoint. Exit statuses: 0 done, 1 a crash, 2 a mistake in
command line, config or data, found before the first step, 75 stopped by SIGTERM with the state saved, 76 stopped by the
NaN guard, 77 stalled, 130 ended by Ctrl-C (from the first step on with the state saved); docs/training.md.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import json
import logging
from typing import Any

from octo_like.common.checks import check_run, check_workdir
from octo_like.common.config import parse_command_line, to_dict
from octo_like.training.arguments import add_arguments


def arguments(argv=None, **options: Any) -> tuple[argparse.Namespace, Any]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", required=True, help="checkpoints, metrics and the export go here; gs:// too")
    add_arguments(parser)
    return parse_command_line(parser, argv, **options)


def check(flags: argparse.Namespace, config: Any) -> None:
    check_workdir(flags.workdir)
    check_run(config)


if __name__ == "__main__":
    arguments(check=check)  # --help and mistakes are answered before anything is imported that takes seconds

import jax

from octo_like import Policy
from octo_like.common.schema import flatten
from octo_like.common.vocabularies import targets_of
from octo_like.data.inputs import inputs_from_config
from octo_like.model.octo import check_acting, explained
from octo_like.training import sharding
from octo_like.training.attempt import Attempt, command
from octo_like.training.augment import augmentation_from_config
from octo_like.training.loop import run_loop
from octo_like.training.program import build_program, check_frozen, network_from_config, optimizer_from_config
from octo_like.training.resume import as_begun
from octo_like.training.run import Run, asked_words, check_taught, check_words, describe
from octo_like.training.sharding import make_mesh
from octo_like.training.warm_start import warm_start


def main(argv=None) -> int:
    # --------------------------------------------------------------------------------------- command line, machine
    flags, config = arguments(argv)
    check(flags, config)
    with Attempt(flags, config) as attempt:
        config = as_begun(config, flags.workdir) if attempt.resumes else config
        return pretrain(flags, config, attempt)


def pretrain(flags: argparse.Namespace, config: Any, attempt: Attempt) -> int:
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)
    optimizer_from_config(config)
    for slot, fields in config.augmentation.items():
        augmentation_from_config(slot, fields)

    # -------------------------------------------------------------------------------------------------------- model
    network = network_from_config(config)
    check_acting(network.model, network.spec)

    # ------------------------------------------------------------------------------------------------------ weights
    init, documents, loaded_from = network.init_params, {}, None
    source: Any = jax.random.key(config.seed)
    if config.init_from and not attempt.resumes:
        with attempt.phase("restore"):
            initial = sharding.to_host(jax.jit(init, out_shardings=sharding.replicated(mesh))(source), mesh)
            params, report = warm_start(initial, config.init_from, frozen=network.frozen)
        check_frozen(config, network, loaded=report.paths("loaded"))
        init, source, loaded_from = (lambda loaded: loaded), params, config.init_from
        documents = {"weights.json": json.dumps(report.to_dict(), indent=1), "weights.txt": f"{report}\n"}
    elif not config.init_from:
        check_frozen(config, network, resumes=attempt.resumes)

    with explained("config.optimizer or config.mesh do not fit the model"):
        build_program(config, network.model, mesh, init_params=init, init_from=source, frozen=network.frozen)

    # --------------------------------------------------------------------------------------------------------- data
    with attempt.phase("data"):
        processes = dict(process_index=jax.process_index(), process_count=jax.process_count())
        inputs = inputs_from_config(
            config,
            network.spec,
            network.tokenizer,
            targets=targets_of(config.model),
            workdir=flags.workdir,
            **processes,
        )
    new = () if config.init_from else tuple(network.model.auxiliaries)
    check_words(network.model, inputs.stream.order_spec, new=new, **asked_words(config))
    trained = {path.partition("/")[0] for path, _ in flatten(jax.eval_shape(network.init_params, jax.random.key(0)))
               if path not in network.frozen}  # fmt: skip
    words = network.spec.language_length is not None
    check_taught(network.model, inputs, new=trained.__contains__, words=words, resumes=attempt.resumes)

    # --------------------------------------------------------------------------------------------------------- loop
    policy_config = {"model": to_dict(config)["model"], "batch_spec": network.spec.to_json()}
    run = Run(
        config=config,
        workdir=flags.workdir,
        mesh=mesh,
        model=network.model,
        init_params=init,
        init_from=source,
        inputs=inputs,
        make_policy=lambda params: Policy(policy_config, params, inputs.statistics, network.tokenizer),
        attempt=attempt,
        loaded_from=loaded_from,
        frozen=network.frozen,
        documents=documents,
    )
    logging.info(describe(run))
    return run_loop(run)


if __name__ == "__main__":
    command(main)
