"""openpi's wire protocol, both ways: its clients drive our policies, and our rollouts drive its servers.

Pictures come letterboxed from these clients: 224x224, at the camera's aspect ratio, with black bars on two sides. The
bars are recognised and cut off (`Bars`), then the picture is resized as the policy was trained.

A client of openpi sends one frame at a time as a flat map (`observation/image`, `prompt`, ...), and gets a map with
`actions`; the first thing on the wire is a map of metadata. There are no request numbers, no windows and no word for
the beginning of an episode. `OpenpiServer` keeps the window of each connection, and takes a changed prompt, the key
`reset`, a long silence or a jump of the state for a new episode. An error is a text frame, after which the connection
is closed, as these clients expect it.
"""

import contextlib
import dataclasses
import json
import logging
import time
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import msgpack
import numpy as np

from octo_like.common.geometry import placement
from octo_like.common.normalization import CONSTANT
from octo_like.common.robot import Description, OpenpiKeys
from octo_like.common.schema import BatchSpec
from octo_like.robot.history import History
from octo_like.robot.images import resize_images
from octo_like.robot.messages import MAX_MESSAGE_BYTES
from octo_like.robot.server import PolicyServer, check_whole

_KINDS = "biuf"
INTERNAL_ERROR = 1011

log = logging.getLogger(__name__)


class Keys(OpenpiKeys):
    """A robot's table, see `octo_like.common.robot.OpenpiKeys`, from where it can come."""

    @classmethod
    def of(cls, statistics: Mapping[str, Any], dataset: str | None) -> "Keys":
        """That of the description that a policy keeps of a dataset's robot. Raises ValueError when it has none."""
        robot = None if dataset is None else statistics.get(dataset, {}).get("robot")
        table = Description.from_json(robot).openpi if robot else None
        if table is None:
            which = "no dataset is named" if dataset is None else f"the robot of {dataset!r} has no openpi table"
            raise ValueError(f"{which} (Robot(openpi=OpenpiKeys(...))); valid: {', '.join(PRESETS)}, or a JSON file")
        return cls(table.images, table.state, table.prompt)

    @classmethod
    def load(cls, name: str) -> "Keys":
        """One of `PRESETS`, or a JSON file with the attributes. Raises ValueError for anything else."""
        if name in PRESETS:
            return PRESETS[name]
        try:
            with open(name, encoding="utf-8") as file:
                return cls(**json.load(file))
        except (OSError, ValueError, TypeError) as error:
            valid = f"{', '.join(PRESETS)}, or a JSON file with images, state and prompt"
            raise ValueError(f"openpi keys {name!r}: {error}; valid: {valid}") from error


PRESETS = {
    "droid": Keys(
        {"observation/exterior_image_1_left": "primary", "observation/wrist_image_left": "wrist"},
        ("observation/joint_position", "observation/gripper_position"),
    ),
    "libero": Keys({"observation/image": "primary", "observation/wrist_image": "wrist"}, ("observation/state",)),
    "aloha": Keys(
        {"images/cam_high": "primary", "images/cam_left_wrist": "wrist", "images/cam_right_wrist": "wrist_right"},
        ("state",),
    ),
}


@dataclasses.dataclass(frozen=True)
class Client:
    """What the program that openpi publishes for a robot does with its actions, and sends.

    Attributes:
      executes: actions of each chunk, one number for each of its programs.
      kinds: of the action's dimensions, see `octo_like.common.robot.KINDS`.
      state: numbers of the proprioception.
      hz: control steps per second.
      lowest: of the gripper's commands.
      chunk: the length that it insists on; None: any that is long enough.
    """

    executes: tuple[int, ...]
    kinds: tuple[str, ...]
    state: int
    hz: float
    lowest: float = 0.0
    chunk: int | None = None


