"""Closed-loop evaluation: many environments in lock-step in one process, one batched policy call for all of them.

The batch has one fixed size, so the policy is compiled once: a finished episode's slot takes the next episode, and at
the very end idle slots repeat a live one. Every random number of an episode is keyed by (rng_seed, episode seed, step),
so an episode's result depends neither on its slot nor on its company (up to the rounding of the batched arithmetic).
"""

import contextlib
import dataclasses
import importlib
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import gymnasium as gym
import jax
import numpy as np

from octo_like.common import hand_paths
from octo_like.common.schema import BatchSpec
from octo_like.common.words import nearest, whole_number
from octo_like.robot.images import resize_images
from octo_like.robot.planning import Plan, Planner
from octo_like.robot.record import join_views
from octo_like.robot.wrappers import HistoryWrapper

BLIND = ("vision", "language")


class PolicyLike(Protocol):
    """What a rollout needs of a policy; `octo_like.policy.policy.Policy` has it."""

    batch_spec: BatchSpec

    def create_tasks(self, texts: Sequence[str], *, subtasks: Sequence[str] | None = None) -> Any:
        """`subtasks` is given only where there is a planner."""
        ...

    def sample_actions(
        self, observations: Mapping[str, Any], tasks: Any, *, rng: jax.Array, unnormalize: str | None
    ) -> Any:
        """Actions (B, H, A); rng is an array of B keys, one per row."""


@dataclasses.dataclass(frozen=True)
class Episode:
    """The outcome of one episode.

    Attributes:
      seed: of the environment's reset.
      task: the environment's name of the task ("" if it gives none).
      instruction: what the environment asked for (also when the policy was made deaf).
      success: the environment's last word.
      steps: actions executed.
      reward: their sum.
      flags: every boolean of the environment's last info.
      frames: (steps + 1) images (h, w, 3) uint8 when recorded, all cameras side by side; else None.
      first_width: pixels of a frame that belong to the leftmost camera, when recorded.
      actions: executed chunks, concatenated: (steps, A), physical units.
      plans: what a planner said, in order; empty without one.
      progress: share of the task that was done in the end (`info["progress"]`), None where the environment has none.
    """

    seed: int
    task: str
    instruction: str
    success: bool
    steps: int
    reward: float
    flags: dict[str, bool]
    actions: np.ndarray = dataclasses.field(repr=False)
    frames: list[np.ndarray] | None = dataclasses.field(default=None, repr=False)
    plans: tuple[Plan, ...] = dataclasses.field(default=(), repr=False)
    progress: float | None = None
    first_width: int | None = None

    @property
    def subtasks(self) -> list[str] | None:
        """What a planner had said last, for each of steps + 1 frames; None without a planner."""
        if not self.plans:
            return None
        said = np.searchsorted([plan.step for plan in self.plans], np.arange(self.steps + 1), side="right") - 1
        return [self.plans[i].text for i in said]

    def summary(self) -> dict[str, Any]:
        """All but the arrays, ready for JSON."""
        fields = ("seed", "task", "instruction", "success", "steps", "reward", "flags")
        done = {} if self.progress is None else {"progress": self.progress}
        return {field: getattr(self, field) for field in fields} | done


def _executed(policy: PolicyLike, unnormalize: str | None, exec_horizon: int | None) -> int:
    """Actions to execute of each chunk. With a head per embodiment a chunk may be shorter than the longest head's."""
    horizon = policy.batch_spec.action_horizon
    if hasattr(policy, "chunk_horizon"):
        horizon = policy.chunk_horizon(unnormalize)
    exec_horizon = horizon if exec_horizon is None else exec_horizon
    if (
        isinstance(exec_horizon, bool)
        or not isinstance(exec_horizon, int | np.integer)
        or not 1 <= exec_horizon <= horizon
    ):
        raise ValueError(f"exec_horizon must be in 1..{horizon} (the policy's chunk), got {exec_horizon!r}")
    return exec_horizon


