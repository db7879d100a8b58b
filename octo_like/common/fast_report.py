"""What an action vocabulary does to chunks: how many tokens they take, what is clipped, what comes back."""

import dataclasses

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

    def __str__(self) -> str:
        return (
            f"{self.chunks:,} chunks: tokens mean {self.mean_tokens:.1f}, p50 {self.median_tokens}, "
            f"p99 {self.p99_tokens}, max {self.max_tokens}; {self.compression:.1f} numbers per token; clipped "
            f"{self.clipped:.2g} of the coefficients; round-trip error rms {self.rms_error:.4f}, "
            f"max {self.max_error:.4f} (normalised units)"
        )


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
