"""Keyed hashing: every random choice of the data is a pure function of what it is about. NumPy only."""

import hashlib

import numpy as np

_SWAP_ROUNDS = 24


def _mix(x: np.ndarray) -> np.ndarray:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014): a bijection of 64-bit words that mixes all bits."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def hash_key(*parts: int | str | np.ndarray) -> np.ndarray:
    """64-bit hash of a tuple of strings, integers and integer arrays (broadcast together). Returns uint64."""
    return extended_key(np.zeros((), np.uint64), *parts)


def extended_key(key: np.ndarray, *parts: int | str | np.ndarray) -> np.ndarray:
    """The hash of a longer tuple, from that of its beginning: hash_key(a, b, c) is extended_key(hash_key(a, b), c)."""
    with np.errstate(over="ignore"):
        for part in parts:
            if isinstance(part, str):
                part = int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "little")
            if isinstance(part, int):
                part = np.asarray(part & 0xFFFFFFFFFFFFFFFF, np.uint64)
            word = np.asarray(part).astype(np.uint64)
            key = _mix(key * np.uint64(0x9E3779B97F4A7C15) + _mix(word + np.uint64(0x9E3779B97F4A7C15)))
    return key


def uniform(key: np.ndarray, purpose: str) -> np.ndarray:
    """Uniform draws in [0, 1), float64, one per 64-bit key, independent between purposes."""
    return (hash_key(purpose, key) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def permutation(size: int, *key: int | str | np.ndarray) -> np.ndarray:
    """A keyed permutation of range(size), int64."""
    return np.argsort(hash_key(*key, np.arange(size)), kind="stable")


def shuffled(position: np.ndarray, size: np.ndarray | int, key: np.ndarray) -> np.ndarray:
    """Where keyed permutations of range(size) put `position`, int64: one look-up each, however large the size.

    The swap-or-not shuffle of Hoang, Morris and Rogaway (2012): each round pairs every x with (pivot - x) mod size and
    swaps the two, or not, by a keyed bit of the larger of them.

    Args:
      position: (N,) integers in [0, size). size: (N,) or scalar. key: (N,) or scalar uint64; equal keys and sizes make
        one permutation.
    """
    size = np.asarray(size).astype(np.uint64)
    x = np.asarray(position).astype(np.uint64)
    with np.errstate(over="ignore"):
        for number in range(1, _SWAP_ROUNDS + 1):
            word = _mix(key + np.uint64(number * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF))
            partner = (word % size + size - x) % size
            swap = _mix(word + np.maximum(x, partner) * np.uint64(0xD6E8FEB86659FD93)) >> np.uint64(63)
            x = np.where(swap == 1, partner, x)
    return x.astype(np.int64)
