"""Reports for people: findings, tables as text, and self-contained HTML pages. Standard library only."""

import base64
import dataclasses
import html
from collections.abc import Sequence

# On a phone: wide tables and texts scroll by themselves, nothing else is wider than the page, and margins are small.
STYLE = (
    "body{font:14px sans-serif;margin:2em;overflow-wrap:anywhere}table{border-collapse:collapse;display:block;"
    "overflow-x:auto;overflow-wrap:normal}td,th{padding:2px 8px;text-align:right;border-bottom:1px solid #ccc}"
    "td:first-child,th:first-child{text-align:left}img{max-width:100%}pre{overflow-x:auto}"
    "@media(max-width:600px){body{margin:.8em}td,th{padding:2px 5px;font-size:13px}pre{font-size:12px}}"
)
_FINDINGS = (
    "ul.findings{list-style:none;padding:0}.findings li{padding:6px 10px;margin:4px 0;border-left:5px solid #888;"
    "background:#f6f6f6}.findings li.warn{border-color:#d1242f;background:#fff1f0}"
    ".findings li.good{border-color:#1a7f37}"
)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that was found.

    Attributes:
      code: short name of the check.
      message: what, where, and what to do.
      warning: False for a note.
    """

    code: str
    message: str
    warning: bool = True

    def __str__(self) -> str:
        return f"{'WARNING' if self.warning else 'note'} {self.code}: {self.message}"


def text_table(rows: list[list[str]]) -> str:
    """Rows of text in columns; the first is the header."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join([row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:], widths[1:], strict=True))])
             for row in rows]  # fmt: skip
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def html_document(title: str, sections: Sequence[tuple[str, str]]) -> str:
    """A page of (heading, HTML) sections."""
    title = html.escape(title)
    parts = [
        '<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}{_FINDINGS}</style><h1>{title}</h1>"
    ]
    parts += [(f"<h2>{html.escape(heading)}</h2>" if heading else "") + body for heading, body in sections]
    return "\n".join(parts) + "\n"


def html_text(text: str) -> str:
    return f"<pre>{html.escape(text)}</pre>"


def html_table(rows: Sequence[Sequence[str]]) -> str:
    """The first row is the header."""
    cells = ["".join(f"<{tag}>{html.escape(str(cell))}</{tag}>" for cell in row)
             for tag, row in [("th", rows[0]), *(("td", row) for row in rows[1:])]]  # fmt: skip
    return "<table>" + "".join(f"<tr>{row}</tr>" for row in cells) + "</table>"


def html_picture(path: str) -> str:
    """A PNG put into the page."""
    with open(path, "rb") as file:
        content = base64.b64encode(file.read()).decode()
    return f'<p><img alt="" src="data:image/png;base64,{content}">'


def html_findings(findings: Sequence[Finding]) -> str:
    """Findings as a list; says so when there are no warnings."""
    lines = [
        f"<li class={'warn' if f.warning else 'note'}><b>{html.escape(f.code)}</b> {html.escape(f.message)}"
        for f in findings
    ]
    if not any(finding.warning for finding in findings):
        lines.insert(0, "<li class=good>no warnings")
    return f"<ul class=findings>{''.join(lines)}</ul>"


def findings_text(findings: Sequence[Finding]) -> str:
    """One line per finding, and how many warnings there are."""
    warnings = sum(finding.warning for finding in findings)
    return "\n".join([*map(str, findings), f"{warnings} warning(s)" if warnings else "no warnings"])
