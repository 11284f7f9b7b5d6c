"""Retention: old runs and batches are deleted, and memory that was freed is given back."""

import gc
import logging
from collections import Counter
from collections.abc import Sized
from contextlib import AbstractContextManager, suppress
from datetime import timedelta

import anyio
import anyio.lowlevel

from flock.engine.base import KEEP_KEYS_FOR, KEEP_USAGE_FOR
from flock.engine.runner import counted
from flock.errors import StoreError
from flock.limits import Limits
from flock.runs import now
from flock.store.port import Store

logger = logging.getLogger("flock.runs")

#: How often old runs are deleted, in seconds, and how many of them in one transaction.
RETENTION_INTERVAL_S = 10.0
RETENTION_CHUNK_SIZE = 100


def _give_back() -> None:
    """Give freed memory back to the system. The C library of GNU keeps what lies below a block that is in use."""
    import ctypes  # 0.3 MB

    if gc.get_freeze_count():  # the server's own objects are not visited; another host collects by its own thresholds
        gc.collect()
    with suppress(AttributeError, TypeError):  # another C library, or Windows
        ctypes.CDLL(None).malloc_trim(0)


class Retention:
    """Deletes the old runs of *flock*, and gives back memory while none is *active*."""

    def __init__(self, store: Store, flock: str, limits: Limits, active: Sized) -> None:
        self._store, self._flock, self._limits, self._active = store, flock, limits, active
        #: runs and batches with a long result that is being sent, and how often it is
        self._kept: Counter[str] = Counter()

    def keeping(self, id_: str) -> AbstractContextManager[None]:
        """Keep a run or a batch inside the block."""
        return counted(self._kept, id_)

    async def apply(self) -> None:
        """Delete old runs and dropped items, in small chunks."""
        while True:
            with anyio.move_on_after(RETENTION_INTERVAL_S):
                await self._store.batches.dropped()
            try:
                await self._store.delete_old_keys(now() - KEEP_KEYS_FOR)
                await self._store.delete_old_usage(self._flock, now().date() - KEEP_USAGE_FOR)
                await self.delete_old()
                await self._store.delete_unused_files()
                while await self._store.batches.sweep():
                    await anyio.lowlevel.checkpoint()
            except StoreError:
                pass  # the store has logged it
            except Exception:
                logger.exception("old runs cannot be deleted")
            if not self._active:
                await anyio.to_thread.run_sync(_give_back)

    async def delete_old(self) -> None:
        """Delete final runs that are older than ``keep_for_s`` or beyond the newest ``keep_runs``.

        While this process is sending a long result of a run, the run is not deleted.
        """
        before = None if self._limits.keep_for_s is None else now() - timedelta(seconds=self._limits.keep_for_s)
        if before is None and self._limits.keep_runs is None:
            return
        bounds = (self._flock, before, self._limits.keep_runs, RETENTION_CHUNK_SIZE)
        while await self._store.delete_old(*bounds, self._kept.keys()):
            await anyio.lowlevel.checkpoint()
