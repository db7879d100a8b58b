"""What an action vocabulary does to chunks: how many tokens they take, what is clipped, what comes back."""

import dataclasses
from collections.abc import Mapping

import numpy as np

from octo_like.common.fast import FastError, FastVocabulary


@dataclasses.dataclass(frozen=True)
class Measured:
    """What a vocabulary does to some chunks.

    Attributes:
      chunks: how many there are.
      mean_tokens, median_tokens, p99_tokens, max_tokens: of a chunk.
      compression: H * A numbers for so many tokens, H * A / mean_tokens.
      clipped: share of the coefficients that are outside of the vocabulary's range.
      rms_error, max_error: of the decoded actions, in normalised units.
    """

    chunks: int
    mean_tokens: float
    median_tokens: int
    p99_tokens: int
    max_tokens: int
    compression: float
    clipped: float
    rms_error: float
    max_error: float


def measure(vocabulary: FastVocabulary, chunks: np.ndarray) -> Measured:
    """Tokens, clipping and round-trip errors of chunks (N, H, A), N at least 1; `max_tokens` does not matter here."""
    if not len(chunks):
        raise FastError("there are no chunks to measure a vocabulary with")
    whole = dataclasses.replace(vocabulary, max_tokens=0)
    ids, lengths = whole.encode(chunks)
    error = np.abs(whole.decode(ids)[0] - np.asarray(chunks, np.float64))
    p50, p99 = np.percentile(lengths, (50, 99), method="inverted_cdf").tolist()
    return Measured(
        chunks=len(chunks),
        mean_tokens=float(lengths.mean()),
        median_tokens=p50,
        p99_tokens=p99,
        max_tokens=int(lengths.max()),
        compression=whole.num_coefficients / float(lengths.mean()),
        clipped=float(whole.clipped(chunks).mean() / whole.num_coefficients),
        rms_error=float(np.sqrt(np.square(error).mean())),
        max_error=float(error.max()),
    )


def describe(vocabulary: FastVocabulary) -> str:
    """Two lines: what the tokens are, and how exact they can be."""
    lengths = vocabulary.piece_lengths[1:]
    bound = 0.5 * np.sqrt(vocabulary.horizon) / vocabulary.scale
    return (
        f"{vocabulary.vocab_size:,} tokens: padding, {vocabulary.letters:,} integers from {vocabulary.minimum} to "
        f"{vocabulary.maximum}, {int((lengths > 1).sum()):,} of 2 to {lengths.max()} integers\n"
        f"scale {vocabulary.scale:g}: a dimension's actions come back within {bound:.3g} (L2 norm over the chunk, "
        f"normalised units) where nothing is clipped; max_tokens {vocabulary.max_tokens}"
    )


def table(measured: Mapping[str, Measured]) -> str:
    """One line for each of several sets of chunks."""
    width = max(map(len, measured))
    head = "chunks  tokens mean   p50   p99   max  numbers/token  clipped  error rms     max"
    rows = [
        f"{name:{width}}  {one.chunks:8,}  {one.mean_tokens:11.1f} {one.median_tokens:5} {one.p99_tokens:5} "
        f"{one.max_tokens:5}  {one.compression:13.1f}  {one.clipped:7.1e}  {one.rms_error:9.4f}  {one.max_error:6.3f}"
        for name, one in measured.items()
    ]
    return "\n".join([" " * (width + 4) + head, *rows])