def evaluate(
    policy: PolicyLike,
    make_env: Callable[[], gym.Env],
    seeds: Sequence[int],
    *,
    options: Mapping[str, Any] | Sequence[Mapping[str, Any] | None] | None = None,
    unnormalize: str | None = None,
    exec_horizon: int | None = None,
    batch_size: int = 32,
    rng_seed: int = 0,
    blind: str | None = None,
    record: int = 0,
    max_steps: int = 1000,
    threads: int = 0,
    planner: Planner | None = None,
    plan_every: int = 1,
    progress: Callable[[Episode], None] | None = None,
) -> list[Episode]:
    """Runs one episode per seed and returns the outcomes in the order of the seeds.

    Args:
      policy: see `PolicyLike`.
      make_env: makes an environment with Dict observations (`image_{slot}` uint8, `proprio` and other sensors in
        physical units) whose info holds `instruction` and, in the end, `success`. Images of another size than the
        policy's are resized. One with an attribute `looks` is told which nobody looks at (`envs.sims.remote`).
      seeds: of the episodes, each >= 0.
      options: reset options for all episodes, or one entry per episode.
      unnormalize: the statistics that turn the policy's numbers into physical units (and proprio into its).
      exec_horizon: actions executed per prediction; the whole chunk when None.
      batch_size: environments in lock-step = rows of every policy call.
      rng_seed: of the policy's sampling noise.
      blind: None, "vision" (every image is black and marked missing) or "language" (the instruction is empty).
        Baselines that show what the policy really uses.
      record: keep the frames of the first so many episodes.
      max_steps: an environment that does not end by itself is stopped after the chunk that gets here, as it stands.
      threads: that step the environments side by side, which pays when they run in other processes; 0: one by one.
      planner: says what to do next, see `octo_like.robot.planning`; None: only the instruction does.
      plan_every: chunks that are executed before it is asked again.
      progress: called with each finished episode, in order of finishing.

    Raises:
      ValueError: bad arguments, or an environment that does not speak as described.
    """
    if blind is not None and blind not in BLIND:
        raise ValueError(f"unknown blind baseline {blind!r}; valid: {', '.join(BLIND)} or None")
    if not len(seeds):
        raise ValueError("need at least one seed, got none")
    least = dict(batch_size=(batch_size, 1), plan_every=(plan_every, 1), max_steps=(max_steps, 1))
    least |= dict(record=(record, 0), threads=(threads, 0), rng_seed=(rng_seed, 0))
    for name, (value, at_least) in least.items():
        whole_number(value, name, at_least)
    for seed in seeds:
        whole_number(seed, "each seed", 0)
    exec_horizon = _executed(policy, unnormalize, exec_horizon)
    per_episode = _options_per_episode(options, len(seeds))
    waiting = deque((i, int(seed), per_episode[i]) for i, seed in enumerate(seeds))
    slots = [_Slot(make_env, policy.batch_spec, exec_horizon) for _ in range(min(batch_size, len(seeds)))]
    results: dict[int, Episode] = {}
    act = _Acting(policy, unnormalize, rng_seed, blind, planner, plan_every)
    with contextlib.ExitStack() as stack:
        for slot in slots:
            stack.callback(slot.env.close)
        each = stack.enter_context(ThreadPoolExecutor(threads)).map if threads else map
        while True:
            for slot in slots:
                if slot.index is None and waiting:
                    index, seed, reset_options = waiting.popleft()
                    slot.start(index, seed, reset_options, keep_frames=index < record)
                    act.tasks = None
            live = [slot for slot in slots if slot.index is not None]
            if not live:
                return [results[i] for i in range(len(seeds))]
            # Rows are slots; the rows of idle slots repeat a live one and are thrown away.
            rows = [slot if slot.index is not None else live[0] for slot in slots]
            rows += [live[0]] * (batch_size - len(rows))
            actions = act(rows)
            chunks = [(slot, chunk) for slot, chunk in zip(slots, actions, strict=False) if slot.index is not None]
            ended = list(each(lambda one: one[0].execute(one[1], max_steps), chunks))
            for (slot, _), over in zip(chunks, ended, strict=True):
                if over and slot.index is not None:
                    episode = results[slot.index] = slot.finish()
                    slot.index = None
                    if progress is not None:
                        progress(episode)


