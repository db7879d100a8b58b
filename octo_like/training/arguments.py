"""The flags that train.py and finetune.py share. Imports no JAX, so that `--help` answers at once."""

import argparse
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Adds the flags that `distributed.initialize` takes. On TPU pods and under Slurm none of them is needed."""
    group = parser.add_argument_group("several processes")
    group.add_argument(
        "--distributed",
        choices=("auto", "on", "off"),
        default="auto",
        help="auto: when JAX recognises a cluster or an address is given; on: always, even for one process",
    )
    group.add_argument("--coordinator_address", metavar="HOST:PORT", help="address of process 0")
    group.add_argument("--num_processes", type=int)
    group.add_argument("--process_id", type=int)
    seconds: dict[str, Any] = dict(type=int, metavar="SECONDS")
    group.add_argument("--heartbeat_timeout", default=100, **seconds, help="silence that means death")
    group.add_argument("--init_timeout", default=300, **seconds, help="how long to wait for all processes to be there")
    group.add_argument("--shutdown_timeout", default=300, **seconds, help="how long to wait for all to be done")
