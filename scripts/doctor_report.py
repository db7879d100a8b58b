"""The report of `doctor.py`: rows of what was found, gathered from all processes, as a table."""

import contextlib
import dataclasses
import json
import socket
import sys
import time
from collections.abc import Callable

CLOCK_SECONDS = 30  # a token is refused when the clock is minutes off, and logs of hosts are hard to merge
ORDER = ("OK", "WARN", "FAIL")


@dataclasses.dataclass(frozen=True)
class Row:
    """One line of the report: what was looked at, OK / WARN / FAIL, what was found, and what to do about it."""

    check: str
    status: str
    finding: str
    remedy: str = ""


class Report:
    """Collects rows. `row(check, True)` is OK; anything else says what is wrong and what to do."""

    def __init__(self):
        self.rows: list[Row] = []

    def ok(self, check: str, finding: str) -> None:
        self.rows.append(Row(check, "OK", finding))

    def warn(self, check: str, finding: str, remedy: str) -> None:
        self.rows.append(Row(check, "WARN", finding, remedy))

    def fail(self, check: str, finding: str, remedy: str) -> None:
        self.rows.append(Row(check, "FAIL", finding, remedy))

    def attempt(self, check: str, function: Callable[..., None], *args) -> None:
        """Runs one check. Whatever it raises is its finding: a doctor does not stop at the first illness."""
        try:
            with contextlib.redirect_stdout(sys.stderr):  # what libraries print is not part of the report
                function(self, *args)
        except Exception as error:  # noqa: BLE001
            text = " ".join(str(error).split())
            self.fail(check, f"{type(error).__name__}: {text[:300]}", "see docs/tpu.md, Troubleshooting")


def gather(rows: list[Row]) -> list[Row]:
    """The rows of all processes as one list: the worst finding of each check, with the hosts it is from."""
    import jax
    import numpy as np
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return rows
    # Whole seconds: the clocks are read within one exchange, and x32 has no room for more.
    now = multihost_utils.process_allgather(np.array([int(time.time())], np.int32)).ravel()
    mine = {"host": socket.gethostname(), "rows": [dataclasses.astuple(row) for row in rows]}
    text = json.dumps(mine).encode()
    longest = int(multihost_utils.process_allgather(np.array([len(text)], np.int32)).max())
    padded = np.frombuffer(text.ljust(longest), np.uint8)
    everyone = [json.loads(bytes(line)) for line in multihost_utils.process_allgather(padded)]
    merged = merge(everyone)
    apart = int(now.max() - now.min())
    if apart > CLOCK_SECONDS:
        merged.append(Row("clocks", "FAIL", f"hosts are {apart} s apart", "sudo systemctl restart systemd-timesyncd"))
    return merged


def merge(everyone: list[dict]) -> list[Row]:
    """One row per check and status among {"host": name, "rows": [...]}: hosts that agree in status are one line."""
    groups: dict[tuple[str, str], list[tuple[str, Row]]] = {}
    for one in everyone:
        for fields in one["rows"]:
            row = Row(*fields)
            groups.setdefault((row.check, row.status), []).append((one["host"], row))
    checks = list(dict.fromkeys(check for check, _ in groups))
    merged = []
    for check in checks:
        for status in ORDER:
            members = groups.get((check, status))
            if not members:
                continue
            hosts = [host for host, _ in members]
            where = f"all {len(hosts)} hosts" if len(hosts) == len(everyone) else ", ".join(sorted(set(hosts))[:8])
            row = members[0][1]
            merged.append(dataclasses.replace(row, finding=f"{where}: {row.finding}"))
    return merged


def show(rows: list[Row]) -> None:
    width = max(len(row.check) for row in rows)
    for row in rows:
        print(f"{row.status:4}  {row.check:{width}}  {row.finding}")
        if row.remedy:
            print(f"{'':4}  {'':{width}}  -> {row.remedy}")
    count = {status: sum(row.status == status for row in rows) for status in ORDER}
    verdict = "This machine can train." if not count["FAIL"] else "Not ready."
    print(f"{verdict} {count['OK']} OK, {count['WARN']} warnings, {count['FAIL']} failures")
