"""Closed loop with a policy that answers late: success and smoothness of every way to execute its chunks.

    python train.py --config configs/tabletop_delay.py --workdir runs/delay/plain
    python train.py --config configs/tabletop_delay.py:trained --workdir runs/delay/trained
    python scripts/bench_delay.py --policy runs/delay/plain/export --trained runs/delay/trained/export --out runs/delay
    python scripts/bench_delay.py --robot metaworld_pretrain --policy runs/sims/pretrain/export --out runs/delay_sims

The last is Meta-World: simulators of other makers (the extra `sim`), and the policy of configs/metaworld.py.

Every chunk of actions arrives a given number of control steps after its observation, in simulated time: nothing depends
on this machine's speed. The same scenes and noise for all modes and delays. Cells that are in OUT/delay.jsonl are not
repeated; OUT/delay.md is the table and OUT/delay.png the plot. `--quick` sees whether everything works.

The time limit of the tasks is `--time_factor` times the usual one: holding still costs time, not the episode.
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import dataclasses
import functools
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np

from octo_like import Policy
from octo_like.common.chunks import Continuation
from octo_like.envs import EMBODIMENTS, EVALUATION_SEEDS, TabletopEnv
from octo_like.envs.sims import ACTION_KINDS, GROUPS
from octo_like.envs.sims.remote import RemoteEnv
from octo_like.robot.chunking import MODES, Ask, Chunks, Plan
from octo_like.robot.history import History
from octo_like.robot.intervals import difference_interval, success_interval, success_rate
from octo_like.robot.rollout import sampling_keys
from octo_like.robot.safety import STANDS_STILL, check_kinds
from octo_like.training.distributed import setup_compilation_cache

SHOWN = ("steps", "seam_jump", "inside_jump", "held")


@dataclasses.dataclass(frozen=True)
class World:
    """Whom a policy moves.

    Attributes:
      name: a robot of the tabletop, or a group of simulated tasks.
    """

    name: str

    def __post_init__(self) -> None:
        if self.name not in (*EMBODIMENTS, *GROUPS):
            raise ValueError(f"unknown robot {self.name!r}; valid: {', '.join((*EMBODIMENTS, *GROUPS))}")

    @property
    def dataset(self) -> str:
        """Whose statistics a policy's actions have."""
        return self.name if self.name in GROUPS else f"tabletop_{self.name}"

    @property
    def kinds(self) -> tuple[str, ...]:
        """Of the action dimensions: what stands still where the robot holds."""
        return ACTION_KINDS if self.name in GROUPS else EMBODIMENTS[self.name].action_kinds

    def tasks(self, names: Sequence[str] | None) -> tuple[str, ...]:
        """Those of the names, all when None. Raises ValueError for one that does not exist."""
        known = tuple(GROUPS[self.name][1]) if self.name in GROUPS else EMBODIMENTS[self.name].tasks
        if unknown := sorted(set(names or ()) - set(known)):
            raise ValueError(f"{self.name} has no task {', '.join(unknown)}; valid: {', '.join(known)}")
        return known if names is None else tuple(names)

    def make(self, policy: Policy, time_factor: float) -> tuple[gymnasium.Env, Sequence[str], dict[str, Any]]:
        """An environment with the policy's pictures, names of its action dimensions, options of every reset."""
        sizes = {slot: size[0] for slot, size in policy.batch_spec.image_sizes.items()}
        if self.name in GROUPS:
            remote = RemoteEnv(self.name, sizes)
            return remote, remote.action_names, {"max_steps": round(time_factor * remote.max_steps)}
        env = TabletopEnv(self.name, image_size=sizes["primary"])
        limits = {task: round(time_factor * steps) for task, steps in env.embodiment.max_steps.items()}
        env.embodiment = dataclasses.replace(env.embodiment, max_steps=limits)
        return env, env.embodiment.action_names, {}


