"""Python's own csv over one file: python -m bench.peers.csvs FILE

Prints the seconds that ``DictReader`` needs to read it, ``DictWriter`` to write it, and the CPU time of the first.
"""

import csv
import io
import sys
import time
from pathlib import Path


def main(path: str) -> None:
    text = Path(path).read_bytes().decode()
    began, began_cpu_s = time.perf_counter(), time.process_time()
    rows = list(csv.DictReader(io.StringIO(text, newline="")))
    read_s, read_cpu_s = time.perf_counter() - began, time.process_time() - began_cpu_s
    began = time.perf_counter()
    writer = csv.DictWriter(file := io.StringIO(newline=""), rows[0].keys())
    writer.writeheader()
    writer.writerows(rows)
    file.getvalue().encode()
    print(read_s, time.perf_counter() - began, read_cpu_s)


if __name__ == "__main__":
    main(sys.argv[1])
