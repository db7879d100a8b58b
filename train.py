"""Pretraining: config -> mesh -> model -> data -> loop.

    python train.py --config configs/tabletop.py --workdir runs/tabletop --config.data.data_dir=runs/data
    python train.py --config configs/octo_small.py --workdir runs/smoke --config.data.kind=synthetic

Running the same command again continues from the newest checkpoint. Exit status 75: stopped by SIGTERM, state saved.
"""

import argparse
import logging
import sys
from pathlib import Path

import jax

from octo_like.common.config import parse_command_line, save, to_dict
from octo_like.data.inputs import inputs_from_config
from octo_like.model.policy import Policy, spec_to_json
from octo_like.training import distributed
from octo_like.training.checkpoint import CheckpointError
from octo_like.training.loop import Run, describe, run_loop
from octo_like.training.program import network_from_config
from octo_like.training.sharding import make_mesh


def main(argv=None) -> int:
    # --------------------------------------------------------------------------------------- command line, machine
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=Path, required=True, help="checkpoints, metrics and the export go here")
    distributed.add_arguments(parser)
    flags, config = parse_command_line(parser, argv)
    distributed.start(flags, config)
    mesh = make_mesh(config.mesh.data, config.mesh.fsdp)

    # -------------------------------------------------------------------------------------------------------- model
    network = network_from_config(config)

    # --------------------------------------------------------------------------------------------------------- data
    inputs = inputs_from_config(
        config, network.spec, network.tokenizer, process_index=jax.process_index(), process_count=jax.process_count()
    )

    # --------------------------------------------------------------------------------------------------------- loop
    policy_config = {"model": to_dict(config)["model"], "batch_spec": spec_to_json(network.spec)}
    run = Run(
        config=config,
        workdir=flags.workdir,
        mesh=mesh,
        model=network.model,
        init_params=network.init_params,
        init_from=jax.random.key(config.seed),
        inputs=inputs,
        make_policy=lambda params: Policy(policy_config, params, inputs.statistics, network.tokenizer),
        frozen=network.frozen,
    )
    logging.info(describe(run))

    if distributed.is_main():
        flags.workdir.mkdir(parents=True, exist_ok=True)
        save(config, flags.workdir / "config.json")
    return run_loop(run)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, FileNotFoundError, CheckpointError) as error:
        # Mistakes in config or data say what is wrong; a traceback would hide it.
        sys.exit(f"train.py: error: {error}")