class Robot:
    """One simulated robot and its episode; commands are counted and compared."""

    def __init__(self, world: World, policy: Policy, time_factor: float):
        self.env, names, self.options = world.make(policy, time_factor)
        self.history = History(policy.batch_spec.window_size)
        check_kinds(world.kinds, names)
        self.moves = np.array([kind != "gripper" for kind in world.kinds])
        self.is_change = np.array([kind in STANDS_STILL for kind in world.kinds])
        std = np.asarray(policy.statistics[world.dataset]["action"]["std"])
        self.scale = np.where(self.moves, np.maximum(std, 1e-6), 1.0)
        self.used = std > 1e-3 * std.max()

    def start(self, seed: int, task: str, chunks: Chunks) -> None:
        self.seed, self.task, self.chunks = seed, task, chunks
        observation, self.info = self.env.reset(seed=seed, options={**self.options, "task": task})
        self.history.reset()
        self.window = self.history.append(observation)
        self.commands: list[np.ndarray] = []
        self.held: list[bool] = []
        self.over = False

    def step(self) -> None:
        action = self.chunks.action()
        self.held.append(action is None)
        if action is None:
            # There is a last command: the first chunk is there when the episode begins.
            action = np.where(self.is_change, 0.0, self.commands[-1]).astype(np.float32)
        action = np.clip(action, self.env.action_space.low, self.env.action_space.high)
        self.commands.append(np.asarray(action, np.float32))
        observation, _, terminated, truncated, self.info = self.env.step(action)
        self.window = self.history.append(observation)
        self.over = terminated or truncated

    def outcome(self) -> dict[str, Any]:
        """Success, steps, and the changes from one command to the next, in standard deviations of the actions."""
        commands = np.stack(self.commands) / self.scale
        jumps = np.linalg.norm(np.diff(commands[:, self.moves & self.used], axis=0), axis=1)
        held = np.array(self.held)
        seams = np.zeros(len(commands), bool)
        seams[[tick for tick in self.chunks.seams if tick < len(commands)]] = True
        seams[1:] |= held[1:] != held[:-1]
        at_seam = seams[1:]
        return {
            "seed": self.seed,
            "task": self.task,
            "success": bool(self.info["success"]),
            "steps": len(commands),
            "held": int(held.sum()),
            "seam": [float(jumps[at_seam].sum()), int(at_seam.sum())],
            "inside": [float(jumps[~at_seam].sum()), int((~at_seam).sum())],
        }


def predict(
    policy: Policy, dataset: str, robots: Sequence[Robot], asks: Sequence[Ask], method: str | None, rows: int
) -> np.ndarray:
    """Chunks (n, H, A) for n robots; the batch is filled up to `rows`."""
    filled = [*robots, *[robots[-1]] * (rows - len(robots))]
    padded = [*asks, *[asks[-1]] * (rows - len(asks))]
    observations = {key: np.stack([robot.window[key] for robot in filled]) for key in robots[0].window}
    tasks = policy.create_tasks(texts=[robot.info["instruction"] for robot in filled])
    rng = sampling_keys(0, [robot.seed for robot in filled], [ask.tick for ask in padded])
    options = {}
    if method is not None:
        horizon = policy.chunk_horizon(dataset)
        empty = np.zeros((horizon, len(robots[0].moves)), np.float32)
        previous = np.stack([empty if ask.previous is None else ask.previous for ask in padded])
        executed = np.array([horizon if ask.previous is None else ask.executed for ask in padded])
        delay = np.array([0 if ask.previous is None else ask.delay for ask in padded])
        options["continuing"] = Continuation(previous, executed, delay, method)
    actions = policy.sample_actions(observations, tasks, rng=rng, unnormalize=dataset, **options)
    return np.asarray(actions)[: len(robots)]


