"""TensorFlow, set up as the host side of a JAX program: no accelerator, few threads, no chatter.

The data room imports TensorFlow from here, and only the data room imports it at all. It is loaded when it is first
used: episodes that are in memory become batches on machines that do not have it.
"""

import importlib
import logging
import os
import re
from typing import TYPE_CHECKING, Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Reading from gs:// fetches this much ahead with every file that is opened, 64 MB unless told. Episodes are read one by
# one, at their offsets: anything beyond them would be fetched and thrown away.
os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", "1")

# Training shares the host's cores; the stream has its own few threads and calls TensorFlow from them.
INTER_OP_THREADS = int(os.environ.get("OCTO_LIKE_TF_THREADS", min(4, os.cpu_count() or 1)))


class _Lazily:
    """Stands for the module TensorFlow; the first thing that is looked up in it loads it."""

    def __getattr__(self, name: str) -> Any:
        module = _load()
        self.__dict__.update(vars(module))  # the next look-ups are those of the module
        return getattr(module, name)


def _load() -> Any:
    try:
        module = importlib.import_module("tensorflow")
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "TensorFlow is not installed: reading RLDS needs the extra `data` (pip install 'octo_like[data]'); "
            "episodes in memory (data.kind='memory') need none",
            name=error.name,
        ) from error
    try:
        # A visible GPU would be filled by TensorFlow before JAX gets to it.
        module.config.set_visible_devices([], "GPU")
        module.config.set_visible_devices([], "TPU")
        module.config.threading.set_intra_op_parallelism_threads(1)
        module.config.threading.set_inter_op_parallelism_threads(INTER_OP_THREADS)
    except RuntimeError:
        # The program has already used TensorFlow: its settings stand.
        pass
    # Every dataset has a function of its own; TensorFlow takes them for one that is traced again and again.
    retracing = "triggered tf.function retracing"
    logging.getLogger("tensorflow").addFilter(lambda record: retracing not in record.getMessage())
    return module


if TYPE_CHECKING:
    import tensorflow as tf
else:
    tf = _Lazily()

# Around what an operation says: the function, before or after; the node; the operation, and an empty name.
_SURROUNDINGS = re.compile(r"\{\{function_node .*?\}\}|\[\[.*?\]\]|\[Op:\w*\](\s*name:.*)?")


def error_text(error: Exception) -> str:
    """What an error of TensorFlow says, in one line, without the names of functions, nodes and operations around it."""
    text = str(getattr(error, "message", None) or error)
    lines = [line.strip() for line in _SURROUNDINGS.sub("\n", text).splitlines()]
    return next(filter(None, lines), type(error).__name__)


__all__ = ["error_text", "tf"]
