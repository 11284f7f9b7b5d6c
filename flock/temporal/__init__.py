"""The same API on more than one machine: runs are workflows on a Temporal cluster, and workers carry them out."""

from flock.extras import pip_install

try:
    import temporalio  # noqa: F401 - to say what is missing
except ImportError as exc:
    raise ImportError(f"Runs on a Temporal cluster need temporalio: {pip_install('temporalio')}") from exc

from flock.temporal.engine import TemporalEngine
from flock.temporal.worker import TemporalWorker

__all__ = ["TemporalEngine", "TemporalWorker"]
