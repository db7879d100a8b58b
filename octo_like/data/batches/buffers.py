"""Large arrays that are used again once nobody holds them.

The images of a batch are tens of megabytes. Taken fresh from the system, each page of them is cleared by the kernel
before it is written, which costs a tenth of what decoding them costs.
"""

import sys
import threading

import numpy as np


def _count_of_unused() -> int:
    """What `sys.getrefcount` says, in the loop of `Buffers.take`, of an array that only its list holds."""
    arrays = [np.empty(1)]
    for array in arrays:
        return sys.getrefcount(array)
    raise AssertionError


class Buffers:
    """Lends arrays. One is lent again when nothing refers to it any more: no variable, no view, no buffer of JAX or
    TensorFlow that shares its memory, all of which hold a reference to the array.

    Args:
      most: arrays to keep of each shape and type. What is lent beyond that belongs to the borrower alone.
    """

    _UNUSED = _count_of_unused()

    def __init__(self, most: int):
        self._most = most
        self._lock = threading.Lock()
        self._arrays: dict[tuple[tuple[int, ...], np.dtype], list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...], dtype: np.typing.DTypeLike) -> np.ndarray:
        """An array with anything in it."""
        with self._lock:
            arrays = self._arrays.setdefault((shape, np.dtype(dtype)), [])
            for array in arrays:
                if sys.getrefcount(array) == self._UNUSED:
                    return array
            fresh = np.empty(shape, dtype)
            if len(arrays) < self._most:
                arrays.append(fresh)
            return fresh
