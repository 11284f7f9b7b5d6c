"""Memory does not grow with the rows of a table: the command with one of each format, as rows and as results.

    python -m tests.flat_memory --rows 100000 1000000
    python -m tests.flat_memory --rows 100000 300000 --formats tsv json --limit 1000

All rows are read, stored and written. With --limit, only some are executed, which does not depend on the format. It
prints the most memory that the command had, and ends with an error if the longest table took much more than the
shortest. "xlsx" is only results. "xlsx-in" is only rows, which are held in part, so it may grow by 100 bytes for each;
see docs/formats.md.
"""

import argparse
import csv
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path
from typing import Any

from tests.images_once import peak_of
from tests.support import ROOT
from tests.support.servers import NO_COVERAGE, flockapi_command

FORMATS = ("csv", "tsv", "ndjson", "json", "parquet", "xlsx", "xlsx-in")
#: The formats of the rows and of the results, if they are not the same.
PAIRS = {"xlsx": ("csv", "xlsx"), "xlsx-in": ("xlsx", "csv")}
TARGET = """
from flock.core import Flock

flock = Flock("flat")

@flock.agent
async def length(number: int, text: str) -> int:
    return len(text)
"""
#: What the memory of a process varies by, in MB. pyarrow keeps some for each thread that calls it.
MAX_GROWTH_MB, MAX_GROWTH_OF_MB = 15, {"parquet": 40}
#: What may be held of each row, in bytes.
HELD_BYTES = {"xlsx-in": 100}


def table_rows(count: int) -> Iterator[dict[str, Any]]:
    """Yield rows of about 100 bytes that are all different."""
    return ({"number": number, "text": f"row {number}, " + 80 * "x"} for number in range(count))


def write_table(path: Path, format_: str, count: int) -> None:
    rows = table_rows(count)
    if format_ == "parquet":
        import pyarrow
        from pyarrow.parquet import ParquetWriter

        schema = pyarrow.schema({"number": pyarrow.int64(), "text": pyarrow.string()})
        with ParquetWriter(path, schema) as writer:
            while part := list(islice(rows, 10_000)):
                writer.write_table(pyarrow.Table.from_pylist(part, schema))
        return
    if format_ == "xlsx":
        from xlsxwriter import Workbook

        with Workbook(path, {"constant_memory": True}) as book:
            sheet = book.add_worksheet()
            for at, row in enumerate(chain([{"number": "number", "text": "text"}], rows)):
                sheet.write_row(at, 0, row.values())
        return
    with path.open("w", newline="") as file:
        if format_ in ("csv", "tsv"):
            table = csv.DictWriter(file, ["number", "text"], delimiter="\t" if format_ == "tsv" else ",")
            table.writeheader()
            table.writerows(rows)
            return
        begin, separator, end = ("[", ",\n", "]\n") if format_ == "json" else ("", "\n", "\n")
        for number, row in enumerate(rows):
            file.write((separator if number else begin) + json.dumps(row))
        file.write(end)


def peak_with(folder: Path, format_: str, count: int, limit: int) -> int:
    """Return the most memory that the command had with a table of *count* rows, in MB."""
    source, target = PAIRS.get(format_, (format_, format_))
    (folder / "target.py").write_text(TARGET)
    write_table(folder / f"rows.{source}", source, count)
    options = "--progress none --max-workers 100 --limit".split()
    arguments = ["target.py", "length", f"rows.{source}", "-o", f"out.{target}", *options, str(limit)]
    env, began_at = {**os.environ, **NO_COVERAGE, "PYTHONPATH": str(ROOT)}, time.monotonic()
    command = flockapi_command("batch", *arguments)
    with subprocess.Popen(command, cwd=folder, env=env, stderr=subprocess.DEVNULL) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, peak_of(process.pid))
            time.sleep(0.1)
    assert process.returncode == 0, format_
    assert (folder / f"out.{target}").stat().st_size > count
    print(f"{format_:8} {count:>10,} rows  {peak:5} MB  {time.monotonic() - began_at:5.0f} s", flush=True)
    return peak


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[100_000, 1_000_000])
    parser.add_argument("--formats", nargs="+", choices=FORMATS, default=FORMATS)
    parser.add_argument("--limit", type=int, default=10**9)
    given = parser.parse_args()
    grown = []
    for name in given.formats:
        peaks = []
        for rows in given.rows:
            with tempfile.TemporaryDirectory() as made:
                peaks.append(peak_with(Path(made), name, rows, given.limit))
        held_mb = HELD_BYTES.get(name, 0) * (given.rows[-1] - given.rows[0]) / 1_000_000
        most_mb = peaks[0] + MAX_GROWTH_OF_MB.get(name, MAX_GROWTH_MB) + held_mb
        grown += [name] if peaks[-1] > most_mb else []
    assert not grown, f"The memory grows with the rows of {', '.join(grown)}."
