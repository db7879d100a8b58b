"""A policy behind a websocket, so that the robot's computer needs neither an accelerator nor JAX.

The server keeps nothing between requests: the client sends the whole window of observations, and the sampling noise is
a function of the client's (seed, step). Requests of several clients are computed together (`octo_like.robot.batching`).
A server that compiles first holds its port and does not listen on it: a connection is refused until every announced
program is compiled. The same port answers plain HTTP:

    /healthz    200 "OK" as long as requests are answered, 503 while the server ends (needs no token)
    /metadata   what clients are told when they connect, as JSON
    /metrics    numbers for Prometheus
"""

import collections
import contextlib
import hmac
import http
import ipaddress
import json
import logging
import socket
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from octo_like.common.chunks import Continuation
from octo_like.common.dimensions import PARTS, of_statistics
from octo_like.common.normalization import choose_units
from octo_like.common.schema import BatchSpec, flatten, synthetic_batch
from octo_like.common.words import suggest
from octo_like.robot.batching import Batcher, Request
from octo_like.robot.messages import MAX_MESSAGE_BYTES, PROTOCOL, pack, unpack
from octo_like.robot.planning import able_to, check_words
from octo_like.robot.prediction import dimensions_of
from octo_like.robot.safety import action_limits, check_allowed, check_kinds, check_observation, expected_keys

# Of an observation, what says which of its frames are there.
WINDOW_KEYS = ("timestep", "timestep_pad_mask", "pad_mask_dict", "proprio_pad_mask")
CONTINUING_KEYS = {"previous", "executed", "delay", "method", "schedule", "max_weight", "prior_std"}
# Of a request: what its fields are. All but the observation may be left out, or None.
FIELDS: dict[str, tuple[type, str]] = {
    "observation": (dict, "a map from key to array"),
    "allow_missing": (list, "a list of observation keys"),
    "instruction": (str, "a text"),
    "goal": (dict, "a map from key to picture"),
    "unnormalize": (str, "the name of a data set"),
    "continuing": (dict, f"a map with 'previous' and optionally {sorted(CONTINUING_KEYS - {'previous'})}"),
}
TASK_CACHE_BYTES = 64 << 20
ANSWER_SECONDS = 10.0  # that an end waits for replies to leave

log = logging.getLogger(__name__)


class ServedPolicy(Protocol):
    """What the server needs of a policy; `octo_like.policy.policy.Policy` has it."""

    batch_spec: BatchSpec
    statistics: Mapping[str, Any]

    def create_tasks(
        self,
        texts: Sequence[str] | None = None,
        *,
        goals: Mapping[str, np.ndarray] | None = None,
        subtasks: Sequence[str] | None = None,
    ) -> Any:
        """`subtasks` is given only where the batch spec has them."""

    def sample_actions(self, observations: Mapping[str, Any], tasks: Any, *, rng: Any, unnormalize: str | None) -> Any:
        """Actions (B, H, A); rng is an array of B keys, one per row."""

    def get_pretty_spec(self) -> str: ...


