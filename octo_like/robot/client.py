"""The robot's side of the policy server: NumPy, msgpack and websockets, no JAX.

with PolicyClient("gpu-box", 8000) as policy:
    policy.reset(seed=0)
    while running:
        actions = policy.act({"image_primary": frame, "proprio": joints}, "put the cup on the plate")   # (H, A)
        for action in actions[:4]:
            robot.execute(action)
            policy.observe({"image_primary": frame, "proprio": joints})   # all but the last: `act` brings that one

What is sent is complete, finite and spelled as the policy spells it; what comes back is finite and within limits
(`octo_like.robot.safety`). When `act` fails, `hold()` is the action that keeps the robot where it is.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.robot.history import History, LastWords
from octo_like.robot.images import resize_images
from octo_like.robot.messages import MAX_MESSAGE_BYTES, PROTOCOL, pack, unpack
from octo_like.robot.safety import ActionFilter, check_allowed, check_observation

log = logging.getLogger(__name__)


class PolicyServerError(RuntimeError):
    """The server could not answer a request; the message is the server's. The connection stays usable."""


class PolicyClient:
    """A connection to a `PolicyServer`; it keeps the window of observations, resizes images and filters actions.

    Attributes:
      metadata: what the server says of its policy: `spec` (text), `batch_spec`, `statistics` (names), `action_names`,
        `expects` (observation keys), `actions` (limits, names and units) and `dimensions` (names and units of actions
        and proprioception) of each dataset.
      filter: the `ActionFilter` of the dataset in use, with its `counts`; None before the first `act`, and with
        limits=False.
      window: the last W observations, as they are sent.
      subtask: what the policy was told to do next in its last actions, or said itself; None: nothing.
      late_replies: answers that came after their request had timed out, and were dropped.

    Args:
      host: of the server.
      port: of the server.
      timeout: seconds to wait for the connection and for each answer (TimeoutError after that).
      token: what the server was started with (PermissionError without it).
      allow_missing: observation keys that the policy reads and this robot does not have: the policy masks them. Any
        other key that is missing is an error.
      limits: whether actions are kept within the limits that the server tells; False: as the policy gives them.
      max_change: largest change from one action to the next, one number or one for each dimension (None: unlimited).
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 8000,
        timeout: float = 30.0,
        *,
        token: str | None = None,
        allow_missing: Sequence[str] = (),
        limits: bool = True,
        max_change: Sequence[float | None] | float | None = None,
    ):
        # Imported here and not at the top: only the two ends of the wire need the package.
        try:
            from websockets.exceptions import InvalidStatus
            from websockets.sync.client import connect
        except ImportError as error:
            raise ImportError("talking to a policy server needs websockets: pip install 'octo_like[serve]'") from error
        if isinstance(allow_missing, str):
            raise ValueError(f"allow_missing is a list of keys; for one: allow_missing=({allow_missing!r},)")
        self.timeout, self.allow_missing = timeout, tuple(allow_missing)
        self.filter: ActionFilter | None = None
        self.late_replies = 0
        self._chunk: np.ndarray | None = None
        self._limits, self._max_change = limits, max_change
        self._filters: dict[str | None, ActionFilter] = {}
        self._ids = itertools.count(1)
        self._warned: set[str] = set()
        self.subtask: str | None = None
        self._open = contextlib.ExitStack()
        headers = None if token is None else {"Authorization": f"Bearer {token}"}
        wire: dict[str, Any] = dict(compression=None, max_size=MAX_MESSAGE_BYTES, open_timeout=timeout, proxy=None)
        try:
            self._connection = self._open.enter_context(
                connect(f"ws://{host}:{port}", additional_headers=headers, **wire)
            )
        except InvalidStatus as error:
            answer = error.response.body.decode(errors="replace").strip()
            kind = PermissionError if error.response.status_code == 401 else ConnectionError
            raise kind(f"the server at {host}:{port} refused: {answer}") from error
        self.metadata: dict[str, Any] = unpack(self._connection.recv(timeout))
        if not isinstance(self.metadata, dict) or self.metadata.get("protocol") != PROTOCOL:
            self.close()
            raise PolicyServerError(f"the server at {host}:{port} does not speak protocol {PROTOCOL} of this client")
        check_allowed(self.allow_missing, self.metadata["expects"][""])
        spec = self.metadata["batch_spec"]
        self._sizes = {f"image_{slot}": tuple(size) for slot, size in spec["image_sizes"].items()}
        self._history, self._last = History(spec["window_size"]), LastWords()
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Starts an episode: forgets the observations; `seed` determines the policy's sampling noise."""
        self._history.reset()
        self._seed = seed
        self._chunk, self._executed, self.subtask = None, 0, None
        self._last.reset()
        for each in self._filters.values():
            each.reset()

    def observe(self, observation: Mapping[str, Any], *, unnormalize: str | None = None) -> None:
        """Adds an observation that no action is asked for, so that the policy's window has no gaps.

        Raises:
          ValueError: a key is missing or unknown, or a value is not finite; see `allow_missing`.
        """
        expected = self._of_dataset("expects", unnormalize)
        check_observation(observation, expected, self.allow_missing)
        self.window = self._history.append(self._prepare(observation))
        self._executed += 1

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
        """The next actions (H, A) float32.

        Args:
          observation: one moment: `image_{slot}` (h, w, 3) uint8 of any size, `proprio` (P,) and other sensors in
            physical units.
          instruction: what to do, in words.
          goal: what it should look like: `image_{slot}` (h, w, 3) uint8.
          unnormalize: name of the statistics of the actions' units; the server's default when None.
          subtask: what to do next, in words: a planner's, or a correction of what the policy wanted to do.
          plan: let the policy say that itself first; `self.subtask` then has it. One that remembers is asked with what
            it was told last, since `reset` and for this instruction.

        Raises:
          ValueError: see `observe`; nothing was sent.
          PolicyServerError: the server refused the request and says why.
          TimeoutError: no answer in time. The next call goes on; the late answer is dropped when it comes.
          UnsafeAction: the very first action is not finite.
        """
        self.observe(observation, unnormalize=unnormalize)
        said: dict[str, Any] = dict(subtask=subtask, plan=plan)
        actions = self.predict(self.window, instruction, goal=goal, unnormalize=unnormalize, **said)
        if self._limits:
            actions = self._filtered(actions, unnormalize)
        self._chunk, self._executed = actions, 0
        return actions

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
        """The actions (H, A) of a `window` that was kept, as the policy gives them: `act` without keeping count.

        May run in another thread than `observe`, but not twice at a time. See `octo_like.robot.executor`.

        Args:
          continuing: what `Continuation` takes, of one row: {"previous": (H, A), "executed", "delay", "method", ...}.

        Raises:
          As `act`; ValueError when the server cannot continue a chunk by that method.
        """
        if continuing is not None:
            able = self.chunks(unnormalize)["continues"]
            if continuing.get("method", "jacobian_free") not in able:
                raise ValueError(
                    f"the server cannot continue chunks by {continuing.get('method')!r}; valid: "
                    f"{', '.join(able) or 'none: its policy or its version cannot'}"
                )
        words: dict[str, Any] = {} if subtask is None else {"subtask": subtask}
        words |= {"plan": True} if plan else {}
        able = self.metadata.get("subtasks", {})
        if words and not able.get("says" if plan else "reads"):
            raise ValueError(f"the server's policy, or its version, cannot {'plan' if plan else 'be told a subtask'}")
        if plan and able.get("remembers"):
            words["last_subtask"] = self._last.of(instruction)
        reply = self._request(
            {
                "type": "act",
                "observation": window,
                "allow_missing": list(self.allow_missing),
                "instruction": instruction,
                "goal": None if goal is None else self._prepare(goal),
                "unnormalize": unnormalize,
                "seed": self._seed,
                "step": int(window["timestep"][-1]),
                **({} if continuing is None else {"continuing": dict(continuing)}),
                **words,
            }
        )
        self.subtask = reply.get("subtask")
        self._last.keep(instruction, self.subtask)
        for warning in set(reply.get("warnings", ())) - self._warned:
            log.warning("policy server: %s", warning)
            self._warned.add(warning)
        return np.asarray(reply["actions"], np.float32)

    def chunks(self, unnormalize: str | None = None) -> dict[str, Any]:
        """{"horizon": H, "continues": {method: largest delay}} of the policy's chunks."""
        horizon = self.metadata["batch_spec"]["action_horizon"]
        if "chunks" not in self.metadata:
            return {"horizon": horizon, "continues": {}}
        return self._of_dataset("chunks", unnormalize)

    def filter_of(self, unnormalize: str | None = None) -> ActionFilter | None:
        """The `ActionFilter` of a dataset's actions; None with limits=False."""
        if not self._limits:
            return None
        name = unnormalize or self.metadata["unnormalize"]
        if name not in self._filters:
            known = self.metadata["actions"].get(name)
            if known is None:
                raise ValueError(f"the limits of {name!r} are unknown; valid: {sorted(self.metadata['actions'])}")
            self._filters[name] = ActionFilter.of(known, max_change=self._max_change)
        return self._filters[name]

    def hold(self) -> np.ndarray:
        """The action (A,) that keeps the robot where it is, for when `act` fails. Raises UnsafeAction as the filter."""
        if self.filter is None:
            raise RuntimeError("there is nothing to hold: no action was received yet, or limits=False")
        self._tell_executed(self.filter)
        return self.filter.hold()

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request; what answers earlier ones, which were given up, is dropped."""
        number = next(self._ids)
        deadline = time.monotonic() + self.timeout
        self._connection.send(pack({**message, "id": number}))
        while True:
            reply = unpack(self._connection.recv(max(0.0, deadline - time.monotonic())))
            if reply.get("id") == number:
                break
            self.late_replies += 1
        if reply["type"] == "error":
            raise PolicyServerError(f"{reply['error']}: {reply['message']}")
        return reply

    def _filtered(self, actions: np.ndarray, unnormalize: str | None) -> np.ndarray:
        name = unnormalize or self.metadata["unnormalize"]
        if name not in self._filters:
            known = self.metadata["actions"].get(name) or {"low": [None] * actions.shape[-1]}
            known = {"high": known["low"], "kinds": None, "names": None, **known}
            self._filters[name] = ActionFilter.of(known, max_change=self._max_change)
        self.filter = self._filters[name]
        self._tell_executed(self.filter)
        return self.filter.chunk(actions)

    def _tell_executed(self, each: ActionFilter) -> None:
        # Every observation since the last chunk came after one of its actions.
        if self._chunk is not None and self._executed:
            each.executed(self._chunk[min(self._executed, len(self._chunk)) - 1])

    def _of_dataset(self, what: str, unnormalize: str | None) -> Any:
        found, name = self.metadata[what], unnormalize or self.metadata["unnormalize"]
        if name is not None and name not in found:
            raise ValueError(f"unknown statistics {name!r}; valid: {', '.join(self.metadata['statistics'])}")
        return found["" if name is None else name]

    def _prepare(self, observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return resize_images({key: np.asarray(value) for key, value in observation.items()}, self._sizes)

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_) -> None:
        self.close()