class _Acting:
    """What a policy does for the slots of a batch: plans where they are due, tasks where they changed, actions."""

    def __init__(
        self,
        policy: PolicyLike,
        unnormalize: str | None,
        rng_seed: int,
        blind: str | None,
        planner: Planner | None,
        plan_every: int,
    ):
        self.policy, self.units, self.rng_seed, self.blind = policy, unnormalize, rng_seed, blind
        self.planner, self.plan_every = planner, plan_every
        self.tasks: Any = None  # of the rows; None: to be made

    def __call__(self, rows: Sequence["_Slot"]) -> np.ndarray:
        """Chunks (B, H, A) for the present observations of B slots, of which some may be the same."""
        texts = ["" if self.blind == "language" else slot.instruction for slot in rows]
        observations = {key: np.stack([slot.observation[key] for slot in rows]) for key in rows[0].observation}
        observations = hide_images(observations) if self.blind == "vision" else observations
        rng = sampling_keys(self.rng_seed, [slot.seed for slot in rows], [slot.steps for slot in rows])
        due = {id(slot): i for i, slot in enumerate(rows) if slot.needs_plan(self.plan_every)}
        if self.planner is not None and due:
            infos, last = [slot.info for slot in rows], [slot.plans[-1].text if slot.plans else "" for slot in rows]
            said = self.planner(self.policy, observations, texts, infos, rng=rng, unnormalize=self.units, last=last)
            for i in due.values():
                rows[i].plan(said[i])
            self.tasks = None
        if self.tasks is None:
            plans = {} if self.planner is None else {"subtasks": [slot.plans[-1].text for slot in rows]}
            self.tasks = self.policy.create_tasks(texts=texts, **plans)
        return np.asarray(self.policy.sample_actions(observations, self.tasks, rng=rng, unnormalize=self.units))


def gym_env_maker(env_id: str, **arguments: Any) -> Callable[[], gym.Env]:
    """A function that makes a registered environment; "module:id" imports the module that registers it first.

    Raises:
      ValueError: no such environment, with the nearest ids; or its module cannot be imported.
    """
    if env_id.startswith("octo_like/"):
        env_id = f"octo_like.envs:{env_id}"
    module, _, name = env_id.rpartition(":")
    if module:
        try:
            importlib.import_module(module)
        except Exception as error:  # whatever the module does when it is imported
            raise ValueError(f"environment {env_id!r}: importing {module} fails: {error}") from error
    if name not in gym.registry:
        similar = nearest(name, gym.registry, 5, cutoff=0.4)
        raise ValueError(f"unknown environment {name!r}; similar ids: {', '.join(similar) or 'none'}")
    return lambda: gym.make(name, disable_env_checker=True, **arguments)


def hide_images(observations: Mapping[str, Any]) -> dict[str, Any]:
    """Black images that are also marked missing: two barriers, of which either alone carries no information."""
    images = [key for key in observations if key.startswith("image_")]
    if not images:
        raise ValueError(f"no images to hide among the observations {sorted(observations)}")
    hidden = dict(observations)
    pad = dict(observations.get("pad_mask_dict", {}))
    for key in images:
        hidden[key] = np.zeros_like(observations[key])
        pad[key] = np.zeros(observations[key].shape[:2], bool)
    return {**hidden, "pad_mask_dict": pad}


def sampling_keys(rng_seed: int, seeds: Sequence[int], steps: Sequence[int]) -> jax.Array:
    """An array of keys, one per row, each a function of (rng_seed, seed of the episode, step) alone."""
    parts = np.asarray(seeds, np.uint64)
    low, high = (parts & np.uint64(0xFFFFFFFF)).astype(np.uint32), (parts >> np.uint64(32)).astype(np.uint32)
    return _fold(jax.random.key(rng_seed), low, high, np.asarray(steps, np.uint32))


@jax.jit
def _fold(key, low, high, step):
    def one(low, high, step):
        return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, low), high), step)

    return jax.vmap(one)(low, high, step)


