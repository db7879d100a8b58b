"""Serves an exported policy to robots over a websocket:

    python scripts/serve.py --checkpoint runs/demo/pretrain/export --unnormalize tabletop_gripper --port 8000

On the robot: `octo_like.robot.client.PolicyClient(host, port).act(observation, instruction)`. Whoever reaches the port
can use the policy: listen on 127.0.0.1 (the default) or inside a network you trust. Needs the extra [serve].
"""

import argparse
import logging
import signal
import sys

from octo_like import Policy
from octo_like.policy.pretrained import PretrainedError
from octo_like.robot.server import PolicyServer


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True, help="exported policy, as load_pretrained takes it")
    parser.add_argument("--modules", nargs="+", default=(), help="of the policy's own parts: they may be imported")
    parser.add_argument("--unnormalize", help="dataset whose units the actions have when a request names none")
    parser.add_argument("--action_names", nargs="+", help="names of the action dimensions, told to clients")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (0.0.0.0: every interface)")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    parser.add_argument("--seed", type=int, default=0, help="of the sampling noise")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    try:
        policy = Policy.load_pretrained(args.checkpoint, modules=args.modules)
        server = PolicyServer(
            policy,
            unnormalize=args.unnormalize,
            action_names=args.action_names,
            rng_seed=args.seed,
            host=args.host,
            port=args.port,
        )
    except (PretrainedError, ImportError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for number in (signal.SIGINT, signal.SIGTERM):
        # A program that a shell starts in the background inherits SIGINT ignored; a server must end when told.
        signal.signal(number, signal.default_int_handler)
    print(f"compiled in {server.warm_up():.1f} s", flush=True)
    with server.running():
        print(f"serving {args.checkpoint} at ws://{args.host}:{server.port} (Ctrl-C ends it)", flush=True)
        try:
            server.wait()
        except KeyboardInterrupt:
            print("\nclosed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