def run(policy: Policy, cells: Sequence[tuple[int, str]], plan: Plan, delay: int, args) -> list[dict[str, Any]]:
    """One episode for each (seed, task): chunks arrive `delay` steps after they were asked for."""
    world = World(args.robot)
    horizon = policy.chunk_horizon(world.dataset)
    waiting, outcomes = list(reversed(cells)), {}
    robots = [Robot(world, policy, args.time_factor) for _ in range(min(args.batch_size, len(cells)))]
    pending: dict[int, tuple[int, np.ndarray]] = {}  # robot: (tick at which its chunk arrives, the chunk)
    live: list[int] = []
    for i, robot in enumerate(robots):
        robot.start(*waiting.pop(), Chunks(plan, horizon))
        live.append(i)
    while live:
        asking, asks = [], []
        for i in live:
            chunks = robots[i].chunks
            chunks.tick()
            if i in pending and pending[i][0] <= chunks.now:
                chunks.accept(pending.pop(i)[1])
            if chunks.wants_chunk():
                # The first chunk is there when the episode begins.
                at = chunks.now + (0 if chunks.is_empty else delay)
                asking.append((i, at))
                asks.append(chunks.ask())
        if asking:
            moved = [robots[i] for i, _ in asking]
            found = predict(policy, world.dataset, moved, asks, plan.method, args.batch_size)
            pending |= {i: (at, chunk) for (i, at), chunk in zip(asking, found, strict=True)}
        for i in list(live):
            robot = robots[i]
            if i in pending and pending[i][0] <= robot.chunks.now:
                robot.chunks.accept(pending.pop(i)[1])
            robot.step()
            if robot.over:
                outcomes[robot.seed, robot.task] = robot.outcome()
                pending.pop(i, None)
                if waiting:
                    robot.start(*waiting.pop(), Chunks(plan, horizon))
                else:
                    live.remove(i)
    for robot in robots:
        robot.env.close()
    return [outcomes[cell] for cell in cells]


def mean_of(episodes: Sequence[dict[str, Any]], name: str) -> float:
    """Mean over steps of a jump; over episodes of anything else (steps: of those that succeeded)."""
    if name.endswith("_jump"):
        total, count = np.sum([episode[name.removesuffix("_jump")] for episode in episodes], axis=0)
        return float(total / max(count, 1))
    chosen = [episode[name] for episode in episodes if name != "steps" or episode["success"]]
    return float(np.mean(chosen)) if chosen else float("nan")