# By preset.
CLIENTS = {
    "droid": Client((8,), ("velocity",) * 7 + ("gripper",), 8, 15, chunk=10),
    "libero": Client((5,), ("delta",) * 6 + ("gripper",), 8, 20, lowest=-1.0),
    "aloha": Client((10, 25), (("absolute",) * 6 + ("gripper",)) * 2, 14, 50),  # simulated, real
}


def pack(message: Any) -> bytes:
    """msgpack with arrays as openpi writes them. Raises ValueError for arrays of objects, texts or complex numbers."""
    return msgpack.packb(message, default=_encode)


def unpack(data: bytes) -> Any:
    """Inverse of `pack`, also of what openpi's clients send. Raises ValueError for anything else."""
    try:
        return msgpack.unpackb(data, object_hook=_decode)
    except (msgpack.UnpackException, ValueError, TypeError, KeyError, OverflowError) as error:
        raise ValueError(f"not a message of openpi: {error!r}") from error


def _encode(value: Any) -> Any:
    if isinstance(value, np.generic | np.ndarray | jax.Array):
        array = np.asarray(value)
        if array.dtype.kind not in _KINDS:
            raise ValueError(f"cannot send an array of {array.dtype}")
        if isinstance(value, np.generic):
            return {b"__npgeneric__": True, b"data": value.item(), b"dtype": array.dtype.str}
        return {b"__ndarray__": True, b"data": array.tobytes(), b"dtype": array.dtype.str, b"shape": array.shape}
    raise TypeError(f"cannot send a {type(value).__name__}")


def _decode(value: dict) -> Any:
    if b"__ndarray__" in value or b"__npgeneric__" in value:
        dtype = np.dtype(value[b"dtype"])
        if dtype.kind not in _KINDS:
            raise ValueError(f"arrays of {dtype} are not accepted")
        if b"__npgeneric__" in value:
            return dtype.type(value[b"data"])
        return np.frombuffer(value[b"data"], dtype).reshape(value[b"shape"])
    return value


# ---------------------------------------------------------------- their clients, our policy


