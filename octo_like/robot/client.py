"""The robot's side of the policy server: NumPy, msgpack and websockets, no JAX.

with PolicyClient("gpu-box", 8000) as policy:
    policy.reset(seed=0)
    while running:
        actions = policy.act({"image_primary": frame, "proprio": joints}, "put the cup on the plate")   # (H, A)
        for i, action in enumerate(actions[:4]):
            if i:
                policy.observe({"image_primary": frame, "proprio": joints})   # not the first: `act` brought it
            robot.execute(action)
            policy.executed(action)

What is sent is complete, finite and spelled as the policy spells it; what comes back is finite and within limits
(`octo_like.robot.safety`). When `act` fails, `hold()` is the action that keeps the robot where it is; the whole loop is
`octo_like.robot.loop.drive`. A connection that was lost is made anew by the next request.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import numbers
import os
import struct
import time
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from octo_like.robot.history import RobotState
from octo_like.robot.messages import MAX_MESSAGE_BYTES, PROTOCOL, pack, unpack
from octo_like.robot.safety import ActionFilter, Shape, check_allowed, check_chunk, check_request, frame_shapes

log = logging.getLogger(__name__)
LONGEST_TIMEOUT = 1e9  # seconds; sockets take no infinite one
RETRY_SECONDS = 0.1  # between two attempts to reach a server that is not ready yet
# What a server says that has to be the same after it was started again: else it has another policy.
SAME = ("batch_spec", "unnormalize", "expects", "actions", "chunks", "subtasks")


class PolicyServerError(RuntimeError):
    """The server could not answer a request, or not in the way that was agreed. The next request may succeed."""


class PolicyClient(RobotState):
    """A connection to a `PolicyServer`; it keeps the window of observations, resizes images and filters actions.

    Attributes:
      metadata: what the server says of its policy: `spec` (text), `batch_spec`, `statistics` (names), `action_names`,
        `expects` (observation keys), `actions` (limits, kinds, names and units) and `dimensions` (names and units of
        actions and proprioception) of each dataset.
      filter: the `ActionFilter` of the dataset in use, with its `counts` and what was executed `last`; None with
        limits=False, and on a server of normalised numbers that no dataset was named to.
      window: the last W observations, as they are sent; {} before the first.
      subtask: what the policy was told to do next in its last actions, or said itself; None: nothing.
      late_replies: answers that came after their request had timed out, and were dropped.
      connections: how often it has connected: more than once when the server was away meanwhile.

    Args:
      host: of the server.
      port: of the server.
      timeout: seconds to wait for the server to be started (the constructor tries a refused connection again), and for
        each answer with the connection that it may need first (TimeoutError after that).
      token: what the server was started with (PermissionError without it).
      allow_missing: observation keys that the policy reads and this robot does not have: the policy masks them. Any
        other key that is missing is an error.
      limits: whether actions are kept within the limits that the server tells; False: as the policy gives them, and
        nothing is known that holds the robot.
      max_change: largest change from one action to the next, one number or one for each dimension (None: unlimited).
      kinds: of the action dimensions, see `octo_like.robot.safety.check_kinds`; None: as the server says.
      unnormalize: dataset of the units of this robot, for every call that names no other; None: the server's default.

    Raises:
      ValueError: the server has no such dataset.
      UnknownKind: neither the server nor `kinds` says what holds each dimension of that dataset's actions.
      ConnectionRefusedError, ConnectionError, TimeoutError, PermissionError: there is no server within `timeout`, or it
        lets nobody in. The message has the address.
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
        kinds: Sequence[str] | None = None,
        unnormalize: str | None = None,
    ):
        # Imported here and not at the top: only the two ends of the wire need the package.
        try:
            import websockets.sync.client  # noqa: F401
        except ImportError as error:
            raise ImportError("talking to a policy server needs websockets: pip install 'octo_like[serve]'") from error
        seconds: Any = timeout
        if (
            isinstance(seconds, bool)
            or not isinstance(seconds, numbers.Real)
            or not 0 < float(seconds) <= LONGEST_TIMEOUT
        ):
            raise ValueError(f"timeout must be seconds, above 0 and at most {LONGEST_TIMEOUT:g}, got {timeout!r}")
        self.timeout = timeout
        self.late_replies = self.connections = 0
        self._address, self._headers = f"{host}:{port}", {} if token is None else {"Authorization": f"Bearer {token}"}
        self.unnormalize = unnormalize
        self._limits, self._max_change, self._kinds = limits, max_change, kinds
        self._ids = itertools.count(1)
        self._connection: Any = None
        self._wire = contextlib.ExitStack()
        self._closed = False
        self.metadata: dict[str, Any] = {}
        self._wait_for_server(time.monotonic() + timeout)
        try:
            check_allowed(allow_missing, self.metadata["expects"][""])
            self.allow_missing = tuple(allow_missing)
            spec = self.metadata["batch_spec"]
            super().__init__(spec["window_size"], spec["image_sizes"], spec.get("resize", "stretch"))
            if self._name(None) is not None:
                self._filter_of(None)
        except Exception:
            self.close()
            raise

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
        check_request(instruction, goal, subtask, plan)
        if continuing is not None:
            able = self.chunks(unnormalize)["continues"]
            if continuing.get("method", "jacobian_free") not in able:
                raise ValueError(
                    f"the server cannot continue chunks by {continuing.get('method')!r}; valid: "
                    f"{', '.join(able) or 'none: its policy or its version cannot'}"
                )
        self._name(unnormalize)
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
                "goal": None if goal is None else self._resized(goal),
                "unnormalize": self._name(unnormalize),
                "seed": self._seed,
                "step": int(window["timestep"][-1]),
                "resize": self._resize,
                **({} if continuing is None else {"continuing": dict(continuing)}),
                **words,
            }
        )
        name = self._name(unnormalize)
        width = None if name is None else len(self.metadata["actions"][name]["low"])
        try:
            actions = check_chunk(reply["actions"], self.chunks(unnormalize)["horizon"], width, "the server")
            said, warnings = reply.get("subtask"), set(map(str, reply.get("warnings") or ()))
            if not isinstance(said, (str, type(None))):
                raise ValueError(f"'subtask' is {said!r}")
        except (KeyError, TypeError, ValueError) as error:
            raise PolicyServerError(f"the server's answer is none: {error}") from error
        self.subtask = said
        self._last.keep(instruction, said)
        for warning in warnings - self._warned:
            log.warning("policy server: %s", warning)
            self._warned.add(warning)
        return actions

    def chunks(self, unnormalize: str | None = None) -> dict[str, Any]:
        """{"horizon": H, "continues": {method: largest delay}} of the policy's chunks."""
        horizon = self.metadata["batch_spec"]["action_horizon"]
        if "chunks" not in self.metadata:
            return {"horizon": horizon, "continues": {}}
        return self._of_dataset("chunks", unnormalize)

    def _filter_of(self, unnormalize: str | None) -> ActionFilter | None:
        if not self._limits:
            return None
        name = self._name(unnormalize)
        if name is None:
            raise ValueError(
                "the actions are normalised numbers, in which nothing is known that holds the robot: give unnormalize, "
                f"one of {', '.join(self.metadata['statistics']) or 'none'}, or limits=False"
            )
        if name not in self._filters:
            known = self.metadata["actions"][name]
            known = {"high": known["low"], "kinds": None, "names": None, **known}
            how: dict[str, Any] = dict(max_change=self._max_change, kinds=self._kinds, whose=f"{name}: ")
            self._filters[name] = ActionFilter.of(known, **how)
        return self._filters[name]

    def _name(self, unnormalize: str | None) -> str | None:
        name = unnormalize or self.unnormalize or self.metadata["unnormalize"]
        if name is not None and not (isinstance(name, str) and name in self.metadata["actions"]):
            raise ValueError(f"unknown statistics {name!r}; valid: {', '.join(self.metadata['statistics'])}")
        return name

    def _expected(self, unnormalize: str | None) -> tuple[Sequence[str], Mapping[str, Shape]]:
        name = self._name(unnormalize)
        proprio = (self.metadata.get("dimensions", {}).get(name) or {}).get("proprio")
        shapes = frame_shapes(self.metadata["batch_spec"], None if proprio is None else len(proprio["names"]))
        return self._of_dataset("expects", unnormalize), shapes

    def _of_dataset(self, what: str, unnormalize: str | None) -> Any:
        return self.metadata[what][self._name(unnormalize) or ""]

    # ---------------------------------------------------------------- the connection

    def _wait_for_server(self, deadline: float) -> None:
        """Connects, and tries again until then while the connection is refused: the server is not ready yet."""
        waiting = False
        while True:
            try:
                return self._connect(deadline)
            except ConnectionRefusedError as error:
                if time.monotonic() + RETRY_SECONDS >= deadline:
                    raise
                if not waiting:
                    log.info("waiting up to %g s: %s", self.timeout, error)
                waiting = True
                time.sleep(RETRY_SECONDS)

    def _connect(self, deadline: float) -> None:
        """Connects, and reads what the server says of its policy: the same as before, if there was a before."""
        from websockets.exceptions import InvalidHandshake, InvalidStatus, InvalidURI, WebSocketException
        from websockets.sync.client import connect

        where = f"the server at {self._address}"
        left = max(1e-3, deadline - time.monotonic())
        wire: dict[str, Any] = dict(compression=None, max_size=MAX_MESSAGE_BYTES, open_timeout=left, proxy=None)
        self._wire = contextlib.ExitStack()
        try:
            connecting = connect(f"ws://{self._address}", additional_headers=self._headers, close_timeout=1, **wire)
            connection = self._wire.enter_context(connecting)
        except InvalidStatus as error:
            answer = (error.response.body or b"").decode(errors="replace").strip()
            kind = PermissionError if error.response.status_code == 401 else ConnectionError
            raise kind(f"{where} refused: {answer}") from error
        except (InvalidHandshake, EOFError) as error:
            raise ConnectionError(f"{where} is no policy server, or ended while it was asked: {error}") from error
        except (InvalidURI, ValueError) as error:
            raise ValueError(f"{self._address} is no address of a server: {error}") from error
        except TimeoutError as error:
            raise TimeoutError(f"{where} did not answer within {self.timeout:g} s") from error
        except OSError as error:  # nobody listens, the name is not known, there is no way to it
            kind = ConnectionRefusedError if isinstance(error, ConnectionRefusedError) else ConnectionError
            raise kind(f"{where} cannot be reached: {error}") from error
        try:
            told = unpack(connection.recv(max(0.0, deadline - time.monotonic())))
            if not isinstance(told, dict) or told.get("protocol") != PROTOCOL:
                raise PolicyServerError(f"{where} does not speak protocol {PROTOCOL} of this client")
            changed = [key for key in SAME if self.metadata and told.get(key) != self.metadata.get(key)]
            if changed:
                raise PolicyServerError(
                    f"{where} came back with another policy ({', '.join(changed)} differ): make a new client for it"
                )
        except BaseException as error:
            self._disconnect()
            if isinstance(error, TimeoutError):
                raise TimeoutError(f"{where} did not answer within {self.timeout:g} s") from error
            if isinstance(error, (WebSocketException, OSError)):
                raise ConnectionError(f"{where} ended while it was asked: {error}") from error
            if isinstance(error, ValueError):
                raise PolicyServerError(f"{where} does not speak protocol {PROTOCOL} of this client") from error
            raise
        if os.name == "posix":  # a send to a server that no longer reads must end, too
            import socket

            after = struct.pack("ll", int(self.timeout), int(self.timeout % 1 * 1e6) or 1)
            connection.socket.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, after)
        self.metadata = self.metadata or told
        self._connection = connection
        self.connections += 1

    def _request(self, message: dict[str, Any]) -> dict[str, Any]:
        """The reply to a request; what answers earlier ones, which were given up, is dropped."""
        from websockets.exceptions import WebSocketException

        if self._closed:
            raise RuntimeError("this client was closed")
        number = next(self._ids)
        data = pack({**message, "id": number})
        deadline = time.monotonic() + self.timeout
        if self._connection is not None and self._connection.close_code is not None:
            self._disconnect()
        if self._connection is None:
            self._connect(deadline)
        try:
            self._connection.send(data)
            while True:
                reply = unpack(self._connection.recv(max(0.0, deadline - time.monotonic())))
                if not isinstance(reply, dict) or reply.get("type") not in ("actions", "error"):
                    raise ValueError(f"an answer is a map of type 'actions' or 'error', got {str(reply)[:80]!r}")
                if reply.get("id") == number:
                    break
                self.late_replies += 1
        except TimeoutError:
            raise TimeoutError(f"the server at {self._address} did not answer within {self.timeout:g} s") from None
        except (WebSocketException, OSError) as error:
            self._disconnect()
            raise ConnectionError(f"the connection to {self._address} was lost: {error}") from error
        except ValueError as error:  # what comes next on this connection would not be understood either
            self._disconnect()
            raise PolicyServerError(f"the server at {self._address} answered nonsense: {error}") from error
        if reply["type"] == "error":
            raise PolicyServerError(f"{reply.get('error')}: {reply.get('message')}")
        return reply

    def _disconnect(self) -> None:
        self._connection = None
        with contextlib.suppress(Exception):  # it is gone already, or will be
            self._wire.close()

    def close(self) -> None:
        """Ends the connection for good."""
        self._closed = True
        self._disconnect()

    def __enter__(self) -> PolicyClient:
        return self

    def __exit__(self, *_) -> None:
        self.close()
