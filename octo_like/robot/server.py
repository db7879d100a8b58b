"""A policy behind a websocket, so that the robot's computer needs neither an accelerator nor JAX.

The server keeps nothing between requests: the client sends the whole window of observations, and the sampling noise is
a function of the client's (seed, step). Any number of clients may be connected; their requests are answered one by one.
"""

import contextlib
import functools
import logging
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from octo_like.common.schema import synthetic_batch
from octo_like.robot.messages import MAX_MESSAGE_BYTES, PROTOCOL, pack, unpack
from octo_like.robot.rollout import PolicyLike, sampling_keys
from octo_like.robot.safety import action_limits, check_allowed, check_observation, expected_keys

# Of an observation, what says which of its frames are there.
WINDOW_KEYS = ("timestep", "timestep_pad_mask", "pad_mask_dict", "proprio_pad_mask")

log = logging.getLogger(__name__)


def import_websockets(side: str):
    """The module `websockets.sync.<side>`, or an ImportError that says how to get it."""
    try:
        if side == "server":
            import websockets.sync.server as module
        else:
            import websockets.sync.client as module
    except ImportError as error:
        raise ImportError("serving a policy needs the package websockets: pip install 'octo_like[serve]'") from error
    return module


class PolicyServer:
    """Serves one policy.

    Args:
      policy: see `octo_like.robot.rollout.PolicyLike`; also `statistics` and `get_pretty_spec()`.
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
        policy: PolicyLike,
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
        self.metadata = {
            "type": "metadata",
            "protocol": PROTOCOL,
            "spec": policy.get_pretty_spec(),
            "batch_spec": policy.batch_spec.to_json(),
            "statistics": sorted(policy.statistics),
            "unnormalize": unnormalize,
            "action_names": None if action_names is None else list(action_names),
            "actions": {name: action_limits(entry) for name, entry in policy.statistics.items()},
        }
        # What requests have to bring, by the dataset in whose units they come; "": normalised numbers.
        of_datasets = {"": None, **policy.statistics}
        batch_spec = self.metadata["batch_spec"]
        self.metadata["expects"] = {name: expected_keys(batch_spec, entry) for name, entry in of_datasets.items()}

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
            number = None
            try:
                request = unpack(data)
                number = request.get("id") if isinstance(request, dict) else None
                reply = self._answer(request)
            except Exception as error:  # whatever a request does wrong must reach its sender and nobody else
                log.warning("request failed: %s: %s", type(error).__name__, error)
                reply = {"type": "error", "error": type(error).__name__, "message": str(error)}
            connection.send(pack({**reply, "id": number}))

    def _answer(self, request: Any) -> dict[str, Any]:
        kind = request.get("type") if isinstance(request, dict) else None
        if kind != "act":
            raise ValueError(f"unknown request type {kind!r}; valid: act")
        if not isinstance(request.get("observation"), dict):
            raise ValueError("a request needs 'observation': a map from key to array")
        instruction, unnormalize = request.get("instruction"), request.get("unnormalize") or self.unnormalize
        if not isinstance(instruction, str | None):
            raise ValueError(f"'instruction' must be a text or nothing, got {type(instruction).__name__}")
        if unnormalize is not None and unnormalize not in self.policy.statistics:
            raise ValueError(f"unknown statistics {unnormalize!r}; valid: {', '.join(self.metadata['statistics'])}")
        self._check(request["observation"], request.get("allow_missing") or (), unnormalize or "")
        start = time.monotonic()
        with self._lock:
            observation = {key: np.asarray(value)[None] for key, value in request["observation"].items()}
            task = self._task(instruction, request.get("goal"))
            actions = self._sample(observation, task, unnormalize, request.get("seed", 0), request.get("step", 0))
        if not np.isfinite(actions).all():
            raise FloatingPointError("the policy's actions are not finite; they were not sent")
        warnings = self._warnings(instruction)
        return {"type": "actions", "actions": actions, "seconds": time.monotonic() - start, "warnings": warnings}

    def _check(self, observation: dict[str, Any], allow_missing: Sequence[str], dataset: str) -> None:
        """Raises ValueError for what is missing, unknown or not finite: a policy would act on it all the same."""
        expected = self.metadata["expects"][dataset]
        frames = {key: value for key, value in observation.items() if key not in WINDOW_KEYS}
        pads = observation.get("pad_mask_dict") or {}
        check_allowed(allow_missing, self.metadata["expects"][""])
        check_observation(frames, expected, allow_missing)
        check_observation(pads, expected, expected, where="observation/pad_mask_dict")

    def _warnings(self, instruction: str | None) -> list[str]:
        """What the policy will not read of an instruction."""
        tokenizer = getattr(self.policy, "text_tokenizer", None)
        if not instruction or not hasattr(tokenizer, "num_tokens"):
            return []
        needed = tokenizer.num_tokens(instruction)
        if needed <= tokenizer.max_length:
            return []
        return [f"the policy reads {tokenizer.max_length} tokens, the instruction has {needed}: its end is cut off"]

    def _task(self, instruction: str | None, goal: dict[str, np.ndarray] | None):
        if goal is None:
            return self._text_task(instruction or "")
        goals = {key: np.asarray(value)[None] for key, value in goal.items()}
        return self.policy.create_tasks(texts=None if instruction is None else [instruction], goals=goals)

    def _sample(self, observation, task, unnormalize: str | None, seed: int, step: int) -> np.ndarray:
        rng = sampling_keys(self.rng_seed, [seed], [step])
        return np.asarray(self.policy.sample_actions(observation, task, rng=rng, unnormalize=unnormalize))[0]