class OpenpiServer(PolicyServer):
    """A `PolicyServer` for the clients of openpi; see there for the arguments.

    Args:
      keys: of the robot. Cameras that the policy reads and the table does not name are masked.
      episode_gap: seconds between an answer and the next request after which that begins an episode; inf: never. None:
        twice as long as a whole chunk takes, at the control rate of the robot's description or 10 Hz, at least 3.
      episode_jump: change of the state from one request to the next, in standard deviations of the dataset, beyond
        which the later begins an episode; inf: never. The change is the root mean square over the dimensions that vary,
        each of at most twice this many deviations (an angle that wraps around is no jump). A sixth of it is enough
        where it ends ten times nearer to the episode's first state than it is long: the robot was put back.

    Raises:
      ValueError: as `PolicyServer`; the table names no camera of the policy, or lacks what else it reads; actions or a
        proprioception that are not those of the program that openpi publishes for a preset.
    """

    def __init__(
        self,
        policy: Any,
        keys: Keys,
        *,
        episode_gap: float | None = None,
        episode_jump: float = 3.0,
        **arguments: Any,
    ):
        super().__init__(policy, **arguments)
        check_episodes(episode_gap, episode_jump)
        slots = set(policy.batch_spec.image_sizes)
        if not slots & set(keys.images.values()):
            raise ValueError(
                f"the policy's cameras are {', '.join(sorted(slots))}, of which the openpi keys name none: "
                f"{', '.join(sorted(set(keys.images.values())))}"
            )
        self.keys = keys
        self._sizes = {f"image_{slot}": size for slot, size in policy.batch_spec.image_sizes.items()}
        self._expected = self.metadata["expects"][self.unnormalize or ""]
        unsent = [
            key for key in self._expected if not key.startswith("image_") and not (key == "proprio" and keys.state)
        ]
        if unsent:
            raise ValueError(f"the policy reads {', '.join(unsent)}, which clients with these openpi keys do not send")
        self.hello = {
            "policy": "octo_like",
            "action_names": self.metadata["action_names"],
            "action_horizon": self.metadata["chunks"][self.unnormalize or ""]["horizon"],
            "action_dim": self._width("action", policy.batch_spec.action_dim),
        }
        entry = policy.statistics[self.unnormalize] if self.unnormalize is not None else {}
        seconds = self.hello["action_horizon"] / (entry.get("robot") or {"control_hz": 10.0})["control_hz"]
        self.episode_gap = max(3.0, 2 * seconds) if episode_gap is None else episode_gap
        self.episode_jump, self._deviations = episode_jump, None
        if "proprio" in entry:
            self._deviations = np.asarray(entry["proprio"]["std"], np.float64)
        elif self.unnormalize is None and policy.batch_spec.proprio_dim is not None:
            self._deviations = np.ones(policy.batch_spec.proprio_dim)  # the state is normalised
        for name, client in CLIENTS.items():
            if keys is PRESETS[name]:  # the same keys in a file are those of another client
                self._check_fit(name, client)

    def _width(self, part: str, otherwise: int | None) -> int | None:
        """Numbers of the action or proprioception of the dataset in whose units this server speaks."""
        return otherwise if self.unnormalize is None else len(self.policy.statistics[self.unnormalize][part]["mean"])

    def _check_fit(self, name: str, client: Client) -> None:
        """Raises ValueError for a policy that the published client of a preset cannot execute; warns where it may."""
        horizon, width = self.hello["action_horizon"], self.hello["action_dim"]
        reads = self._width("proprio", self.policy.batch_spec.proprio_dim) if "proprio" in self._expected else None
        wrong = None
        if width != len(client.kinds):
            wrong = f"executes actions of {len(client.kinds)} numbers, the policy's have {width}"
        elif horizon < min(client.executes):
            wrong = f"executes {min(client.executes)} actions of each chunk, the policy's chunks have {horizon}"
        elif reads not in (None, client.state):
            wrong = f"sends a proprioception of {client.state} numbers, the policy reads {reads}"
        if wrong:
            raise ValueError(
                f"openpi's client of {name} {wrong}; for a client of your own with the same keys, write them into a "
                "JSON file: --openpi FILE"
            )
        if horizon < max(client.executes):
            most = max(client.executes)
            log.warning("the policy's chunks have %d actions; one client of %s executes %d", horizon, name, most)
        if client.chunk not in (None, horizon):
            log.warning(
                "the policy's chunks have %d actions; the client of %s insists on %d", horizon, name, client.chunk
            )
        if self.unnormalize is None:
            return
        kinds = self.metadata["actions"][self.unnormalize]["kinds"]
        robot = self.policy.statistics[self.unnormalize].get("robot")
        least = self.policy.statistics[self.unnormalize]["action"].get("min")
        if least is not None and client.lowest < 0 <= least[-1]:
            log.warning(
                "the policy's last action is never below 0; the client of %s takes a gripper's commands from %g to 1, "
                "of which 1 closes: your client has to translate what the policy gives",
                name,
                client.lowest,
            )
        for dimension, (kind, executed) in enumerate(zip(kinds, client.kinds, strict=True)):
            if kind not in ("other", executed) and {kind, executed} != {"absolute", "gripper"}:
                log.warning("action %d is %s to the policy and %s to the client of %s", dimension, kind, executed, name)
        if robot and robot["control_hz"] != client.hz:
            log.warning(
                "the policy was trained at %g Hz, the client of %s acts at %g", robot["control_hz"], name, client.hz
            )

    def _largest_message(self) -> int:
        return MAX_MESSAGE_BYTES  # frames come in any size

    def _serve(self, connection, client: str) -> None:
        episode = _Episode(History(self.policy.batch_spec.window_size))
        connection.send(pack(self.hello))
        for data in connection:
            self.requests[client] += 1
            with self._answering():
                try:
                    reply = pack(self._infer(unpack(data), episode, client))
                except Exception as error:
                    self._failed(client, error)
                    connection.send(f"{type(error).__name__}: {error}".encode(errors="backslashreplace").decode())
                    connection.close(INTERNAL_ERROR, "the message before says why")
                    return
                connection.send(reply)
                episode.answered = time.monotonic()

    def _infer(self, message: Any, episode: "_Episode", client: str) -> dict[str, Any]:
        if not isinstance(message, dict):
            raise ValueError(f"expected a map of observations, got {type(message).__name__}")
        start = time.monotonic()
        flat = dict(_flat(message))
        prompt, reset = flat.get(self.keys.prompt, ""), flat.get("reset", False)
        if not isinstance(prompt, str):
            raise ValueError(f"{self.keys.prompt!r} must be a text, got {type(prompt).__name__}")
        if not isinstance(reset, bool | np.bool_):
            raise ValueError(f"'reset' must be true or false, got {type(reset).__name__}")
        seed = flat.get("seed", 0)
        seed = check_whole(seed.item() if isinstance(seed, np.generic) else seed, "seed")
        found = self._observation(flat)
        state = found.get("proprio")
        because = "reset" if reset else self._begins(episode, prompt, state, start)
        if because:
            episode.begin(prompt, seed)
            log.info("an episode of %s begins: %s", client, because)
        episode.keep(state)
        observation = {key: value for key, value in found.items() if key in self._expected}
        missing = [f"image_{slot}" for slot in self.policy.batch_spec.image_sizes]
        missing = [key for key in missing if key.removeprefix("image_") not in self.keys.images.values()]
        self._check(observation, missing, self.unnormalize or "")
        reply = self._answer(
            {
                "type": "act",
                "observation": episode.history.append(self._resized(observation, episode)),
                "resize": self.policy.batch_spec.resize,
                "allow_missing": missing,
                "instruction": prompt or None,
                "seed": episode.seed,
                "step": episode.steps,
            }
        )
        episode.steps += 1
        milliseconds = 1000 * (time.monotonic() - start)
        return {"actions": reply["actions"], "server_timing": {"infer_ms": milliseconds}}

    def _resized(self, observation: Mapping[str, Any], episode: "_Episode") -> dict[str, Any]:
        """The observation with pictures as the policy was trained on: without bars, in its sizes."""
        cut = dict(observation)
        for key in self._sizes.keys() & observation.keys():
            cut[key] = episode.bars.setdefault(key, Bars(key)).cut(observation[key])
        return resize_images(cut, self._sizes, resize=self.policy.batch_spec.resize)

    def _begins(self, episode: "_Episode", prompt: str, state: np.ndarray | None, now: float) -> str | None:
        """Why a request begins an episode; None: it goes on."""
        if episode.prompt is None:
            return "the first request"
        if prompt != episode.prompt:
            return "another prompt"
        if now - episode.answered > self.episode_gap:
            return f"{now - episode.answered:.1f} s without a request (--episode_gap {self.episode_gap:g})"
        if state is None or episode.state is None or episode.first is None or self._deviations is None:
            return None
        moved = self._distance(state, episode.state)
        if moved > self.episode_jump:
            return f"the state jumped by {moved:.1f} deviations (--episode_jump {self.episode_jump:g})"
        if moved > self.episode_jump / 6 and self._distance(state, episode.first) < moved / 10:
            return f"the state jumped back to where the episode began, by {moved:.1f} deviations"
        return None

    def _distance(self, one: np.ndarray, other: np.ndarray) -> float:
        """Between two states, see `episode_jump`; 0 where they have not the widths of the statistics."""
        if self._deviations is None or not one.shape == other.shape == self._deviations.shape:
            return 0.0
        varies = self._deviations > CONSTANT
        each = np.abs(one - other)[varies] / self._deviations[varies]
        return float(np.sqrt(np.mean(np.minimum(each, 2 * self.episode_jump) ** 2))) if varies.any() else 0.0

    def _observation(self, flat: Mapping[str, Any]) -> dict[str, Any]:
        """The policy's keys of one frame. Raises ValueError for a camera or a state that is missing."""
        slots = self.policy.batch_spec.image_sizes
        wanted = {key: slot for key, slot in self.keys.images.items() if slot in slots}
        absent = [key for key in [*wanted, *self.keys.state] if key not in flat]
        if absent:
            raise ValueError(f"the observation lacks {absent[0]!r}; got {', '.join(sorted(flat))}")
        found = {f"image_{slot}": as_image(flat[key], key) for key, slot in wanted.items()}
        for key in self.keys.state:
            if np.asarray(flat[key]).dtype.kind not in _KINDS or np.ndim(flat[key]) > 1:
                raise ValueError(f"{key}: expected numbers (n,), got {type(flat[key]).__name__} {np.shape(flat[key])}")
        parts = [np.atleast_1d(np.asarray(flat[key], np.float32)) for key in self.keys.state]
        return {**found, "proprio": np.concatenate(parts)} if parts else found


