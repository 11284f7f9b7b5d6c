"""Record the histories that tests replay: python -m tests.record_histories [WORD ...]

The workflows run on a development server, and their histories are written to ``tests/histories``. Histories of released
versions stay there, because later versions must replay them. With WORDs, only files with one of them in their names are
written.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

from flock.runs import BatchOptions, RunStatus
from flock.temporal import TemporalEngine
from flock.temporal.messages import batch_workflow_id, chunk_workflow_id, run_workflow_id, session_workflow_id
from tests.support.cluster import engine_with_worker, temporal_server
from tests.support.engines import ended, until
from tests.support.flocks import Work, numbers
from tests.support.servers import free_port

HISTORIES = Path(__file__).parent / "histories"


async def record(engine: TemporalEngine, name: str, workflow_id: str) -> None:
    if len(sys.argv) == 1 or any(word in name for word in sys.argv[1:]):
        history = await engine.cluster.client.get_workflow_handle(workflow_id).fetch_history()
        (HISTORIES / f"{name}.json").write_text(history.to_json() + "\n")


async def record_batches(engine: TemporalEngine, work: Work) -> None:
    work.fails.add(3)
    batch = await ended(engine, await engine.submit_batch("item", numbers(45), BatchOptions(max_workers=4)))
    await record(engine, "batch-completed", batch_workflow_id(batch.batch_id, 1))
    await record(engine, "chunk-completed-19-failed-1", chunk_workflow_id(batch.batch_id, 0, 1))
    work.fails.clear()
    batch = await ended(engine, await engine.retry_batch(batch.batch_id, [RunStatus.FAILED]))
    await record(engine, "batch-completed-by-a-retry", batch_workflow_id(batch.batch_id, 2))
    await record(engine, "chunk-completed-1", chunk_workflow_id(batch.batch_id, 0, 2))

    work.holds = True
    batch = await engine.submit_batch("item", numbers(45), BatchOptions(max_workers=4))
    await until(lambda: len(work.calls) == 50)
    (item,) = await engine.get_items(batch.batch_id, limit=1)
    await engine.cancel_run(item.run_id)
    await until(lambda: len(work.calls) == 51)
    await engine.cancel_batch(batch.batch_id)
    batch = await ended(engine, batch)
    await record(engine, "batch-cancelled", batch_workflow_id(batch.batch_id, 1))
    await record(engine, "chunk-cancelled-20", chunk_workflow_id(batch.batch_id, 0, 1))


async def record_sessions(engine: TemporalEngine, work: Work) -> None:
    """The second run waits for the first, and the third is cancelled while it waits."""
    work.holds = True
    runs = [await engine.submit("item", {"n": n}, session_id="s") for n in range(3)]
    await engine.cancel_run(runs[2].run_id)
    await engine.wait(runs[2].run_id)
    work.may_go.set()
    await engine.wait(runs[1].run_id)
    await record(engine, "completed-after-another-of-its-session", run_workflow_id(runs[1].run_id, 1))
    await record(engine, "cancelled-before-its-turn-in-the-session", run_workflow_id(runs[2].run_id, 1))
    await record(engine, "session", session_workflow_id(runs[0]))


async def main() -> None:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, temporal_server(Path(folder) / "temporal.db", port):
        for record_all in (record_sessions, record_batches):
            work = Work("recorded")
            async with engine_with_worker(f"127.0.0.1:{port}", work.flock) as engine, engine:
                await record_all(engine, work)


if __name__ == "__main__":
    asyncio.run(main())
