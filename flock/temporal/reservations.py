"""Marker workflows, which reserve an id: that of an idempotency key, or of a deleted run or batch.

While a marker is open, no other workflow can have its id. It only waits, which needs no worker.
"""

import hashlib
import time
from collections.abc import Mapping
from datetime import timedelta
from typing import Any

from temporalio.client import WorkflowExecutionStatus
from temporalio.exceptions import WorkflowAlreadyStartedError

from flock.engine.base import KEEP_KEYS_FOR
from flock.errors import KeyReused
from flock.runs import IdempotencyKey
from flock.temporal.batchflows import FlockDelete
from flock.temporal.cluster import Cluster
from flock.temporal.messages import DeleteOrder
from flock.temporal.workflows import FlockMark

#: How long the marker of a deletion stays open. It marks the deletion until its own retention ends.
KEEP_DELETED_FOR = timedelta(hours=1)


class Reservations:
    """The markers of one flock."""

    def __init__(self, cluster: Cluster, flock: str) -> None:
        self._cluster = cluster
        self._flock = flock

    def key_id(self, key: IdempotencyKey) -> str:
        return "key:" + hashlib.sha256(f"{self._flock}\n{key.scoped_key}".encode()).hexdigest()

    async def claim(self, key: IdempotencyKey, made_id: str, keep_for: timedelta = KEEP_KEYS_FOR) -> str:
        """Return the id for *key*: *made_id*, or that of an earlier claim. Raises KeyReused."""
        mine = {"run_id": made_id, "fingerprint": key.digest.hex()}
        if await self._start(FlockMark.run, self.key_id(key), start_delay=keep_for, memo=mine):
            return made_id
        return await self.find(key) or made_id

    async def find(self, key: IdempotencyKey) -> str | None:
        """Return the id for *key*, or None if the key is not claimed. Raises KeyReused."""
        memo = await self._memo_of(key)
        if memo is None:
            return None
        if memo["fingerprint"] != key.digest.hex():
            raise KeyReused(key.key)
        return memo["run_id"]

    async def made_by(self, key: IdempotencyKey) -> str | None:
        """Return the id for *key*, whatever its request was, or None if it is not claimed."""
        memo = await self._memo_of(key)
        return None if memo is None else memo["run_id"]

    async def _memo_of(self, key: IdempotencyKey) -> Mapping[str, str] | None:
        described = await self._cluster.describe(self.key_id(key))
        if described is None or described.status is not WorkflowExecutionStatus.RUNNING:  # released, or expired
            return None
        return await described.memo()

    async def release(self, key_id: str | None, made_id: str) -> None:
        """Release a key, unless another id has claimed it since *made_id* did."""
        if key_id is None:
            return
        async with self._cluster.rpc_scope(missing_ok=True):  # it was released, or has expired
            described = await self._cluster.handle(key_id).describe()
            if (await described.memo())["run_id"] == made_id:
                await self._cluster.handle(key_id, described.run_id).terminate()

    async def mark_deleted(self, id_: str) -> bool:
        """Mark a run as deleted. Returns False if it was marked before."""
        return await self._start(FlockMark.run, f"gone:{id_}", start_delay=KEEP_DELETED_FOR)

    async def delete_batch(self, batch_id: str, chunks: int, rows_of: str | None = None) -> bool:
        """Mark a batch as deleted, and have workers delete its workflows. Returns False if it was marked before."""
        keep_mark_s = KEEP_DELETED_FOR.total_seconds()
        order = DeleteOrder(batch_id=batch_id, chunks=chunks, keep_mark_s=keep_mark_s, rows_of=rows_of, at=time.time())
        return await self._start(FlockDelete.run, f"gone:{batch_id}", order)

    async def is_deleted(self, id_: str) -> bool:
        return await self._cluster.describe(f"gone:{id_}") is not None

    async def _start(self, workflow: Any, id_: str, *order: DeleteOrder, **options: Any) -> bool:
        """Start a marker, or the deletion of a batch, which is one too. Returns False if there is one with this id."""
        try:
            await self._cluster.start_workflow(workflow, *order, flock=self._flock, id=id_, **options)
        except WorkflowAlreadyStartedError:
            return False
        return True