@dataclasses.dataclass
class _Episode:
    """What a connection is in the midst of; `bars` by camera, found anew in each episode, and the states of the
    episode's first and of the last request."""

    history: History
    bars: dict[str, "Bars"] = dataclasses.field(default_factory=dict)
    prompt: str | None = None
    seed: int = 0
    steps: int = 0
    answered: float = 0.0
    first: np.ndarray | None = None
    state: np.ndarray | None = None

    def begin(self, prompt: str, seed: int) -> None:
        self.history.reset()
        self.bars = {}
        self.prompt, self.seed, self.steps = prompt, seed, 0
        self.first = self.state = None

    def keep(self, state: np.ndarray | None) -> None:
        self.first, self.state = state if self.first is None else self.first, state


def check_episodes(gap: float | None, jump: float) -> None:
    """Raises ValueError for an `episode_gap` or `episode_jump` of `OpenpiServer` that is not positive."""
    for name, value in (("episode_gap", gap), ("episode_jump", jump)):
        if value is not None and not value > 0:
            raise ValueError(f"{name} must be positive (inf: never), got {value}")


# Of cameras: width to height. Where bars end in black parts of the picture, one of these says how wide they are.
ASPECT_RATIOS = ((5, 4), (4, 3), (3, 2), (16, 10), (16, 9), (2, 1), (21, 9))
NARROWEST = 0.25  # a picture between bars has at least this share of the whole
STRIP = 0.25  # of a picture, and no more, may be black beside a bar for the bar to be recognised


