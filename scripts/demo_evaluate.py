"""The closed-loop evaluation of `make demo`: every policy, the same seeds for all.

    python scripts/demo_evaluate.py --pretrain runs/demo/pretrain/export --out runs/demo/evaluation \\
        --adapted from_pretrained=... from_scratch_1x=... from_scratch_4x=...

Writes to --out: episodes.json (every episode of every evaluation), gifs/*.gif (rollouts), plots/*.png and plots.json
(predicted against true actions of the scripted expert). What the numbers mean:

    natural             scenes as they come
    wrong_nearest       a block that is not the target stands nearest to the effector: who ignores the words fails
    swapped             the scene stays, the instruction names another block of it
    vision_blind        images black and marked missing
    language_blind      no instruction
    unseen_phrasing     the scenes of `natural`, asked for in sentences that no demonstration says
    shuffled_words      the scenes of `natural`, the words of the instruction in random order
    absent_block        the instruction names a block that is not there: who reaches one has guessed
    held_out_pairs      a block goes to a plate of a colour that no demonstration asks for together with the block's
    seen_pairs          the same scenes in colours that demonstrations ask for
"""

import octo_like.common.interrupts  # noqa: F401  isort: skip
import argparse
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import numpy as np

from octo_like import Policy
from octo_like.common.files import write_whole
from octo_like.envs import EMBODIMENTS, EVALUATION_SEEDS, TabletopEnv
from octo_like.policy.pretrained import PretrainedError
from octo_like.robot import rollout
from octo_like.robot.prediction import Prediction, plot_prediction
from octo_like.robot.record import write_gif
from octo_like.robot.wrappers import HistoryWrapper
from octo_like.training.distributed import setup_compilation_cache

PRETRAINED_ON = ("pusher", "gripper", "arm")
HELD_OUT = "arm3"
EXEC_HORIZON = 2
BATCH_SIZE = 50
WATCHED = 12  # of each robot and task, the first so many episodes can become animations
PLOT_SAMPLES = 8
PLOT_ROWS = 48  # predictions of a plot are made in one batch of this size, whatever the length of the episode


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """One row of the plan: `per_task` episodes for each of the tasks of every embodiment.

    Attributes:
      name: "<policy>/<what>".
      options: reset options of the episodes.
      blind: see `octo_like.robot.rollout.evaluate`.
      record: failures per embodiment and task that are shown, and after them one success; 0: no animations.
      tasks: all that the embodiment has when None.
    """

    name: str
    policy: str
    embodiments: tuple[str, ...]
    per_task: int
    options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    blind: str | None = None
    record: int = 0
    tasks: tuple[str, ...] | None = None


def plan(adapted: Sequence[str], *, quick: bool = False) -> list[Evaluation]:
    """All evaluations of the demo; `quick` runs one episode of each kind, to see that everything works."""

    def pretrain(name: str, count: int, robots: Sequence[str] = PRETRAINED_ON, **arguments) -> Evaluation:
        return Evaluation(f"pretrain/{name}", "pretrain", tuple(robots), 1 if quick else count, **arguments)

    pick, grasping = "pick_and_place", [name for name in PRETRAINED_ON if "pick_and_place" in EMBODIMENTS[name].tasks]

    evaluations = [
        pretrain("natural", 50, record=2),
        pretrain("wrong_nearest", 50, options={"wrong_nearest": True}),
        pretrain("swapped", 50, options={"swap_instruction": True}, record=1),
        pretrain("vision_blind", 20, blind="vision"),
        pretrain("language_blind", 20, blind="language"),
        pretrain("unseen_phrasing", 20, options={"phrasing": "unseen"}),
        pretrain("shuffled_words", 20, options={"instruction": "shuffled"}),
        pretrain("absent_block", 20, options={"instruction": "absent"}),
        pretrain("held_out_pairs", 50, grasping, tasks=(pick,), options={"pair": "held_out"}, record=1),
        pretrain("seen_pairs", 50, grasping, tasks=(pick,), options={"pair": "seen"}),
    ]
    for name in adapted:
        count = 1 if quick else 100
        evaluations.append(Evaluation(f"adapt/{name}", f"adapt/{name}", (HELD_OUT,), count, record=2))
    return evaluations


def make_env(embodiment: str, policy: Policy) -> TabletopEnv:
    """The robot's world, with cameras of the sizes the policy reads."""
    sizes = policy.batch_spec.image_sizes
    return TabletopEnv(embodiment, image_size=sizes["primary"][0], wrist_size=sizes.get("wrist", (32, 32))[0])


def run(evaluation: Evaluation, policy: Policy, batch_size: int) -> list[dict[str, Any]]:
    """Episodes of one evaluation as dicts: `Episode.summary()` and "embodiment"; "frames" of those shown, else None."""
    records = []
    for embodiment in evaluation.embodiments:
        tasks = evaluation.tasks or EMBODIMENTS[embodiment].tasks
        # The first episodes of each task come first, so that some of each are recorded.
        cells = [(EVALUATION_SEEDS + i, task) for i in range(evaluation.per_task) for task in tasks]
        episodes = rollout.evaluate(
            policy,
            functools.partial(make_env, embodiment, policy),
            [seed for seed, _ in cells],
            options=[{**evaluation.options, "task": task} for _, task in cells],
            unnormalize=f"tabletop_{embodiment}",
            exec_horizon=min(EXEC_HORIZON, policy.batch_spec.action_horizon),
            batch_size=batch_size,
            blind=evaluation.blind,
            record=WATCHED * len(tasks) if evaluation.record else 0,
        )
        shown = {id(e) for task in tasks for e in choose([e for e in episodes if e.task == task], evaluation.record)}
        for e in episodes:
            frames = e.frames if id(e) in shown else None
            records.append({"embodiment": embodiment, **e.summary(), "frames": frames})
    return records