class PolicyServer:
    """Serves one policy.

    Attributes:
      ready: set once requests can be answered.
      requests, errors: {address of the client: count}.

    Args:
      policy: see `ServedPolicy`.
      unnormalize: statistics used when a request names none. Needed unless the policy has none, or `normalized`.
      normalized: send normalised actions to who names none: their limits are unknown, and a robot that executes them
        moves by other amounts.
      action_names: of the action dimensions, told to clients; None: those of the statistics `unnormalize`.
      rng_seed: of the sampling noise.
      host: where to listen, an address or a name. 127.0.0.0/8, ::1 and localhost are this machine alone, "" and "::"
        every interface.
      port: where to listen; 0 takes a free one, see `port` in `running()`.
      token: clients must know it. Needed unless only this machine can reach the port.
      without_token: whoever reaches the port may use the policy, wherever they are.
      max_batch: requests computed at a time.
      max_connections: clients at a time, at least 1; more are refused with HTTP 503.
      continue_by: ways of continuing a chunk that are compiled before the server listens, see
        `octo_like.common.chunks.METHODS`; others are compiled at their first request, beside the running ones.

    Raises:
      ValueError: `unnormalize` names no statistics of the policy, or nothing although the policy has some;
        `action_names` of another number than its actions; `continue_by` with what the policy cannot do; a host that
        others reach and no token; a number out of its range.
      ImportError: the package websockets is missing.
    """

    def __init__(
        self,
        policy: ServedPolicy,
        *,
        unnormalize: str | None = None,
        normalized: bool = False,
        action_names: Sequence[str] | None = None,
        rng_seed: int = 0,
        host: str = "127.0.0.1",
        port: int = 8000,
        token: str | None = None,
        without_token: bool = False,
        max_batch: int = 8,
        max_connections: int = 64,
        continue_by: Sequence[str] = (),
    ):
        _check_access(host, token, without_token)
        unnormalize = choose_units(policy.statistics, unnormalize, normalized)
        self._websockets = _import_websockets()
        check_numbers(port, max_batch, max_connections, rng_seed)
        self.policy, self.unnormalize = policy, unnormalize
        self.host, self.port, self.token, self.max_connections = host, port, token, max_connections
        self.batcher = Batcher(policy, rng_seed, max_batch)
        self.ready = threading.Event()
        self._answered, self._unanswered = threading.Condition(), 0
        self.requests: collections.Counter[str] = collections.Counter()
        self.errors: collections.Counter[str] = collections.Counter()
        self._tasks = _TaskCache(policy)
        limits = {name: action_limits(entry) for name, entry in policy.statistics.items()}
        if action_names is not None:
            dimensions_of(action_names, len(limits[unnormalize]["names"] if unnormalize else action_names))
        elif unnormalize is not None:
            action_names = limits[unnormalize]["names"]
        batch_spec = policy.batch_spec.to_json()
        able = _chunks_of(policy, unnormalize)["continues"]
        for method in continue_by:
            if method not in able:
                raise ValueError(f"the policy cannot continue chunks by {method!r}; valid: {', '.join(able) or 'none'}")
        self.continue_by = tuple(continue_by)
        # What requests have to bring, by the dataset in whose units they come; "": normalised numbers.
        of_datasets = {"": None, **policy.statistics}
        self.metadata: dict[str, Any] = {
            "type": "metadata",
            "protocol": PROTOCOL,
            "spec": policy.get_pretty_spec(),
            "batch_spec": batch_spec,
            "statistics": sorted(policy.statistics),
            "unnormalize": unnormalize,
            "action_names": None if action_names is None else list(action_names),
            "actions": limits,
            "dimensions": {
                name: {part: of_statistics(entry, part).to_json() for part in PARTS if entry.get(part) is not None}
                for name, entry in policy.statistics.items()
            },
            "expects": {name: expected_keys(batch_spec, entry) for name, entry in of_datasets.items()},
            "chunks": {name: _chunks_of(policy, name or None) for name in of_datasets},
            "subtasks": able_to(policy),
        }

    def warm_up(self) -> float:
        """Compiles what the announced requests need, for every batch size; returns the seconds it took.

        These are requests of every data set, for actions, for the words of a policy that has some, and with the chunks
        of `continue_by`. The conversion to units needs no compilation, and what an observation or a task lacks is
        masked in the same program (a released Octo leaves such tokens out: that is compiled beside the others).
        """
        start = time.monotonic()
        task = self._example_task()
        for dataset in (*([None] if self.unnormalize is None else []), *self.policy.statistics):
            window = self._example_observation(dataset)
            self.batcher.warm_up(Request(window, task, dataset, 0, 0))
            chunks = self.metadata["chunks"][dataset or ""]
            width = len(self.metadata["actions"][dataset]["low"]) if dataset else self.policy.batch_spec.action_dim
            for method in (each for each in self.continue_by if each in chunks["continues"]):
                nothing = Continuation(
                    np.zeros((1, chunks["horizon"], width), np.float32), chunks["horizon"], 0, method
                )
                self.batcher.warm_up(Request(window, task, dataset, 0, 0, nothing))
            if self.metadata["subtasks"]["says"]:
                self.batcher.warm_up(Request(window, task, dataset, 0, 0, words=True))
        return time.monotonic() - start

    def _example_observation(self, dataset: str | None) -> dict[str, Any]:
        example = synthetic_batch(self.policy.batch_spec, 1)["observation"]
        window = {key: example[key] for key in self.metadata["expects"][dataset or ""]}
        if dataset is not None and "proprio" in window:
            mean = np.asarray(self.policy.statistics[dataset]["proprio"]["mean"], np.float32)
            window["proprio"] = np.broadcast_to(mean, (1, self.policy.batch_spec.window_size, len(mean)))
        return {**window, **{key: example[key] for key in ("timestep", "timestep_pad_mask")}}

    def _example_task(self) -> Any:
        spec = self.policy.batch_spec
        if spec.language_length is not None and getattr(self.policy, "text_tokenizer", True) is not None:
            return self._tasks.of_text("")
        if not spec.goal_images:
            return synthetic_batch(spec, 1)["task"]
        return self._tasks(
            None, {f"image_{slot}": np.zeros((*spec.image_sizes[slot], 3), np.uint8) for slot in spec.goal_images}
        )

    @contextlib.contextmanager
    def running(self, *, warm: bool = False) -> Iterator["PolicyServer"]:
        """Listens in a thread of its own for as long as the context lasts; what was asked for by then is answered.

        Args:
          warm: compile first. The port is taken before that, and refuses connections meanwhile, as one that nobody
            listens on: clients that wait for a server go on waiting, and none is let in too early.

        Raises:
          OSError: the address cannot be listened on.
        """
        with contextlib.closing(self._bound()) as taken:
            if warm:
                log.info("compiled for batches of %s in %.1f s", self.batcher.sizes, self.warm_up())
            server = self._listen(taken)
            self.batcher.start()
            self._stopped = threading.Event()
            thread = threading.Thread(target=server.serve_forever, name="policy-server", daemon=True)
            self.ready.set()
            thread.start()
            try:
                yield self
            finally:
                self.ready.clear()
                self.batcher.close()
                with self._answered:
                    self._answered.wait_for(lambda: not self._unanswered, ANSWER_SECONDS)
                server.shutdown()
                thread.join()
                self._stopped.set()

    def wait(self) -> None:
        """Blocks for as long as the server runs."""
        while not self._stopped.wait(3600):
            pass

    # ---------------------------------------------------------------- connections

    def _bound(self) -> socket.socket:
        """A socket that has the port and does not listen on it yet."""
        flags = socket.AI_PASSIVE
        family, kind, protocol, _, address = socket.getaddrinfo(
            self.host or None, self.port, type=socket.SOCK_STREAM, flags=flags
        )[0]
        taken = socket.socket(family, kind, protocol)
        try:
            try:
                taken.bind(address)  # not shared with another server that is still compiling
            except OSError:
                # Only connections of a server that has ended may be left on the port.
                taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                taken.bind(address)
        except OSError:
            taken.close()
            raise
        self.port = taken.getsockname()[1]
        return taken

    def _listen(self, taken: socket.socket):
        if self.token is None and not is_loopback(self.host):
            log.warning("listening on %r without a token: whoever reaches the port can use the policy", self.host)
        # Set now: two servers that both have it could hold one port until they listen.
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        taken.listen(128)
        # Images compress badly and the robot is waiting: no compression.
        self._server = self._websockets.serve(
            self._converse,
            sock=taken,
            compression=None,
            max_size=min(MAX_MESSAGE_BYTES, self._largest_message()),
            process_request=self._http,
            logger=_one_line_logger(),
        )
        return self._server

    def _largest_message(self) -> int:
        """Twice what a request of this policy takes: an image that was not resized is refused with a reason."""
        example = synthetic_batch(self.policy.batch_spec, 1)
        size = sum(leaf.nbytes for part in ("observation", "task") for _, leaf in flatten(example[part]))
        return 2 * size + (1 << 20)

    def _http(self, connection, request):
        """The answer to a plain HTTP request, or what keeps a client from connecting; None lets it in."""
        path = request.path.split("?")[0]
        if path == "/healthz":
            ready = self.ready.is_set()
            status = http.HTTPStatus.OK if ready else http.HTTPStatus.SERVICE_UNAVAILABLE
            return connection.respond(status, "OK\n" if ready else "shutting down\n")
        if self.token is not None and not _knows_token(request.headers, self.token):
            return connection.respond(http.HTTPStatus.UNAUTHORIZED, "a token is needed: Authorization: Bearer TOKEN\n")
        if path == "/metadata":
            return connection.respond(http.HTTPStatus.OK, json.dumps(self.metadata, default=str) + "\n")
        if path == "/metrics":
            return connection.respond(http.HTTPStatus.OK, self.metrics())
        if not self.ready.is_set():
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, "shutting down\n")
        if len(self._server.connections) >= self.max_connections:
            return connection.respond(http.HTTPStatus.SERVICE_UNAVAILABLE, f"{self.max_connections} clients are here\n")
        return None

    def metrics(self) -> str:
        """Counters and latencies in the text format of Prometheus."""
        latencies = np.array(self.batcher.latencies or [0.0])
        lines = [f"octo_like_connections {len(self._server.connections)}"]
        lines += [f"octo_like_queue_length {self.batcher.queue_length}"]
        for q in (0.5, 0.99):
            lines.append(f'octo_like_latency_seconds{{quantile="{q}"}} {np.quantile(latencies, q):.6f}')
        lines += [f'octo_like_batches_total{{size="{n}"}} {count}' for n, count in sorted(self.batcher.batches.items())]
        for name, counts in (("requests", self.requests), ("errors", self.errors)):
            lines += [f'octo_like_{name}_total{{client="{who}"}} {count}' for who, count in sorted(counts.items())]
        return "\n".join(lines) + "\n"

    def _converse(self, connection) -> None:
        """One client from hello to goodbye; runs in a thread of its own."""
        from websockets.exceptions import ConnectionClosed

        client = str((connection.remote_address or ("unknown",))[0])
        try:
            self._serve(connection, client)
        except (ConnectionClosed, OSError) as error:
            log.info("client %s is gone: %s", client, error)

    def _serve(self, connection, client: str) -> None:
        """Answers a client's messages for as long as it is there."""
        connection.send(pack(self.metadata))
        for data in connection:
            with self._answering():
                connection.send(pack(self._reply(data, client)))

    @contextlib.contextmanager
    def _answering(self) -> Iterator[None]:
        """The end waits for what happens inside: the reply has to leave before the connection is closed."""
        with self._answered:
            self._unanswered += 1
        try:
            yield
        finally:
            with self._answered:
                self._unanswered -= 1
                self._answered.notify_all()

    def _failed(self, client: str, error: Exception) -> None:
        """Counts and logs a request that could not be answered, of whatever protocol."""
        self.errors[client] += 1
        log.warning("a request of %s failed: %s: %s", client, type(error).__name__, error)

    # ---------------------------------------------------------------- requests

    def _reply(self, data: bytes | str, client: str) -> dict[str, Any]:
        """The answer to a message, whatever it is."""
        number = None
        self.requests[client] += 1
        try:
            request = unpack(data)
            number = request.get("id") if isinstance(request, dict) else None
            if not (number is None or isinstance(number, int)):
                number = None
                raise ValueError(f"'id' must be a whole number, got {type(request['id']).__name__}")
            reply = self._answer(request)
        except Exception as error:  # whatever a request does wrong must reach its sender and nobody else
            self._failed(client, error)
            # Half a surrogate pair, out of a file name for instance, cannot be sent.
            message = str(error).encode(errors="backslashreplace").decode()
            reply = {"type": "error", "error": type(error).__name__, "message": message}
        return {**reply, "id": number}

    def _answer(self, request: Any) -> dict[str, Any]:
        kind = request.get("type") if isinstance(request, dict) else None
        if kind != "act":
            raise ValueError(f"unknown request type {kind!r}; valid: act")
        if request.get("observation") is None:
            raise ValueError("a request needs 'observation': a map from key to array")
        for key, (form, what) in FIELDS.items():
            if not isinstance(request.get(key), form | None):
                raise ValueError(f"{key!r} must be {what}, got {type(request[key]).__name__}")
        instruction, unnormalize = request.get("instruction"), request.get("unnormalize") or self.unnormalize
        if unnormalize is not None and unnormalize not in self.policy.statistics:
            raise ValueError(f"unknown statistics {unnormalize!r}; valid: {', '.join(self.metadata['statistics'])}")
        if request.get("resize", "stretch") != self.policy.batch_spec.resize:
            raise ValueError(
                f"the policy reads pictures resized by {self.policy.batch_spec.resize!r} (batch_spec of the metadata), "
                f"not {request.get('resize', 'stretch')!r}: use a newer client, or resize so and send 'resize'"
            )
        seed = check_whole(request.get("seed", 0), "seed", 2**63 - 1)
        step = check_whole(request.get("step", 0), "step", 2**32 - 1)
        start = time.monotonic()
        window = _window(request["observation"], self.policy.batch_spec.window_size)
        allow_missing = request.get("allow_missing") or ()
        if not all(isinstance(key, str) for key in allow_missing):
            raise ValueError(f"'allow_missing' must be a list of observation keys, got {allow_missing!r:.80}")
        self._check(window, allow_missing, unnormalize or "")
        observation = _one_row(window)
        subtask = self._subtask(request, observation, instruction, unnormalize)
        task = self._tasks(instruction, request.get("goal"), subtask)
        continuing = self._continuing(request.get("continuing"), unnormalize)
        future = self.batcher.submit(Request(observation, task, unnormalize, seed, step, continuing))
        actions = np.asarray(future.result(), np.float32)
        if not np.isfinite(actions).all():
            raise FloatingPointError("the policy's actions are not finite; they were not sent")
        warnings = self._warnings(instruction)
        reply = {"type": "actions", "actions": actions, "seconds": time.monotonic() - start, "warnings": warnings}
        return reply if subtask is None else {**reply, "subtask": subtask}

    def _subtask(self, request: Any, observation: Any, instruction: str | None, unnormalize: str | None) -> str | None:
        """What to do next: what the request says, or with "plan" what the policy says."""
        subtask, plan = request.get("subtask"), request.get("plan", False)
        check_words(subtask, plan, self.metadata["subtasks"])
        if not plan:
            return subtask
        last = request.get("last_subtask")
        if not isinstance(last, str | None) or (last and not self.metadata["subtasks"]["remembers"]):
            raise ValueError("'last_subtask' must be a text or nothing, for a policy that remembers what was said last")
        task = self._tasks(instruction, request.get("goal"), last)
        return self.batcher.submit(Request(observation, task, unnormalize, 0, 0, words=True)).result()

    def _check(self, observation: dict[str, Any], allow_missing: Sequence[str], dataset: str) -> None:
        """Raises ValueError for what is missing, unknown or not finite: a policy would act on it all the same."""
        expected = self.metadata["expects"][dataset]
        frames = {key: value for key, value in observation.items() if key not in WINDOW_KEYS}
        pads = observation.get("pad_mask_dict") or {}
        check_allowed(allow_missing, self.metadata["expects"][""])
        check_observation(frames, expected, allow_missing)
        check_observation(pads, expected, expected, where="observation/pad_mask_dict")

    def _continuing(self, given: Any, unnormalize: str | None) -> Continuation | None:
        """What a request wants to go on from. Raises ValueError for what this policy cannot do."""
        if given is None:
            return None
        chunks = self.metadata["chunks"][unnormalize or ""]
        if not isinstance(given, dict) or not set(given) <= CONTINUING_KEYS or "previous" not in given:
            raise ValueError(f"'continuing' is a map with 'previous' and optionally {sorted(CONTINUING_KEYS)}")
        values = {key: value for key, value in given.items() if key != "previous"}
        continuing = Continuation(np.asarray(given["previous"], np.float32)[None], **{"executed": 0, **values})
        largest = chunks["continues"].get(continuing.method)
        if largest is None:
            able = ", ".join(chunks["continues"]) or "none"
            raise ValueError(f"the policy cannot continue chunks by {continuing.method!r}; valid: {able}")
        shape = (1, chunks["horizon"], np.shape(continuing.previous)[2])
        if np.shape(continuing.previous) != shape or continuing.counts()[1][0] > largest:
            raise ValueError(
                f"'continuing': previous has shape {np.shape(continuing.previous)[1:]} and delay {continuing.delay}; "
                f"chunks have {chunks['horizon']} actions, and the delay is at most {largest}"
            )
        return continuing

    def _warnings(self, instruction: str | None) -> list[str]:
        """What the policy will not read of an instruction."""
        tokenizer: Any = getattr(self.policy, "text_tokenizer", None)
        if not instruction or not hasattr(tokenizer, "num_tokens"):
            return []
        needed = tokenizer.num_tokens(instruction)
        if needed <= tokenizer.max_length:
            return []
        return [f"the policy reads {tokenizer.max_length} tokens, the instruction has {needed}: its end is cut off"]


