"""Into how many lanes the samples of a run are dealt, and which numbers of processes can therefore train it."""

import dataclasses
from collections.abc import Iterator

MAX_LANES = 1024
DEFAULT_AT_MOST = 384


@dataclasses.dataclass(frozen=True)
class Processes:
    """Which of the processes of a run this is. All follow the same order; each makes its own rows of every batch."""

    index: int = 0
    count: int = 1

    def __iter__(self) -> Iterator[int]:
        return iter((self.index, self.count))


ONE_PROCESS = Processes()


def divisors(number: int) -> list[int]:
    """All divisors, in rising order."""
    return [d for d in range(1, number + 1) if number % d == 0]


def default_lanes(batch_size: int) -> int:
    """Lanes of a run that names none: the divisor of the batch size with the most divisors, up to 384.

    Numbers of processes that divide the lanes can continue the run, so it is the choice that allows most of them: 256
    for 256, 512 or 2048, and 384, which all of 3, 12, 48 and 96 divide, for 1536. It depends on nothing but the batch
    size, so runs that are begun by different numbers of processes see the same samples.
    """
    return max((d for d in divisors(batch_size) if d <= DEFAULT_AT_MOST), key=lambda d: (len(divisors(d)), d))


def check_lanes(num_lanes: int | None, batch_size: int, process_count: int = 1) -> int:
    """The number of lanes, when so many processes can share it.

    Args:
      num_lanes: as configured; None: the default of the batch size.

    Raises:
      ValueError: lanes that do not divide the batch, or processes that do not divide the lanes; says what would.
    """
    lanes = default_lanes(batch_size) if num_lanes is None else num_lanes
    if batch_size < 1 or not 1 <= lanes <= MAX_LANES or batch_size % lanes:
        valid = [str(d) for d in divisors(max(batch_size, 1)) if d <= MAX_LANES]
        raise ValueError(
            f"the number of lanes must divide the batch size and be at most {MAX_LANES}; got {lanes} lanes and batch "
            f"size {batch_size}, which allows {', '.join(valid)}"
        )
    if lanes % process_count:
        possible = ", ".join(map(str, divisors(lanes)))
        message = f"{process_count} processes do not divide {lanes} lanes; possible numbers of processes: {possible}."
        others = [d for d in divisors(batch_size) if d <= MAX_LANES and d % process_count == 0]
        if others:
            message += f" A new run can have data.num_lanes={others[-1]}, which {process_count} divide"
        else:
            message += f" No lanes would do: {process_count} processes do not divide the batch of {batch_size}"
        raise ValueError(message)
    return lanes
