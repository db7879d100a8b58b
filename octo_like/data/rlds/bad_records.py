"""Records that cannot be read or used: how many of them a dataset may have, and how they are named."""

import os
from collections.abc import Sequence

from octo_like.data.rlds.cache_files import write_atomically
from octo_like.data.spec import DataError

MAX_BAD_FRACTION = 0.01
BAD_RECORDS = "bad_records.txt"
LISTED = 20  # bad records that an error names; of more there is a file
STOP_AFTER = 1000  # bad records beyond the limit after which a pass does not look for more


class TooManyBadRecords(DataError):
    """More of a dataset's records than `max_bad_fraction` cannot be read or used."""


def check(name: str, damaged: int, total: int, limit: float, names: str) -> None:
    """Raises TooManyBadRecords when more than `limit` of a dataset's records are bad; `names` lists them."""
    if damaged > limit * total:
        raise TooManyBadRecords(
            f"{names}\n{name}: {damaged} of {total} records are damaged or invalid, more than max_bad_fraction="
            f"{limit:g}; restore the files, leave them out with a filter, or allow more"
        )


def listed(damaged: Sequence[str], folder: str) -> str:
    """The first bad records, one a line, and where the others are named."""
    lines = list(damaged[:LISTED])
    if len(damaged) > LISTED:
        lines.append(f"and {len(damaged) - LISTED} more, listed in {os.path.join(folder, BAD_RECORDS)}")
    return "\n".join(lines)


def report(name: str, folder: str, damaged: Sequence[str], total: int, limit: float) -> None:
    """Writes a list of all bad records of a pass, if there are many. Raises TooManyBadRecords."""
    if len(damaged) > LISTED:
        write_atomically(os.path.join(folder, BAD_RECORDS), "".join(f"{line}\n" for line in damaged).encode())
    check(name, len(damaged), total, limit, listed(damaged, folder))