def choose(episodes: Sequence[rollout.Episode], failures: int) -> list[rollout.Episode]:
    """Of the recorded ones the first `failures` that failed, which teach most, and the first that succeeded."""
    recorded = [episode for episode in episodes if episode.frames is not None]
    failed = [episode for episode in recorded if not episode.success]
    return failed[:failures] + [episode for episode in recorded if episode.success][:1]


def expert_prediction(policy: Policy, embodiment: str, seed: int, task: str) -> tuple[Prediction, str]:
    """What the policy predicts at each step of an episode that the scripted expert plays, and the instruction."""
    env = make_env(embodiment, policy)
    wrapped = HistoryWrapper(env, policy.batch_spec.window_size)
    observation, info = wrapped.reset(seed=seed, options={"task": task})
    expert = env.expert(np.random.default_rng(seed))
    observations, actions, ended = [], [], False
    while not ended and len(actions) < PLOT_ROWS:
        observations.append(observation)
        actions.append(expert.act())
        observation, _, terminated, truncated, info = wrapped.step(actions[-1])
        ended = terminated or truncated
    rows = observations + observations[-1:] * (PLOT_ROWS - len(observations))
    known = policy.batch_spec.observation()
    batch = {key: np.stack([row[key] for row in rows]) for key in rows[0] if key in known}
    sampled = policy.sample_actions(
        batch,
        policy.create_tasks(texts=[info["instruction"]] * PLOT_ROWS),
        rng=jax.random.key(seed),
        unnormalize=f"tabletop_{embodiment}",
        sample_shape=(PLOT_SAMPLES,),
    )
    true = np.asarray(actions, np.float32)
    steps = np.arange(len(true))
    prediction = Prediction(np.asarray(sampled)[:, : len(true)], true, np.ones(true.shape, bool), steps)
    return prediction, info["instruction"]


def write_plots(policies: Mapping[str, Policy], out: Path) -> None:
    """plots/*.png and plots.json: file name to caption."""
    captions = {}
    wanted = [("pretrain", embodiment) for embodiment in PRETRAINED_ON]
    wanted += [(name, HELD_OUT) for name in policies if name == "adapt/from_pretrained"]
    for name, embodiment in wanted:
        robot = EMBODIMENTS[embodiment]
        prediction, instruction = expert_prediction(policies[name], embodiment, EVALUATION_SEEDS, robot.tasks[-1])
        file = f"{name.replace('/', '_')}_{embodiment}.png"
        title = f"{embodiment}: {instruction}"
        plot_prediction(
            prediction, robot.action_names, units=robot.action_units, title=title, path=out / "plots" / file
        )
        captions[file] = f"{name}, {embodiment}: “{instruction}”"
    (out / "plots.json").write_text(json.dumps(captions, indent=1))


def parse_named(text: str) -> tuple[str, Path]:
    name, equals, path = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r}: expected name=path")
    return name, Path(path)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pretrain", type=Path, required=True, help="exported pretrained policy")
    parser.add_argument("--adapted", nargs="*", type=parse_named, default=[], metavar="NAME=EXPORT")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="one episode of each kind")
    args = parser.parse_args()
    paths = {"pretrain": args.pretrain, **{f"adapt/{name}": path for name, path in args.adapted}}
    try:
        policies = {name: Policy.load_pretrained(path) for name, path in paths.items()}
    except PretrainedError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    setup_compilation_cache()  # the adapted policies are one program
    args.out.mkdir(parents=True, exist_ok=True)
    evaluations = plan([name for name, _ in args.adapted], quick=args.quick)
    begun = time.monotonic()
    results: dict[str, list[dict[str, Any]]] = {}

    def execute(evaluation: Evaluation) -> None:
        records = run(evaluation, policies[evaluation.policy], 8 if args.quick else BATCH_SIZE)
        results[evaluation.name] = records
        rate = np.mean([record["success"] for record in records])
        seconds = time.monotonic() - begun
        print(
            f"  {evaluation.name:<28}{len(records):>5} episodes   success {rate:>4.0%}   [{seconds:.0f} s]", flush=True
        )

    # Two at a time: while one steps its environments, the other computes. Results do not depend on it.
    with ThreadPoolExecutor(2) as pool:
        list(pool.map(execute, evaluations))
    (args.out / "gifs").mkdir(exist_ok=True)
    for evaluation in evaluations:
        for i, record in enumerate(results[evaluation.name]):
            frames = record.pop("frames")
            if frames is not None:
                file = f"{evaluation.name.replace('/', '_')}_{record['embodiment']}_{i}.gif"
                write_gif(args.out / "gifs" / file, frames, record["instruction"], record["success"])
                record["gif"] = file
    write_plots(policies, args.out)
    ordered = {evaluation.name: results[evaluation.name] for evaluation in evaluations}
    write_whole(args.out / "episodes.json", json.dumps(ordered, indent=1))
    print(f"  {sum(map(len, ordered.values()))} episodes in {time.monotonic() - begun:.0f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
