"""What a robot keeps of its episode: the window of observations, what was executed last, and what it was told last.
NumPy only: a robot's own computer needs no more."""

from __future__ import annotations

import abc
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.common.geometry import check_resize
from octo_like.common.words import whole_number
from octo_like.robot.images import resize_images
from octo_like.robot.safety import ActionFilter, Shape, UnsafeAction, check_frame, check_observation, check_request

log = logging.getLogger(__name__)


class History:
    """The last W observations, stacked: W the window size.

    The first observation of an episode fills the window; the copies standing before it have timestep_pad_mask False and
    timestep 0, exactly as the first window of a training episode. What is kept is a copy: a camera may write its next
    picture into the same buffer.
    """

    def __init__(self, window_size: int):
        if window_size < 1:
            raise ValueError(f"window_size must be at least 1, got {window_size}")
        self.window_size = window_size
        self._frames: deque[dict[str, np.ndarray]] = deque(maxlen=window_size)
        self._count = 0

    def reset(self) -> None:
        self._frames.clear()
        self._count = 0

    def append(self, observation: Mapping[str, Any], *, replace: bool = False) -> dict[str, Any]:
        """Adds a frame; returns {key: (W, ...)} plus timestep (W,) int32 and timestep_pad_mask (W,) bool.

        Args:
          replace: the frame takes the place of the newest one, because it is of the same moment.

        Raises:
          ValueError: other keys or shapes than those of the episode's frames; nothing was added.
        """
        frame = {key: np.array(value) for key, value in observation.items()}
        only = self._count == 0 or (replace and self._count == 1)  # it is then the window's only frame
        kept = frame if only else self._frames[-1]
        if frame.keys() != kept.keys():
            raise ValueError(f"observation keys changed within an episode: had {sorted(kept)}, got {sorted(frame)}")
        for key, value in frame.items():
            if value.shape != kept[key].shape:
                raise ValueError(
                    f"observation/{key}: its shape changed within an episode: had {kept[key].shape}, got {value.shape}"
                )
        if only:
            self._frames.extend([frame] * self.window_size)
            self._count = 1
        elif replace:
            self._frames[-1] = frame
        else:
            self._frames.append(frame)
            self._count += 1
        stacked = {key: np.stack([f[key] for f in self._frames]) for key in frame}
        steps = np.arange(self._count - self.window_size, self._count, dtype=np.int32)
        stacked["timestep"] = np.maximum(steps, 0)
        stacked["timestep_pad_mask"] = steps >= 0
        return stacked