class _TaskCache:
    """Tasks of instructions, encoded once: the last ones that fit into TASK_CACHE_BYTES."""

    def __init__(self, policy: ServedPolicy):
        self._policy, self._lock = policy, threading.Lock()
        self._kept: collections.OrderedDict[tuple[str, str | None], tuple[Any, int]] = collections.OrderedDict()
        self._bytes = 0

    def __call__(self, instruction: str | None, goal: dict[str, np.ndarray] | None, subtask: str | None = None) -> Any:
        if goal is None:
            return self.of_text(instruction or "", subtask)
        goals = {key: np.asarray(value)[None] for key, value in goal.items()}
        options: dict[str, Any] = {} if subtask is None else {"subtasks": [subtask]}
        with self._lock:
            texts = None if instruction is None else [instruction]
            return self._policy.create_tasks(texts=texts, goals=goals, **options)

    def of_text(self, text: str, subtask: str | None = None) -> Any:
        said = (text, subtask)
        with self._lock:
            if said not in self._kept:
                options: dict[str, Any] = {} if subtask is None else {"subtasks": [subtask]}
                task = self._policy.create_tasks(texts=[text], **options)
                size = sum(np.asarray(leaf).nbytes for _, leaf in flatten(task)) + len(text) + len(subtask or "")
                self._kept[said] = task, size
                self._bytes += size
                while self._bytes > TASK_CACHE_BYTES and len(self._kept) > 1:
                    self._bytes -= self._kept.popitem(last=False)[1][1]
            self._kept.move_to_end(said)
            return self._kept[said][0]


