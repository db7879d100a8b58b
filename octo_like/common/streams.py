"""What a run asks of its stream of training batches, whatever makes them."""

from collections.abc import Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from octo_like.common.schema import BatchSpec, Tree


@runtime_checkable
class BatchStream(Protocol):
    """An endless iterator over this process's rows of the global batches, which can be sought.

    Attributes:
      batch_spec: schema of the batches.
      order_spec: JSON-able; determines every batch. A run may be resumed iff it is unchanged.
      statistics: {dataset: statistics}, see `octo_like.common.normalization`.
      dataset_names: name of each `dataset_id`.
    """

    batch_spec: BatchSpec
    order_spec: dict[str, Any]
    statistics: dict[str, Any]
    dataset_names: tuple[str, ...]

    @property
    def position(self) -> int:
        """Global number n of the next sample; always a multiple of the batch size."""
        ...

    @property
    def bad_counts(self) -> Mapping[str, int]:
        """{dataset: damaged records met since this stream was made}."""
        ...

    def __iter__(self) -> Iterator[Tree]: ...

    def __next__(self) -> Tree: ...

    def batch(self, number: int) -> Tree:
        """This process's rows of the global batch `number`. The position stays."""
        ...

    def seek(self, n: int) -> None:
        """Makes the batch that starts at global sample `n` the next one. Raises ValueError where none starts."""
        ...

    def adopt(self, saved: Mapping[str, Any]) -> None:
        """Takes over from a saved run's order spec what its first start derived, before a resume."""
        ...

    def memory_line(self) -> str:
        """What this process is going to take, in words."""
        ...

    def close(self) -> None:
        """Releases threads. The stream cannot be used afterwards."""
        ...
