"""TensorFlow, set up as the host side of a JAX program: no accelerator, few threads, no chatter.

The data room imports TensorFlow from here, and only the data room imports it at all.
"""

import logging
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
# Reading from gs:// fetches this much ahead with every file that is opened, 64 MB unless told. Episodes are read one by
# one, at their offsets: anything beyond them would be fetched and thrown away.
os.environ.setdefault("GCS_READ_CACHE_BLOCK_SIZE_MB", "1")

import tensorflow as tf  # noqa: E402

# Training shares the host's cores; the stream has its own few threads and calls TensorFlow from them.
INTER_OP_THREADS = int(os.environ.get("OCTO_LIKE_TF_THREADS", min(4, os.cpu_count() or 1)))

try:
    # A visible GPU would be filled by TensorFlow before JAX gets to it.
    tf.config.set_visible_devices([], "GPU")
    tf.config.set_visible_devices([], "TPU")
    tf.config.threading.set_intra_op_parallelism_threads(1)
    tf.config.threading.set_inter_op_parallelism_threads(INTER_OP_THREADS)
except RuntimeError:
    # The program has already used TensorFlow: its settings stand.
    pass

# Every dataset has a function of its own; TensorFlow takes them for one that is traced again and again.
logging.getLogger("tensorflow").addFilter(lambda record: "triggered tf.function retracing" not in record.getMessage())

__all__ = ["tf"]