def ratio(episodes: Sequence[dict[str, Any]]) -> float:
    """How much larger the jump at a seam is than inside a chunk; NaN where nothing changes inside."""
    seam, inside = (mean_of(episodes, name) for name in ("seam_jump", "inside_jump"))
    return seam / inside if inside else float("nan")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Markdown; success with its 90% interval, and the difference to the same scenes without delay and guidance."""
    base = next((row for row in rows if row["mode"] == "wait" and row["delay"] == 0), None)
    lines = ["| mode | delay | success | against wait, 0 | steps | held | jump at the seam | inside | seam / inside |"]
    lines += ["|---" * 9 + "|"]
    for row in sorted(rows, key=lambda row: (list(MODES).index(row["mode"]), row["delay"])):
        won = [episode["success"] for episode in row["episodes"]]
        low, high = success_interval(won)
        against = ""
        if base is not None and len(base["episodes"]) == len(won):
            other = [episode["success"] for episode in base["episodes"]]
            a, b = difference_interval(won, other)
            against = f"{100 * (success_rate(won) - success_rate(other)):+.0f} ({100 * a:+.0f} to {100 * b:+.0f})"
        steps, seam, inside, held = (mean_of(row["episodes"], name) for name in SHOWN)
        lines.append(
            f"| {row['mode']} | {row['delay']} | {success_rate(won):.0%} ({low:.0%} to {high:.0%}) | {against} "
            f"| {steps:.1f} | {held:.1f} | {seam:.2f} | {inside:.2f} | {ratio(row['episodes']):.2f} |"
        )
    return "\n".join(lines) + "\n"


def plot(rows: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")  # a mode has one colour in both
    for index, mode in enumerate(MODES):
        mine = sorted((row for row in rows if row["mode"] == mode), key=lambda row: row["delay"])
        if not mine:
            continue
        delays = np.array([row["delay"] for row in mine]) + 0.06 * (index - 2.5)
        won = [[episode["success"] for episode in row["episodes"]] for row in mine]
        rates = np.array([success_rate(one) for one in won])
        bounds = np.array([success_interval(one) for one in won])
        error = np.abs(bounds.T - rates) * 100
        style: dict[str, Any] = dict(color=f"C{index}", marker="o", label=mode.replace("_", ", "))
        left.errorbar(delays, 100 * rates, error, capsize=2, **style)
        ratios = [ratio(row["episodes"]) for row in mine]
        if mode != "ensemble":  # there another chunk joins at almost every step
            right.plot(delays, ratios, **style)
    right.axhline(1, color="grey", linewidth=0.8)
    left.set(xlabel="delay, control steps", ylabel="success, % (90% interval)", ylim=(-3, 103))
    right.set(xlabel="delay, control steps", ylabel="jump at the seam / inside a chunk", ylim=(0, None))
    left.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def report(out: Path) -> None:
    rows = [json.loads(line) for line in (out / "delay.jsonl").read_text().splitlines()]
    text = table(rows)
    (out / "delay.md").write_text(text)
    plot(rows, out / "delay.png")
    print(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--policy", help="export of a policy whose head draws from noise")
    parser.add_argument("--trained", help="export of one trained with max_delay, for the mode 'trained'")
    parser.add_argument("--out", type=Path, default=Path("runs/delay"))
    parser.add_argument("--robot", default="gripper", help="of the tabletop, or a group as metaworld_pretrain")
    parser.add_argument("--tasks", nargs="+", help="of the robot; default: all")
    parser.add_argument("--modes", nargs="+", default=list(MODES), choices=list(MODES))
    parser.add_argument("--delays", type=int, nargs="+", default=[0, 1, 2, 3, 4, 6, 8], help="control steps")
    parser.add_argument("--per_task", type=int, default=100, help="episodes of each task")
    parser.add_argument("--exec_horizon", type=int, help="actions between two requests; default: half a chunk")
    parser.add_argument("--time_factor", type=float, default=2.0, help="times the tasks' usual limit of steps")
    parser.add_argument("--batch_size", type=int, default=50)
    parser.add_argument("--quick", action="store_true", help="2 episodes of each task, delays 0 and 2")
    parser.add_argument("--report", action="store_true", help="only make table and plot of what is there")
    args = parser.parse_args()
    if args.quick:
        args.per_task, args.delays, args.batch_size = 2, [0, 2], 4
    args.out.mkdir(parents=True, exist_ok=True)
    if not args.report:
        measure(args, parser)
    report(args.out)


def measure(args: argparse.Namespace, parser: argparse.ArgumentParser) -> None:
    """Runs the cells that are not there yet."""
    setup_compilation_cache()
    load = functools.cache(Policy.load_pretrained)
    file = args.out / "delay.jsonl"
    file.touch()
    settings = {key: getattr(args, key) for key in ("policy", "trained", "robot", "per_task", "time_factor")}
    settings |= {} if args.tasks is None else {"tasks": args.tasks}
    try:
        world = World(args.robot)
        tasks = world.tasks(args.tasks)
    except ValueError as error:
        parser.error(str(error))
    for delay in args.delays:
        for mode in args.modes:
            path = args.trained if mode == "trained" else args.policy
            if path is None:
                print(f"{mode}: no policy for it; skipped")
                continue
            policy = load(path)
            s = args.exec_horizon or max(1, policy.chunk_horizon(world.dataset) // 2)
            key = {**settings, "policy": path, "trained": None, "exec_horizon": s, "mode": mode, "delay": delay}
            done = [json.loads(line)["key"] for line in file.read_text().splitlines()]
            if key in done:
                continue
            methods = policy.continuation_methods(world.dataset)
            plan = Plan(mode, s, initial_delay=delay, max_delay=methods.get("trained"))
            if plan.method not in (None, *methods):
                parser.error(f"{path}: its head cannot continue chunks by {plan.method!r}; it can by {list(methods)}")
            cells = [(EVALUATION_SEEDS + i, task) for i in range(args.per_task) for task in tasks]
            begun = time.monotonic()
            episodes = run(policy, cells, plan, delay, args)
            line = {"key": key, "mode": mode, "delay": delay, "seconds": time.monotonic() - begun, "episodes": episodes}
            with open(file, "a") as out:
                out.write(json.dumps(line) + "\n")
            rate = success_rate([episode["success"] for episode in episodes])
            print(f"delay {delay} {mode}: {rate:.0%}, {line['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()
