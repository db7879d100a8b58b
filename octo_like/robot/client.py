"""The robot's side of the policy server: NumPy, msgpack and websockets, no JAX.

with PolicyClient("gpu-box", 8000) as policy:
    policy.reset(seed=0)
    while running:
        actions = policy.act({"image_primary": frame, "proprio": joints}, "put the cup on the plate")   # (H, A)
        for action in actions[:4]:
            robot.execute(action)
            policy.observe({"image_primary": frame, "proprio": joints})   # all but the last: `act` brings that one
"""

import contextlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from octo_like.robot.history import History
from octo_like.robot.images import resize_images
from octo_like.robot.messages import MAX_MESSAGE_BYTES, PROTOCOL, pack, unpack


class PolicyServerError(RuntimeError):
    """The server could not answer a request; the message is the server's. The connection stays usable."""


class PolicyClient:
    """A connection to a `PolicyServer`; it keeps the window of observations and resizes images.

    Attributes:
      metadata: what the server says of its policy: `spec` (text), `batch_spec`, `statistics` (names), `action_names`.

    Args:
      host, port: of the server.
      timeout: seconds to wait for the connection and for each answer (TimeoutError after that).
    """

    def __init__(self, host: str = "127.0.0.1", port: int = 8000, timeout: float = 30.0):
        # Imported here and not at the top: only the two ends of the wire need the package.
        try:
            from websockets.sync.client import connect
        except ImportError as error:
            raise ImportError("talking to a policy server needs websockets: pip install 'octo_like[serve]'") from error
        self.timeout = timeout
        self._open = contextlib.ExitStack()
        self._connection = self._open.enter_context(
            connect(
                f"ws://{host}:{port}", compression=None, max_size=MAX_MESSAGE_BYTES, open_timeout=timeout, proxy=None
            )
        )
        self.metadata = unpack(self._connection.recv(timeout))
        if not isinstance(self.metadata, dict) or self.metadata.get("protocol") != PROTOCOL:
            self.close()
            raise PolicyServerError(f"the server at {host}:{port} does not speak protocol {PROTOCOL} of this client")
        spec = self.metadata["batch_spec"]
        self._sizes = {f"image_{slot}": tuple(size) for slot, size in spec["image_sizes"].items()}
        self._history = History(spec["window_size"])
        self.reset()

    def reset(self, seed: int = 0) -> None:
        """Starts an episode: forgets the observations; `seed` determines the policy's sampling noise."""
        self._history.reset()
        self._seed = seed

    def observe(self, observation: Mapping[str, Any]) -> None:
        """Adds an observation that no action is asked for, so that the policy's window has no gaps."""
        self._window = self._history.append(self._prepare(observation))

    def act(
        self,
        observation: Mapping[str, Any],
        instruction: str | None = None,
        *,
        goal: Mapping[str, np.ndarray] | None = None,
        unnormalize: str | None = None,
    ) -> np.ndarray:
        """The next actions (H, A) float32.

        Args:
          observation: one moment: `image_{slot}` (h, w, 3) uint8 of any size, `proprio` (P,) and other sensors in
            physical units.
          instruction: what to do, in words.
          goal: what it should look like: `image_{slot}` (h, w, 3) uint8.
          unnormalize: name of the statistics of the actions' units; the server's default when None.

        Raises:
          PolicyServerError: the server refused the request and says why.
        """
        self.observe(observation)
        request = {
            "type": "act",
            "observation": self._window,
            "instruction": instruction,
            "goal": None if goal is None else self._prepare(goal),
            "unnormalize": unnormalize,
            "seed": self._seed,
            "step": int(self._window["timestep"][-1]),
        }
        self._connection.send(pack(request))
        reply = unpack(self._connection.recv(self.timeout))
        if reply["type"] == "error":
            raise PolicyServerError(f"{reply['error']}: {reply['message']}")
        return reply["actions"]

    def _prepare(self, observation: Mapping[str, Any]) -> dict[str, np.ndarray]:
        return resize_images({key: np.asarray(value) for key, value in observation.items()}, self._sizes)

    def close(self) -> None:
        self._open.close()

    def __enter__(self) -> "PolicyClient":
        return self

    def __exit__(self, *_) -> None:
        self.close()