class Bars:
    """The black bars of one camera's pictures: where openpi's rule puts them, and never anything but black.

    What has been black in all pictures of an episode so far bounds the bars, so a later picture can correct what a dark
    first one suggested. Changes are logged.

    Args:
      name: of the camera, for messages.
    """

    def __init__(self, name: str):
        self.name = name
        self._size: tuple[int, int] | None = None
        self._margins = np.zeros(
            4, int
        )  # black rows above and below, black columns to the left and right, in all pictures
        self._inner: tuple[slice, slice] | None = None
        self._seen = self._warned = False

    def cut(self, image: np.ndarray) -> np.ndarray:
        """What is between the bars of a picture (h, w, 3) uint8; the whole picture where there are none."""
        height, width = image.shape[:2]
        if (height, width) != self._size:
            self._size, self._inner, self._seen = (height, width), None, False
        rows, columns = (np.asarray(image.any(axes)) for axes in ((1, 2), (0, 2)))
        if not rows.any():  # nothing is seen: nothing is learned
            return image if self._inner is None else image[self._inner]
        margins = np.array([rows.argmax(), rows[::-1].argmax(), columns.argmax(), columns[::-1].argmax()])
        first, self._seen = not self._seen, True
        self._margins = margins if first else np.minimum(self._margins, margins)
        found = self._find(height, width)
        if found != self._inner or first:
            self._report(found, first, height, width)
        self._inner = found
        return image if found is None else image[found]

    def _find(self, height: int, width: int) -> tuple[slice, slice] | None:
        across = _between(height, width, *self._margins[:2].tolist())
        along = _between(width, height, *self._margins[2:].tolist())
        if across and along:  # a dark picture can look like both: a camera's aspect ratio decides
            across, along = (one if one[2] else None for one in (across, along))
        if (across is None) == (along is None):
            return None
        if across is not None:
            return slice(*across[:2]), slice(0, width)
        assert along is not None
        return slice(0, height), slice(*along[:2])

    def _report(self, found: tuple[slice, slice] | None, first: bool, height: int, width: int) -> None:
        if found is not None:
            rows, columns = (part.stop - part.start for part in found)
            text = "%s: pictures of %dx%d have black bars, and are cut to the %dx%d between them"
            log.log(logging.INFO if first else logging.WARNING, text, self.name, height, width, rows, columns)
        elif not first:
            log.warning("%s: what looked like black bars is a part of the picture: it is not cut any more", self.name)
        doubtful = self._margins[:2].min() > 0 or self._margins[2:].min() > 0
        if found is None and doubtful and not self._warned:
            self._warned = True
            log.warning(
                "%s: black on two sides of pictures of %dx%d (%d and %d rows, %d and %d columns), not where openpi's "
                "clients put bars: taken for a part of the picture. If it is none, the policy sees another geometry "
                "than in training",
                self.name,
                height,
                width,
                *self._margins.tolist(),
            )