def _chunks_of(policy: Any, unnormalize: str | None) -> dict[str, Any]:
    """What clients are told of chunks: "horizon" H and "continues", {method: largest delay}."""
    horizon, continues = policy.batch_spec.action_horizon, {}
    if hasattr(policy, "chunk_horizon"):
        horizon = policy.chunk_horizon(unnormalize)
    if hasattr(policy, "continuation_methods"):
        continues = policy.continuation_methods(unnormalize)
    return {"horizon": horizon, "continues": continues}


def _window(given: Mapping[Any, Any], length: int) -> dict[str, Any]:
    """A request's observation with the policy's window W = `length` and types, {key: (W, ...)} and "pad_mask_dict".

    A shorter window is filled up as that of an episode's beginning, by copies of its first frame that are masked: so
    every request has the shapes that are compiled, and those of training.

    Raises:
      ValueError: what is no array of numbers, or has another length than timestep_pad_mask, or more than W frames.
    """
    masks = given.get("pad_mask_dict") or {}
    if not isinstance(masks, dict):
        raise ValueError(f"observation/pad_mask_dict must be a map from key to mask, got {type(masks).__name__}")
    window = {key: _numbers(value, key) for key, value in given.items() if key != "pad_mask_dict"}
    masks = {key: _numbers(value, key, "observation/pad_mask_dict") for key, value in masks.items()}
    if "timestep_pad_mask" not in window:
        raise ValueError(f"observation/timestep_pad_mask (W,) bool is missing; got {', '.join(sorted(window))}")
    shape = np.shape(window["timestep_pad_mask"])
    if len(shape) != 1 or not 1 <= shape[0] <= length:
        raise ValueError(f"observation/timestep_pad_mask: expected (W,), W from 1 to {length}, got {shape}")
    (frames,) = shape
    steps = window.setdefault("timestep", np.arange(frames))
    if steps.shape != shape or not ((steps >= 0) & (steps < 2**31) & (steps % 1 == 0)).all():
        raise ValueError(f"observation/timestep: expected ({frames},) whole numbers from 0 on, got {steps}")
    for where, tree in (("observation", window), ("observation/pad_mask_dict", masks)):
        for key, value in tree.items():
            if np.shape(value)[:1] != shape:
                raise ValueError(
                    f"{where}/{key}: expected {frames} frames, as timestep_pad_mask has, got {value.shape}"
                )
            first = value[:1].repeat(length - frames, axis=0)
            if key == "timestep_pad_mask":
                first = np.zeros_like(first)
            elif key == "timestep":
                first = np.maximum(first - np.arange(length - frames, 0, -1), 0)
            tree[key] = np.concatenate([first, value])
    window["timestep"] = window["timestep"].astype(np.int32)
    return {**window, "pad_mask_dict": masks}


