"""The robot's side of an octo_like policy server: NumPy, Pillow, msgpack and websockets, no JAX. Python 3.9 or newer.

The other modules are made from those of `octo_like` when this package is built (setup.py); change them there.
"""

from octo_like_client.chunking import Plan
from octo_like_client.client import PolicyClient, PolicyServerError
from octo_like_client.executor import AsyncExecutor, ExecutorStopped
from octo_like_client.history import History
from octo_like_client.images import resize_image, resize_images
from octo_like_client.loop import drive, drive_async
from octo_like_client.safety import ActionFilter, UnknownKind, UnsafeAction
from octo_like_client.version import __version__

__all__ = [
    "ActionFilter",
    "AsyncExecutor",
    "ExecutorStopped",
    "History",
    "Plan",
    "PolicyClient",
    "PolicyServerError",
    "UnknownKind",
    "UnsafeAction",
    "__version__",
    "drive",
    "drive_async",
    "resize_image",
    "resize_images",
]
