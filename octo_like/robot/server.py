"""A policy behind a websocket, so that the robot's computer needs neither an accelerator nor JAX.

The server keeps nothing between requests: the client sends the whole window of observations, and the sampling noise is
a function of the client's (seed, step). Any number of clients may be connected; their requests are answered one by one.
"""

import contextlib
import functools
import importlib
import logging
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from octo_like.common.schema import BatchSpec, synthetic_batch
from octo_like.robot.messages import MAX_MESSAGE_BYTES, PROTOCOL, pack, unpack
from octo_like.robot.rollout import sampling_keys

log = logging.getLogger(__name__)


def import_websockets(side: str) -> ModuleType:
    """The module `websockets.sync.<side>`, or an ImportError that says how to get it."""
    try:
        return importlib.import_module(f"websockets.sync.{side}")
    except ImportError as error:
        raise ImportError("serving a policy needs the package websockets: pip install 'octo_like[serve]'") from error


class ServedPolicy(Protocol):
    """What the server needs of a policy; `octo_like.policy.policy.Policy` has it."""

    batch_spec: BatchSpec
    statistics: Mapping[str, Any]

    def create_tasks(
        self, texts: Sequence[str] | None = None, *, goals: Mapping[str, np.ndarray] | None = None
    ) -> Any: ...

    def sample_actions(self, observations: Mapping[str, Any], tasks: Any, *, rng: Any, unnormalize: str | None) -> Any:
        """Actions (B, H, A); rng is an array of B keys, one per row."""

    def get_pretty_spec(self) -> str: ...


class PolicyServer:
    """Serves one policy.

    Args:
      policy: see `ServedPolicy`.
      unnormalize: statistics used when a request names none; None sends normalised actions.
      action_names: of the action dimensions, told to clients.
      rng_seed: of the sampling noise.
      host, port: where to listen; port 0 takes a free one, see `port` after `start()`.

    Raises:
      ValueError: `unnormalize` names no statistics of the policy.
      ImportError: the package websockets is missing.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        *,
        unnormalize: str | None = None,
        action_names: Sequence[str] | None = None,
        rng_seed: int = 0,
        host: str = "127.0.0.1",
        port: int = 8000,
    ):
        if unnormalize is not None and unnormalize not in policy.statistics:
            raise ValueError(f"unknown statistics {unnormalize!r}; valid: {', '.join(sorted(policy.statistics))}")
        self._websockets = import_websockets("server")
        self.policy, self.unnormalize, self.rng_seed = policy, unnormalize, rng_seed
        self.host, self.port = host, port
        self._lock = threading.Lock()
        self._text_task = functools.lru_cache(maxsize=64)(lambda text: policy.create_tasks(texts=[text]))
        self.metadata: dict[str, Any] = {
            "type": "metadata",
            "protocol": PROTOCOL,
            "spec": policy.get_pretty_spec(),
            "batch_spec": policy.batch_spec.to_json(),
            "statistics": sorted(policy.statistics),
            "unnormalize": unnormalize,
            "action_names": None if action_names is None else list(action_names),
        }

    def warm_up(self) -> float:
        """Compiles the policy for single requests before any robot waits for it; returns the seconds it took."""
        start = time.monotonic()
        example = synthetic_batch(self.policy.batch_spec, 1)
        observation = {key: example["observation"][key] for key in example["observation"] if not key.endswith("_dict")}
        task = example["task"] if self.policy.batch_spec.language_length is None else self._text_task("")
        self._sample(observation, task, None, 0, 0)
        return time.monotonic() - start

    @contextlib.contextmanager
    def running(self) -> Iterator["PolicyServer"]:
        """Listens in a thread of its own for as long as the context lasts."""
        self._listen()
        self._thread = threading.Thread(target=self._server.serve_forever, name="policy-server", daemon=True)
        self._thread.start()
        try:
            yield self
        finally:
            self._server.shutdown()
            self._thread.join()

    def wait(self) -> None:
        """Blocks for as long as the server runs."""
        self._thread.join()

    def _listen(self) -> None:
        # Images compress badly and the robot is waiting: no compression.
        self._server = self._websockets.serve(
            self._converse, self.host, self.port, compression=None, max_size=MAX_MESSAGE_BYTES
        )
        self.port = self._server.socket.getsockname()[1]

    def _converse(self, connection) -> None:
        """One client from hello to goodbye; runs in a thread of its own."""
        connection.send(pack(self.metadata))
        for data in connection:
            try:
                reply = self._answer(unpack(data))
            except Exception as error:  # whatever a request does wrong must reach its sender and nobody else
                log.warning("request failed: %s: %s", type(error).__name__, error)
                reply = {"type": "error", "error": type(error).__name__, "message": str(error)}
            connection.send(pack(reply))

    def _answer(self, request: Any) -> dict[str, Any]:
        kind = request.get("type") if isinstance(request, dict) else None
        if kind != "act":
            raise ValueError(f"unknown request type {kind!r}; valid: act")
        if not isinstance(request.get("observation"), dict):
            raise ValueError("a request needs 'observation': a map from key to array")
        unnormalize = request.get("unnormalize") or self.unnormalize
        if unnormalize is not None and unnormalize not in self.policy.statistics:
            raise ValueError(f"unknown statistics {unnormalize!r}; valid: {', '.join(self.metadata['statistics'])}")
        start = time.monotonic()
        with self._lock:
            observation = {key: np.asarray(value)[None] for key, value in request["observation"].items()}
            task = self._task(request.get("instruction"), request.get("goal"))
            actions = self._sample(observation, task, unnormalize, request.get("seed", 0), request.get("step", 0))
        return {"type": "actions", "actions": actions, "seconds": time.monotonic() - start}

    def _task(self, instruction: str | None, goal: dict[str, np.ndarray] | None):
        if goal is None:
            return self._text_task(instruction or "")
        goals = {key: np.asarray(value)[None] for key, value in goal.items()}
        return self.policy.create_tasks(texts=None if instruction is None else [instruction], goals=goals)

    def _sample(self, observation, task, unnormalize: str | None, seed: int, step: int) -> np.ndarray:
        rng = sampling_keys(self.rng_seed, [seed], [step])
        return np.asarray(self.policy.sample_actions(observation, task, rng=rng, unnormalize=unnormalize))[0]
