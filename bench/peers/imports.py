"""The CPU time of an import: python -m bench.peers.imports "starlette, msgspec"

Prints seconds, without those that Python itself needs to start.
"""

import importlib
import sys
import time

if __name__ == "__main__":
    began_s = time.process_time()
    for name in sys.argv[1].split(", "):
        importlib.import_module(name)
    print(time.process_time() - began_s)