def _numbers(value: Any, key: Any, where: str = "observation") -> np.ndarray:
    """An array as the policy reads it: floats of 32 bits, in the machine's own order of bytes."""
    if not isinstance(key, str):
        raise ValueError(f"{where}: keys are texts, got {key!r}")
    try:
        array = np.asarray(value)
    except ValueError as error:  # lists of different lengths
        raise ValueError(f"{where}/{key}: {error}") from error
    if array.dtype.kind not in "biuf":
        raise ValueError(f"{where}/{key}: expected an array of numbers, got {type(value).__name__}")
    return array.astype(np.float32) if array.dtype.kind == "f" else array


def _one_row(tree: dict[str, Any]) -> dict[str, Any]:
    """Arrays (W, ...) as a batch of one."""
    return {key: _one_row(value) if isinstance(value, dict) else np.asarray(value)[None] for key, value in tree.items()}


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what listens on `host`: 127.0.0.0/8, ::1 or localhost. Another name may resolve
    to anything; "" is every interface."""
    if host.lower() == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _check_access(host: str, token: str | None, without_token: bool) -> None:
    """Raises ValueError when strangers would be let in and nobody said so."""
    if token is not None and without_token:
        raise ValueError("there is a token, and without_token: leave out one of them")
    if token is not None and (not token or token != token.strip()):
        raise ValueError("the token must not be empty, nor begin or end with a space")
    if token is None and not without_token and not is_loopback(host):
        raise ValueError(
            f"whoever reaches {host or 'any interface'} could command the robot: set a token (of serve.py, in the "
            "environment variable OCTO_LIKE_TOKEN), listen on 127.0.0.1, or let everybody in with without_token "
            "(--without_token)"
        )


def _knows_token(headers: Mapping[str, str], token: str) -> bool:
    scheme, _, given = headers.get("Authorization", "").partition(" ")
    return scheme in ("Bearer", "Api-Key") and hmac.compare_digest(given.strip().encode(), token.encode())


def check_whole(value: Any, key: str, highest: int = 2**63 - 1, lowest: int = 0) -> int:
    """A whole number. Raises ValueError for anything else, and beyond the limits."""
    if isinstance(value, bool) or not isinstance(value, int) or not lowest <= value <= highest:
        raise ValueError(f"{key!r} must be a whole number from {lowest} to {highest}, got {value!r}")
    return value


def with_kinds(statistics: Mapping[str, Any], given: Sequence[str]) -> dict[str, Any]:
    """A policy's statistics with other kinds of actions.

    Args:
      given: "DATASET=KIND,..." with a kind for each action dimension.

    Raises:
      ValueError: an unknown dataset or kind, no kind of a dimension.
    """
    found = dict(statistics)
    for text in given:
        name, _, kinds = text.rpartition("=")
        if name not in found:
            raise ValueError(f"kinds {text!r}: unknown statistics {name!r}; {suggest(name, found)}")
        named = of_statistics(found[name])
        check_kinds(kinds.split(","), named.names, f"kinds {text!r}: ")
        named = named.of_kinds(kinds.split(","))
        found[name] = found[name] | {"dimensions": (found[name].get("dimensions") or {}) | {"action": named.to_json()}}
    return found


def check_numbers(port: int, max_batch: int, max_connections: int, rng_seed: int) -> None:
    """Raises ValueError for arguments of `PolicyServer` that are out of their range; quick, before a policy is read."""
    check_whole(port, "port", 65535)
    check_whole(max_batch, "max_batch", 4096, lowest=1)
    check_whole(max_connections, "max_connections", 4096, lowest=1)
    check_whole(rng_seed, "seed")


def _import_websockets():
    try:
        import websockets.sync.server as module
    except ImportError as error:
        raise ImportError("serving a policy needs the package websockets: pip install 'octo_like[serve]'") from error
    return module


def _one_line_logger() -> logging.Logger:
    """What websockets reports, without tracebacks: somebody who scans ports is worth one line."""
    logger = logging.getLogger("octo_like.websockets")
    logger.setLevel(logging.WARNING)
    if not logger.filters:
        logger.addFilter(_drop_traceback)
    return logger


def _drop_traceback(record: logging.LogRecord) -> bool:
    record.exc_info = record.exc_text = None
    return True
