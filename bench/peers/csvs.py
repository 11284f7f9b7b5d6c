"""Python's own csv over one file: python -m bench.peers.csvs FILE

Prints the seconds that ``DictReader`` needs to read it, and ``DictWriter`` to write it.
"""

import csv
import io
import sys
import time
from pathlib import Path


def main(path: str) -> None:
    text = Path(path).read_bytes().decode()
    began = time.perf_counter()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    read_s = time.perf_counter() - began
    began = time.perf_counter()
    writer = csv.DictWriter(file := io.StringIO(newline=""), rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    file.getvalue().encode()
    print(read_s, time.perf_counter() - began)


if __name__ == "__main__":
    main(sys.argv[1])
