"""The settings of a stream of batches, under the names that they have in a config's `data`.

    settings = Settings.of(batch_size=256, seed=0, drop_task_prob=0.1, host_memory_gb=8)

A setting is added here, with its default in `octo_like/common/defaults.py` for configs: `octo_like.data.inputs` takes
every field from the config by its name, and what changes batches goes into the order spec by itself.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from octo_like.data.rlds.bad_records import MAX_BAD_FRACTION
from octo_like.data.spec import DataError, suggest

MODES = ("parity", "fast")  # of decoding, see `octo_like.data.batches.frames`
VALIDATION_MEMORY = 0.1  # of host_memory_gb: what validation keeps beside it


def _check_fraction(value: float) -> None:
    if not 0 <= value <= 1:
        raise DataError(f"max_bad_fraction must be in [0, 1], got {value}")


@dataclasses.dataclass(frozen=True)
class OrderOptions:
    """What the order of the samples follows from, besides the datasets; see `octo_like.data.order.order`.

    Attributes:
      batch_size: global, of all processes together.
      seed: any integer.
      num_lanes: None: `octo_like.common.lanes.default_lanes` of the batch size.
      episodes_mixed: episodes that are mixed at a time, by all lanes together; one number, or one for each dataset.
        None: as many as `host_memory_gb` of one process holds (`octo_like.data.batches.memory`); then that, too, is
        part of the order.
      max_visits: how often a pass may read an episode, to mix well in little memory (`memory.plan_visits`).
      balance_weights: multiply the weights by the datasets' usable frames.
    """

    batch_size: int
    seed: int = 0
    num_lanes: int | None = None
    episodes_mixed: int | Mapping[str, int] | None = None
    max_visits: int = 16
    balance_weights: bool = False


@dataclasses.dataclass(frozen=True)
class TaskOptions:
    """How the task of a sample is given to the model. All draws are keyed by the sample.

    Attributes:
      keep_goal_prob: of the samples with both an instruction and a goal image, the share whose task is the image; the
        others' task is the instruction. A sample that has only one keeps it.
      max_goal_distance: goals are drawn from fewer than this many steps ahead; None: up to the end of the episode.
      octo_compat: reproduce Octo's action mask (see `windows.task_completed`).
      drop_task_prob: share of the samples that have no task at all.
      paraphrase_prob: of the samples whose task is an instruction that has paraphrases, the share that gets one.
      drop_subtask_prob: share of the samples with a sub-task that are not told it.
      subtask_alone_prob: of those that are, the share that is told nothing else: no instruction.
      last_subtask_prob: of the samples that are not told their sub-task, the share that hears what was done a little
        before, and does not learn its actions: for parts that say what to do next, given what they said last
        (`TextHead.remembers`).
      last_subtask_steps: a little before is 1 to this many steps, each as often.
      image_dropout_prob: probability that a camera's observations (all of a window) are dropped.
      image_dropout_keep: the camera that is never dropped; None: of those that a sample has, one drawn by its key.
    """

    keep_goal_prob: float = 0.5
    max_goal_distance: int | None = None
    octo_compat: bool = False
    drop_task_prob: float = 0.0
    paraphrase_prob: float = 0.5
    drop_subtask_prob: float = 0.3
    subtask_alone_prob: float = 0.2
    last_subtask_prob: float = 0.0
    last_subtask_steps: int = 8
    image_dropout_prob: float = 0.0
    image_dropout_keep: str | None = None

    def __post_init__(self):
        for field in (name for name in vars(self) if name.endswith("_prob")):
            if not 0 <= getattr(self, field) <= 1:
                raise DataError(f"{field} must be in [0, 1], got {getattr(self, field)}")
        if self.max_goal_distance is not None and self.max_goal_distance < 1:
            raise DataError(f"max_goal_distance must be at least 1 or None, got {self.max_goal_distance}")
        if self.last_subtask_steps < 1:
            raise DataError(f"last_subtask_steps must be at least 1, got {self.last_subtask_steps}")
        if self.last_subtask_prob and not self.drop_subtask_prob:
            raise DataError(
                f"last_subtask_prob={self.last_subtask_prob} is a share of the samples that are not told their "
                "sub-task, and drop_subtask_prob=0 leaves none; 0.3 is a good share"
            )


@dataclasses.dataclass(frozen=True)
class HostOptions:
    """Knobs of this machine. None of them changes a batch by itself; see `OrderOptions.episodes_mixed`.

    Attributes:
      host_threads: threads that decode frames (and as many that read episodes; 16 of them from a bucket).
      prefetch: batches made ahead of the consumer.
      host_memory_gb: what encoded episodes and batches may take. Episodes that do not fit are read again when needed.
      max_bad_fraction: share of a dataset's records that may be damaged.
    """

    host_threads: int = 2
    prefetch: int = 2
    host_memory_gb: float = 4.0
    max_bad_fraction: float = MAX_BAD_FRACTION

    def __post_init__(self):
        if self.host_threads < 1 or self.prefetch < 1 or self.host_memory_gb <= 0:
            raise DataError(f"host_threads and prefetch must be at least 1, host_memory_gb positive; got {self}")
        _check_fraction(self.max_bad_fraction)


@dataclasses.dataclass(frozen=True)
class Settings:
    """All settings of a stream.

    Attributes:
      decode: "parity" or "fast"; see `octo_like.data.batches.frames`.
      paraphrases: a JSON file; see `octo_like.data.batches.texts`.
      exact: refuse functions with stateful randomness; False: name them in `order_spec["approximate"]` instead, beside
        the datasets that are a tf.data.Dataset (`octo_like.data.tf_source`).
    """

    order: OrderOptions
    task: TaskOptions = TaskOptions()
    host: HostOptions = HostOptions()
    decode: str = "parity"
    paraphrases: str | None = None
    exact: bool = True

    def __post_init__(self):
        if self.decode not in MODES:
            raise DataError(f"decode mode {self.decode!r}; {suggest(self.decode, MODES)}")

    @classmethod
    def of(cls, **knobs: Any) -> Settings:
        """Settings by the names of all fields, of the groups as well. `batch_size` has no default.

        Raises:
          DataError: an unknown name, with the valid ones, or a value that is not valid.
        """
        unknown = sorted(set(knobs) - set(KNOBS))
        if unknown:
            raise DataError(f"no setting {unknown[0]!r}; {suggest(unknown[0], KNOBS)}")
        parts: dict[str | None, dict[str, Any]] = {group: {} for group in (*_GROUPS, None)}
        for name, value in knobs.items():
            parts[KNOBS[name]][name] = value
        return cls(**{group: kind(**parts[group]) for group, kind in _GROUPS.items()}, **parts[None])

    def for_validation(self) -> Settings:
        """The same for validation: nothing is dropped or paraphrased, and it takes a share of the memory beside."""
        # Sub-tasks are not told: what the policy says they are would only be repeated.
        task = TaskOptions(
            self.task.keep_goal_prob, self.task.max_goal_distance, self.task.octo_compat, drop_subtask_prob=1.0
        )
        host = dataclasses.replace(self.host, host_memory_gb=self.host.host_memory_gb * VALIDATION_MEMORY)
        return dataclasses.replace(self, task=task, host=host, paraphrases=None)

    def spec(self, *, subtasks: bool = False) -> dict[str, Any]:
        """What of these settings an order spec holds, beside the order; JSON-able. `subtasks`: tasks say them."""
        task = dataclasses.asdict(self.task)
        if not subtasks:  # runs without them are what they were before there were any
            del task["drop_subtask_prob"], task["subtask_alone_prob"]
        if not subtasks or not self.task.last_subtask_prob:
            del task["last_subtask_prob"], task["last_subtask_steps"]
        if self.paraphrases is None:
            task["paraphrase_prob"] = 0.0
        derived = self.order.episodes_mixed is None
        return {
            "memory": {"host_memory_gb": float(self.host.host_memory_gb)} if derived else None,
            "decode": self.decode,
            "task": task,
        }


_GROUPS = {"order": OrderOptions, "task": TaskOptions, "host": HostOptions}
# Name of a setting -> the group that it is in; None: of `Settings` itself.
KNOBS: dict[str, str | None] = {
    **{field.name: group for group, kind in _GROUPS.items() for field in dataclasses.fields(kind)},
    **{field.name: None for field in dataclasses.fields(Settings) if field.name not in _GROUPS},
}


@dataclasses.dataclass(frozen=True)
class IndexOptions:
    """How files that have no index yet are read. Nothing of it changes what an index holds.

    Attributes:
      workers: files that a process reads at the same time; None: up to 8, by the number of cores.
      processes: processes of this machine that read; None: by bytes and cores, one below 8 GB.
      beam: options of an Apache Beam pipeline that reads in their place (the extra `beam`); None: no Beam.
      max_bad_fraction: see `index.load_index`.
      pod_dir: in place of ~/.cache, a folder that all hosts of a run see; used by several hosts only.
    """

    workers: int | None = None
    processes: int | None = None
    beam: Sequence[str] | None = None
    max_bad_fraction: float = MAX_BAD_FRACTION
    pod_dir: str | None = None

    def __post_init__(self):
        _check_fraction(self.max_bad_fraction)
        for name, default in (("workers", "up to 8"), ("processes", "as many as there is work for")):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise DataError(f"{name} must be at least 1, or None for {default}, got {value}")


INDEX_DEFAULTS = IndexOptions()