def _between(length: int, across: int, before: int, after: int) -> tuple[int, int, bool] | None:
    """(start, stop, whether it has a camera's aspect ratio) of what is between bars on an axis; None: no bars.

    Args:
      length, across: pixels of the axis and of the other one.
      before, after: pixels at both ends that are black in all pictures.
    """
    symmetric = before > 0 and after - before in (0, 1) and length - before - after >= NARROWEST * length
    for ratio in ASPECT_RATIOS:
        for raw in (ratio, ratio[::-1]):
            start, _, inner, beside = placement("letterbox", raw, (length, across)).target
            stop = length - start - inner
            if start == 0 or beside < across - 1:
                continue
            if symmetric and abs(before - start) <= 1:
                return before, length - after, True
            # Beside one of the bars a strip of the picture itself may be black.
            extra = (before - start, after - stop)
            if min(extra) == 0 and max(extra) <= inner * STRIP:
                return start, start + inner, True
    return (before, length - after, False) if symmetric else None


def _flat(tree: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """Leaves by path: ALOHA's images are a map in the map."""
    found = []
    for key, value in tree.items():
        found += _flat(value, f"{prefix}{key}/") if isinstance(value, dict) else [(f"{prefix}{key}", value)]
    return found


def as_image(value: Any, key: str) -> np.ndarray:
    """A picture (h, w, 3) uint8 from one that may be (3, h, w), or floats from 0 to 1."""
    image = np.asarray(value)
    if image.ndim == 3 and image.shape[0] == 3 and image.shape[-1] != 3:
        image = np.moveaxis(image, 0, -1)
    if image.ndim != 3 or image.shape[-1] != 3 or not image.size:
        raise ValueError(f"{key}: expected a picture (h, w, 3) or (3, h, w), got {image.shape}")
    if image.dtype.kind == "f":
        if not (np.isfinite(image).all() and image.min() >= 0 and image.max() <= 1):
            raise ValueError(f"{key}: a picture of floats must be within 0 and 1")
        return np.rint(255 * image).astype(np.uint8)
    if image.dtype != np.uint8:
        raise ValueError(f"{key}: expected uint8, or floats from 0 to 1, got {image.dtype}")
    return image


# ---------------------------------------------------------------- their server, our rollouts


class OpenpiPolicy:
    """A policy behind an openpi server, for `octo_like.robot.rollout.evaluate` and the wrappers.

    Attributes:
      batch_spec: one frame, the cameras of `keys` at `image_size`.
      metadata: what the server says of itself.
      statistics: empty: actions come in physical units.

    Args:
      keys: of the robot.
      image_size: (height, width) in which pictures are sent.
      action_horizon: length H of the server's chunks.
      action_dim: their width A.
      api_key: sent as `Authorization: Api-Key`.
      timeout: seconds to wait for the connection and each answer.
    """

    def __init__(
        self,
        address: str,
        keys: Keys,
        *,
        action_horizon: int,
        action_dim: int,
        image_size: tuple[int, int] = (224, 224),
        proprio_dim: int | None = None,
        api_key: str | None = None,
        timeout: float = 60.0,
    ):
        from websockets.sync.client import connect

        headers = None if api_key is None else {"Authorization": f"Api-Key {api_key}"}
        uri = address if address.startswith("ws") else f"ws://{address}"
        wire: dict[str, Any] = dict(compression=None, max_size=None, open_timeout=timeout, proxy=None)
        self._open = contextlib.ExitStack()
        self._connection = self._open.enter_context(connect(uri, additional_headers=headers, **wire))
        self.keys, self.timeout = keys, timeout
        hello = self._connection.recv(timeout)
        if isinstance(hello, str):
            raise RuntimeError(f"the openpi server refused:\n{hello}")
        self.metadata = unpack(hello)
        self.batch_spec = BatchSpec(
            window_size=1,
            action_horizon=action_horizon,
            action_dim=action_dim,
            image_sizes={slot: image_size for slot in keys.images.values()},
            resize="letterbox",  # as their own clients send them
            proprio_dim=proprio_dim,
            language_length=1,
        )
        self.statistics: dict[str, Any] = {}

    def create_tasks(self, texts: Sequence[str]) -> dict[str, Any]:
        return {"texts": np.array(list(texts), object)}

    def sample_actions(
        self, observations: Mapping[str, Any], tasks: Any, *, rng: Any, unnormalize: str | None = None
    ) -> np.ndarray:
        """Actions (B, H, A): one request after the other. `rng` stays here: the server draws by itself."""
        chunks = [self.infer(row, text) for row, text in zip(_rows(observations), tasks["texts"], strict=True)]
        return np.stack(chunks)

    def infer(self, observation: Mapping[str, np.ndarray], prompt: str) -> np.ndarray:
        """Actions (H, A) for one frame of the policy's keys.

        Raises:
          RuntimeError: the server's error. ValueError: a camera is missing, or the actions are no chunk of numbers.
        """
        message: dict[str, Any] = {self.keys.prompt: prompt}
        for key, slot in self.keys.images.items():
            if f"image_{slot}" not in observation:
                raise ValueError(f"the observation lacks image_{slot}; got {', '.join(sorted(observation))}")
            message[key] = np.ascontiguousarray(observation[f"image_{slot}"])
        if self.keys.state and "proprio" in observation:
            message |= self._state(np.asarray(observation["proprio"], np.float32))
        self._connection.send(pack(message))
        reply = self._connection.recv(self.timeout)
        if isinstance(reply, str):
            raise RuntimeError(f"the openpi server failed:\n{reply}")
        actions = np.asarray(unpack(reply)["actions"], np.float32)
        if actions.ndim != 2 or not np.isfinite(actions).all():
            raise ValueError(f"expected finite actions (H, A), got {actions.shape}")
        return actions

    def _state(self, proprio: np.ndarray) -> dict[str, np.ndarray]:
        # DROID's last number is the gripper; a robot with one key sends everything under it.
        *most, last = self.keys.state
        if not most:
            return {last: proprio}
        return {most[0]: proprio[:-1], last: proprio[-1:]}

    def close(self) -> None:
        self._open.close()


def _rows(observations: Mapping[str, Any]) -> list[dict[str, np.ndarray]]:
    """The last frame of each row."""
    keys = [key for key in observations if key.startswith("image_") or key == "proprio"]
    batch = len(observations["timestep_pad_mask"])
    return [{key: np.asarray(observations[key])[row, -1] for key in keys} for row in range(batch)]
