"""Rows of figures as a Markdown table."""

import os
import platform
import statistics
from collections.abc import Iterable, Sequence
from datetime import date
from pathlib import Path

from bench.measures.bench import Figures, Row
from bench.servers import BARE, FASTAPI, FLOOR, KEY_AND_METRICS, LITESTAR, MEMORY, OURS, POWER, ROOT

#: The subjects that have a column, with its head.
COLUMNS = {
    FLOOR: "bare ASGI",
    BARE: "bare",
    FASTAPI: "FastAPI",
    LITESTAR: "Litestar",
    MEMORY: "in memory",
    POWER: "`power`",
    KEY_AND_METRICS: "`power`, key, metrics",
}


PAGE = ROOT / "docs" / "performance.md"


def write_part(module: str, text: str, page: Path = PAGE) -> None:
    """Replace what ``python -m`` *module* ``--write`` has written to a page, with the day and the machine."""
    begin, end = f"<!-- python -m {module} --write -->\n", f"<!-- end of {module} -->\n"
    machine = f"{os.cpu_count()} shared cores with Python {platform.python_version()}"
    before, _, rest = page.read_text("utf-8").partition(begin)
    after = rest.partition(end)[2]
    page.write_text(f"{before}{begin}\nOn {date.today()}, {machine}.\n\n{text.strip()}\n\n{end}{after}", "utf-8")


def median_ratio(figures: Figures, name: str, base: str) -> float:
    """Return the median of the ratios of two subjects in one round, which noise of the machine affects alike."""
    return statistics.median(one / other for one, other in zip(figures[name], figures[base], strict=True))


def markdown(rows: Iterable[Row]) -> str:
    rows = list(rows)
    columns = [name for name in COLUMNS if any(name in row.figures for row in rows)]
    lines = [["", *(COLUMNS[name] for name in columns)]]
    for row in rows:
        lines.append([row.title, *(cell(row, name) for name in columns)])
        lines += [ratio_line(row, base, columns) for base in row.bases[1:]]
    head, *rest = ["|".join(["", *(f" {text} " if text else " " for text in line), ""]) for line in lines]
    return "\n".join([head, f"|-|{'-:|' * len(columns)}", *rest, ""])


def cell(row: Row, name: str) -> str:
    """Return the median, and the median of the ratios to the first base in brackets."""
    if not row.figures.get(name):
        return ""
    text = number(statistics.median(row.figures[name]))
    base = row.bases[0] if row.bases else name
    return text if name == base or base not in row.figures else f"{text} ({ratio(row, name, base)})"


def ratio(row: Row, name: str, base: str) -> str:
    return f"{median_ratio(row.figures, name, base):.2f}"


def ratio_line(row: Row, base: str, columns: Sequence[str]) -> list[str]:
    """Return a row with the ratios of our servers to another base."""
    what = row.title.rpartition(",")[0]
    compared = OURS[OURS.index(base) + 1 :] if base in OURS else OURS
    cells = (ratio(row, name, base) if name in compared and name in row.figures else "" for name in columns)
    return [f"{what}, of {COLUMNS.get(base, base)}", *cells]


def number(value: float) -> str:
    """Return a figure with as many digits as it deserves."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.1f}" if abs(value) >= 10 else f"{value:.2f}"
