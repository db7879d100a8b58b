"""Serves an exported policy to robots over a websocket:

    python scripts/serve.py --checkpoint runs/demo/pretrain/export --unnormalize tabletop_gripper --port 8000

On the robot: `octo_like.robot.client.PolicyClient(host, port).act(observation, instruction)`. The port also answers
/healthz, /metadata and /metrics (Prometheus) over HTTP. Listening where other machines reach it, it needs a token: in
the environment variable OCTO_LIKE_TOKEN, where no list of processes shows it. Needs the extra [serve].
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import logging
import os
import signal
import sys

import octo_like
from octo_like.policy.pretrained import PretrainedError


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="exported policy, as load_pretrained takes it")
    parser.add_argument("--modules", nargs="+", default=(), help="of the policy's own parts: they may be imported")
    parser.add_argument("--unnormalize", help="dataset whose units the actions have when a request names none")
    parser.add_argument(
        "--normalized", action="store_true", help="send normalised numbers to who names none: no units, no limits"
    )
    parser.add_argument(
        "--kinds",
        metavar="DATASET=KIND,...",
        nargs="+",
        default=(),
        help="absolute, delta, velocity or gripper for each action dimension of a dataset, in place of the export's",
    )
    parser.add_argument("--action_names", nargs="+", help="names of the action dimensions, told to clients")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (0.0.0.0: every interface)")
    parser.add_argument(
        "--without_token", action="store_true", help="let in whoever reaches the port, also from other machines"
    )
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument(
        "--openpi",
        metavar="KEYS",
        nargs="?",
        const="",
        help="speak openpi's protocol, for its clients; their keys are those of droid, libero, aloha, of a JSON file, "
        "or, without a value, of the robot's description",
    )
    parser.add_argument(
        "--episode_gap",
        type=float,
        metavar="SECONDS",
        help="with --openpi: a request after so long a silence begins an episode; default: twice the time of a chunk, "
        "at least 3; inf: never",
    )
    parser.add_argument(
        "--episode_jump",
        type=float,
        default=3.0,
        metavar="DEVIATIONS",
        help="with --openpi: a state that is so far from the last begins an episode (docs/deployment.md); inf: never",
    )
    parser.add_argument("--max_batch", type=int, default=8, help="robots whose requests are computed together")
    parser.add_argument("--max_connections", type=int, default=64)
    parser.add_argument(
        "--continue_by",
        nargs="+",
        default=(),
        help="compile for robots that continue chunks this way: jacobian_free, vjp, trained (docs/deployment.md)",
    )
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    args = parser.parse_args()

    from octo_like.common.dimensions import unknown_kinds
    from octo_like.common.normalization import choose_units
    from octo_like.robot.openpi import Keys, OpenpiServer, check_episodes
    from octo_like.robot.server import PolicyServer, check_numbers, with_kinds

    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        check_numbers(args.port, args.max_batch, args.max_connections, args.seed)
        check_episodes(args.episode_gap, args.episode_jump)
        policy = octo_like.Policy.load_pretrained(args.checkpoint, modules=args.modules)
        policy.statistics = with_kinds(policy.statistics, args.kinds)
        if unknown := unknown_kinds(policy.statistics):
            logging.warning("%s", unknown)
        kind, table = PolicyServer, {}
        if args.openpi is not None:
            kind, keys = OpenpiServer, Keys.load(args.openpi) if args.openpi else None
            dataset = choose_units(policy.statistics, args.unnormalize, args.normalized)
            table = {"keys": keys or Keys.of(policy.statistics, dataset)}
            table |= {"episode_gap": args.episode_gap, "episode_jump": args.episode_jump}
        server = kind(
            policy,
            **table,
            unnormalize=args.unnormalize,
            normalized=args.normalized,
            action_names=args.action_names,
            rng_seed=args.seed,
            host=args.host,
            port=args.port,
            token=os.environ.get("OCTO_LIKE_TOKEN") or None,
            without_token=args.without_token,
            max_batch=args.max_batch,
            max_connections=args.max_connections,
            continue_by=args.continue_by,
        )
    except (PretrainedError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        # A program that a shell starts in the background inherits SIGINT ignored; a server must end when told.
        signal.signal(number, signal.default_int_handler)
    try:
        with server.running(warm=True):
            units = "without units" if server.unnormalize is None else f"in the units of {server.unnormalize}"
            where = f"ws://{args.host}:{server.port}"
            print(f"serving {args.checkpoint} at {where}, actions {units} (Ctrl-C ends it)", flush=True)
            server.wait()
    except KeyboardInterrupt:
        print("\nclosed")
    except OSError as error:
        print(f"error: {args.host}:{args.port}: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