class RobotState(abc.ABC):
    """What is kept of one robot within an episode: `PolicyClient` and `LocalPolicy` are two of them.

    Its states and what leads from one to the other are the table in docs/act.md. A moment is what lies between two
    executed actions. The window has one frame of each: an observation of a moment that has one already takes its place.
    What was executed is one record (`ActionFilter.last`), which `executed` alone writes.

    Attributes:
      window: the last W observations, as the policy gets them; {} before the first.
      filter: the `ActionFilter` of the dataset in use, with its `counts` and `last`; None: with limits=False, and where
        no dataset is named.
      allow_missing: observation keys that the policy reads and this robot does not have.
    """

    allow_missing: tuple[str, ...] = ()

    def __init__(self, window_size: int, image_sizes: Mapping[str, Sequence[int]], resize: str):
        check_resize(resize)
        self._resize = resize
        self._history, self._last = History(window_size), LastWords()
        self._sizes = {f"image_{slot}": (size[0], size[1]) for slot, size in image_sizes.items()}
        self._filters: dict[str | None, ActionFilter] = {}
        self._warned: set[str] = set()
        self._begin(0)

    def _begin(self, seed: int, units: tuple[str | None] | None = None) -> None:
        self._history.reset()
        self._last.reset()
        for each in self._filters.values():
            each.reset()
        self._seed = seed
        self.window: dict[str, Any] = {}
        self.subtask: str | None = None
        self._units = units  # name of the dataset in use; None: of none yet
        self._open = False  # the newest frame is of the present moment, and no chunk was given for it
        self._unreported = False  # a chunk was given, and nothing was executed since

    def reset(self, seed: int = 0, *, unnormalize: str | None = None) -> None:
        """Starts an episode: forgets observations and what was executed, for the robot may have been moved meanwhile.

        Args:
          seed: determines the policy's sampling noise, a whole number from 0 to 2**63 - 1.
          unnormalize: dataset of the episode's units; None: that of the first call that names one, else the default.

        Raises:
          ValueError: no such seed or dataset; the episode goes on.
        """
        seed = whole_number(seed, "seed", 0, 2**63 - 1)
        self._begin(seed, None if unnormalize is None else (self._name(unnormalize),))

    def observe(self, observation: Mapping[str, Any], *, unnormalize: str | None = None) -> None:
        """Adds the observation of this moment, so that the policy's window has no gaps. Observing executes nothing: a
        second observation without an executed action between takes the place of the first.

        Args:
          observation: see `PolicyClient.act`.
          unnormalize: dataset of the units; None: that of the episode so far, else the default.

        Raises:
          ValueError: a key is missing or unknown, a value has another shape or is not finite; the window stays as it
            is. See `allow_missing`.
          RuntimeError: of the last chunk nothing was reported as executed, see `executed`.
        """
        if self._unreported:
            raise RuntimeError(
                "a chunk was given, and nothing of it was reported as executed before the next observation: call "
                "executed(action) after each action that the robot has executed"
            )
        self._observe(observation, unnormalize)

    def act(
        self,
        observation: Mapping[str, Any],
        instruction: str | None = None,
        *,
        goal: Mapping[str, np.ndarray] | None = None,
        unnormalize: str | None = None,
        subtask: str | None = None,
        plan: bool = False,
    ) -> np.ndarray:
        """The next actions (H, A) float32. Nothing of them is executed until `executed` says so.

        Args:
          observation: one moment: `image_{slot}` (h, w, 3) uint8 of any size, `proprio` (P,) and other sensors in
            physical units. That of a moment that was observed already takes the place of the first.
          instruction: what to do, in words.
          goal: what it should look like: `image_{slot}` (h, w, 3) uint8.
          unnormalize: name of the statistics of the actions' units; None: as `observe`.
          subtask: what to do next, in words: a planner's, or a correction of what the policy wanted to do.
          plan: let the policy say that itself first; `self.subtask` then has it. One that remembers is asked with what
            it was told last, since `reset` and for this instruction.

        Raises:
          ValueError: see `observe`; nothing was sent. Of a `LocalPolicy` also a chunk that is none.
          RuntimeError: `max_change` is to be kept, and of the last chunk nothing was reported as executed.
          PolicyServerError: the server refused the request and says why, or answered with what is no chunk.
          TimeoutError: no answer in time. The next call goes on; the late answer is dropped when it comes.
          ConnectionError, OSError: the server is away. The next call connects anew.
        """
        check_request(instruction, goal, subtask, plan)
        unnormalize = self._of_episode(unnormalize)
        limits = self._filter_of(unnormalize)
        if limits is not None and self._unreported:
            self._check_reported(limits)
        self._observe(observation, unnormalize)
        said: dict[str, Any] = dict(subtask=subtask, plan=plan)
        actions = self.predict(self.window, instruction, goal=goal, unnormalize=unnormalize, **said)
        if limits is not None:
            actions = limits.chunk(actions)
        self._answered()
        return actions

    def _check_reported(self, limits: ActionFilter) -> None:
        if np.isfinite(limits.max_change).any():
            raise RuntimeError(
                "max_change is measured from what was executed, and of the last chunk nothing was reported: call "
                "executed(action) after each action that the robot has executed"
            )
        if "executed" not in self._warned:
            self._warned.add("executed")
            log.warning(
                "of a chunk nothing was reported as executed before the next was asked for: hold() repeats only what "
                "executed(action) has recorded"
            )

    def _observe(self, observation: Mapping[str, Any], unnormalize: str | None) -> None:
        unnormalize = self._of_episode(unnormalize)
        expected, shapes = self._expected(unnormalize)
        check_observation(observation, expected, self.allow_missing)
        check_frame(observation, shapes)
        self._use(unnormalize)
        frame = self._resized(observation)
        self.window = self._history.append(frame, replace=self._open)
        self._open, self._unreported = True, False

    def _answered(self) -> None:
        """A chunk was given for the present moment."""
        self._open, self._unreported = False, True

    def _resized(self, pictures: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """Of an observation or a goal, with pictures as the policy was trained on."""
        arrays = {key: np.asarray(value) for key, value in pictures.items()}
        return resize_images(arrays, self._sizes, resize=self._resize)

    def executed(self, action: np.ndarray, *, unnormalize: str | None = None) -> None:
        """Records what the robot has executed, right after it did: an action of a chunk, a hold, one of its own.

        `hold` and `max_change` begin from it, and the next observation is one of the next moment.

        Args:
          action: (A,) in the robot's units.
          unnormalize: see `observe`.

        Raises:
          ValueError: another number of dimensions, or a value that is not finite; nothing was recorded.
        """
        self._use(unnormalize)
        if self.filter is not None:
            self.filter.executed(action)
        self._open = self._unreported = False

    def hold(self) -> np.ndarray | None:
        """The action (A,) that keeps the robot where it is: 0 for changes and velocities, else what was executed last.

        It executes nothing: report it with `executed` as any other. None: nothing was executed in this episode, and a
        dimension is neither a change nor a velocity. The robot then stands where it was found: command nothing.

        Raises:
          RuntimeError: limits=False, or no dataset has been named.
        """
        if self.filter is None:
            raise RuntimeError("what holds this robot is not known: limits=False, or no dataset was named yet")
        try:
            return self.filter.hold()
        except UnsafeAction:
            return None

    @property
    def keeps_moving(self) -> bool:
        """Whether what was executed last moves the robot until the next command: it was a speed, and not a hold."""
        done = None if self.filter is None else self.filter.last
        return done is not None and any(
            kind == "velocity" and done[d] != 0 for d, kind in enumerate(self.filter.kinds if self.filter else ())
        )

    @property
    def filter(self) -> ActionFilter | None:
        name = self._name(None if self._units is None else self._units[0])
        return None if name is None else self._filter_of(name)

    def filter_of(self, unnormalize: str | None = None) -> ActionFilter:
        """The `ActionFilter` of a dataset's actions. Raises ValueError with limits=False and where no dataset is
        named, UnknownKind as the constructor."""
        found = self._filter_of(unnormalize)
        if found is None:
            raise ValueError("limits=False: what holds this robot is not known; make the client with limits")
        return found

    def _use(self, unnormalize: str | None) -> None:
        """The units of this episode. Raises ValueError when they were others before."""
        name = self._name(self._of_episode(unnormalize))
        if self._units is not None and self._units != (name,):
            raise ValueError(f"this episode's units are those of {self._units[0]!r}; reset() before those of {name!r}")
        self._units = (name,)

    @abc.abstractmethod
    def predict(
        self,
        window: Mapping[str, Any],
        instruction: str | None = None,
        *,
        goal: Mapping[str, np.ndarray] | None = None,
        unnormalize: str | None = None,
        continuing: Mapping[str, Any] | None = None,
        subtask: str | None = None,
        plan: bool = False,
    ) -> np.ndarray:
        """See `PolicyClient.predict`."""

    @abc.abstractmethod
    def chunks(self, unnormalize: str | None = None) -> dict[str, Any]:
        """See `PolicyClient.chunks`."""

    def _of_episode(self, unnormalize: str | None) -> str | None:
        """What was given, else what the episode has."""
        return self._units[0] if unnormalize is None and self._units is not None else unnormalize

    @abc.abstractmethod
    def _name(self, unnormalize: str | None) -> str | None:
        """Name of the dataset of the units, for one that may be left out."""

    @abc.abstractmethod
    def _expected(self, unnormalize: str | None) -> tuple[Sequence[str], Mapping[str, Shape]]:
        """Keys that an observation has, and the shapes of those that have one."""

    @abc.abstractmethod
    def _filter_of(self, unnormalize: str | None) -> ActionFilter | None: ...


class LastWords:
    """What a robot was told last to do next, by itself or a person, since its episode began and of one instruction."""

    def __init__(self):
        self.reset()

    def reset(self) -> None:
        self._instruction: str | None = None
        self._subtask: str | None = None

    def of(self, instruction: str | None) -> str | None:
        """The words; None: nothing was said of this instruction."""
        return self._subtask if instruction == self._instruction else None

    def keep(self, instruction: str | None, subtask: str | None) -> None:
        """Of a chunk that was told `subtask`: None forgets nothing, another instruction everything."""
        self._subtask = self.of(instruction) if subtask is None else subtask
        self._instruction = instruction