class _PolicyView(gym.ObservationWrapper):
    """Keeps what the policy reads (its cameras in its sizes, proprio, other sensors) and, for recording, the cameras as
    they were."""

    def __init__(self, env: gym.Env, spec: BatchSpec):
        super().__init__(env)
        if not isinstance(env.observation_space, gym.spaces.Dict):
            raise ValueError(f"the environment must have Dict observations, got {env.observation_space}")
        self.sizes, self.resize = {f"image_{slot}": size for slot, size in spec.image_sizes.items()}, spec.resize
        wanted = [*self.sizes, *([] if spec.proprio_dim is None else ["proprio"]), *spec.extra_observations]
        self.keys = [key for key in wanted if key in env.observation_space.spaces]
        if not self.keys:
            raise ValueError(
                f"the environment has none of the observations the policy reads: has {sorted(env.observation_space)}, "
                f"policy reads {sorted(wanted)}"
            )
        self.observation_space = gym.spaces.Dict(
            {
                key: gym.spaces.Box(0, 255, (*self.sizes[key], 3), np.uint8)
                if key in self.sizes
                else env.observation_space[key]
                for key in self.keys
            }
        )
        self.seen: list[np.ndarray] | None = None
        self.first_width: int | None = None

    def look(self, needed: bool) -> None:
        """Tells an environment that can leave out pictures (it has an attribute `looks`) whether the next is needed."""
        if hasattr(self.env, "looks"):
            self.env.looks = needed

    def observation(self, observation):
        if self.seen is not None:
            cameras = sorted(key for key in observation if key.startswith("image_"))
            self.seen.append(join_views([observation[key] for key in cameras]))
            height, width = observation[cameras[0]].shape[:2]
            self.first_width = round(width * len(self.seen[-1]) / height)
        return resize_images({key: observation[key] for key in self.keys}, self.sizes, resize=self.resize)


class _Slot:
    """One environment and the episode that runs in it."""

    def __init__(self, make_env: Callable[[], gym.Env], spec: BatchSpec, exec_horizon: int):
        self.view = _PolicyView(make_env(), spec)
        self.env = HistoryWrapper(self.view, spec.window_size)
        self.exec_horizon, self.window_size = exec_horizon, spec.window_size
        self.index: int | None = None

    def start(self, index: int, seed: int, options: Mapping[str, Any] | None, keep_frames: bool) -> None:
        self.index, self.seed, self.steps, self.reward = index, seed, 0, 0.0
        self.actions: list[np.ndarray] = []
        self.plans: list[Plan] = []
        self.chunks = self.planned = 0  # chunks executed, and when the present plan was made
        self.view.seen = [] if keep_frames else None
        self.view.look(True)
        self.observation, self.info = self.env.reset(seed=seed, options=None if options is None else dict(options))
        if "instruction" not in self.info:
            raise ValueError(f"the environment's info must hold 'instruction' at reset, got {sorted(self.info)}")
        self.instruction = str(self.info["instruction"])
        self.task = str(self.info.get("task", ""))

    def needs_plan(self, every: int) -> bool:
        return not self.plans or self.chunks - self.planned >= every

    def plan(self, text: str) -> None:
        # Two paths are never the same: nothing to compare, nor with half a path.
        wanted = None if hand_paths.looks_like_path(text) else self.info.get("subtask")
        self.plans.append(Plan(self.steps, text, None if wanted is None else str(wanted)))
        self.planned = self.chunks

    def execute(self, chunk: np.ndarray, max_steps: int) -> bool:
        """Executes the first actions of the chunk (H, A); True when the episode has ended."""
        self.chunks += 1
        for i, action in enumerate(chunk[: self.exec_horizon]):
            # Only the last `window_size` observations of a chunk reach the policy.
            self.view.look(self.view.seen is not None or i + self.window_size >= self.exec_horizon)
            self.observation, reward, terminated, truncated, self.info = self.env.step(action)
            self.steps += 1
            self.reward += float(reward)
            self.actions.append(action)
            if terminated or truncated:
                return True
        return self.steps >= max_steps

    def finish(self) -> Episode:
        if "success" not in self.info:
            raise ValueError(f"the environment's info must hold 'success' at the end, got {sorted(self.info)}")
        return Episode(
            seed=self.seed,
            task=self.task,
            instruction=self.instruction,
            success=bool(self.info["success"]),
            steps=self.steps,
            reward=self.reward,
            flags={key: bool(value) for key, value in self.info.items() if isinstance(value, bool | np.bool_)},
            actions=np.stack(self.actions),
            frames=self.view.seen,
            first_width=None if self.view.seen is None else self.view.first_width,
            plans=tuple(self.plans),
            progress=None if "progress" not in self.info else float(self.info["progress"]),
        )


def _options_per_episode(options, count: int) -> list[Mapping[str, Any] | None]:
    if options is None or isinstance(options, Mapping):
        return [options] * count
    if len(options) != count:
        raise ValueError(f"one entry of reset options per seed is needed: {count} seeds, {len(options)} options")
    return list(options)
