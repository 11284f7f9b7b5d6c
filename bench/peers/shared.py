"""What all servers written by hand share, whatever their framework. Imports nothing, so that it costs nothing."""

import gc

NAP = "Sleep, then return the time, so that a client on the same machine knows how old the result is."
WRITE = "Write pieces of text, each of which is the time at which it was written."
#: The agents of ``bench/agents.py``, for ``GET /agents``.
DESCRIPTIONS = {"add": "", "nap": NAP, "repeat": "", "ask": "", "write": WRITE, "judge": "", "review": ""}


def tune_gc() -> None:
    """Configure the garbage collector like ``flockapi serve``, so that nobody has an advantage."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(2_000, 0, 15_000)
