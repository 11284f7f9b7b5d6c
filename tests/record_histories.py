"""Record the histories that tests replay: python -m tests.record_histories [WORD ...]

The workflows run on a development server, and their histories are written to ``tests/histories``. Histories of released
versions stay there, because later versions must replay them. With WORDs, only files with one of them in their names are
written.
"""

import asyncio
import sys
import tempfile
from pathlib import Path

import msgspec
from msgspec.structs import replace

from flock.core import Flock, FlockFactory
from flock.errors import AgentError
from flock.runs import BatchOptions, Run, RunContext, RunStatus, Webhook, now
from flock.temporal import TemporalEngine
from flock.temporal.messages import batch_workflow_id, chunk_workflow_id, run_workflow_id, session_workflow_id
from flock.testing import Failure, FakeModel, Reply
from tests.support.cluster import engine_with_worker, temporal_server
from tests.support.engines import ended, until, until_run
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


async def record_early_ends(engine: TemporalEngine) -> None:
    """The key is refused from the third row on. Then the second row fails, of the 30 that may start."""
    texts = [{"text": f"{n}"} for n in range(45)]
    batch = await ended(engine, await engine.submit_batch("ask", texts, BatchOptions(parallel=False)))
    await record(engine, "batch-failed-since-its-key-was-refused", batch_workflow_id(batch.batch_id, 1))
    await record(engine, "chunk-completed-2-cancelled-18-with-a-refused-key", chunk_workflow_id(batch.batch_id, 0, 1))
    options = BatchOptions(parallel=False, max_failures=0, limit=30)
    batch = await ended(engine, await engine.submit_batch("odd", numbers(45), options))
    await record(engine, "batch-failed-with-max-failures", batch_workflow_id(batch.batch_id, 1))
    await record(
        engine, "chunk-completed-1-failed-1-cancelled-18-with-max-failures", chunk_workflow_id(batch.batch_id, 0, 1)
    )


def refused_flock() -> tuple[Flock, FakeModel]:
    flock = Flock("recorded", model="ollama/some")
    flock.add_agent(FlockFactory.create_default_agent("ask", input="text", output="answer"))

    @flock.agent
    async def odd(n: int) -> int:
        if n:
            raise AgentError("odd")
        return n

    return flock, FakeModel([*[Reply({"answer": "yes"})] * 2, Failure(401)])


async def record_sessions(engine: TemporalEngine, work: Work) -> None:
    """The second run waits for the first, and the third is cancelled while it waits. A fifth replaces the fourth."""
    work.holds = True
    runs = [await engine.submit("item", {"n": n}, session_id="s") for n in range(3)]
    fourth = await engine.submit("item", {"n": 3}, session_id="t")
    fifth = await engine.submit("item", {"n": 4}, session_id="t", continues=fourth.run_id, replaces=True)
    await engine.cancel_run(runs[2].run_id)
    await engine.wait(runs[2].run_id)
    work.may_go.set()
    await engine.wait(runs[1].run_id)
    await engine.wait(fifth.run_id)
    await record(engine, "completed-in-place-of-another", run_workflow_id(fifth.run_id, 1))
    await record(engine, "completed-after-another-of-its-session", run_workflow_id(runs[1].run_id, 1))
    await record(engine, "cancelled-before-its-turn-in-the-session", run_workflow_id(runs[2].run_id, 1))
    await record(engine, "session", session_workflow_id(runs[0]))


def asking_flock() -> Flock:
    flock = Flock("recorded")

    @flock.agent
    async def ask(n: int, context: RunContext) -> str:
        if n in (2, 3):
            default = "nobody" if n == 2 else msgspec.UNSET
            return await context.ask("Colour?", str, expires_s=1, default=default)
        if n % 20:
            return await context.ask("Colour?", str, expires_s=900)
        return f"{n} {await asyncio.gather(context.ask('Colour?', str), context.ask('Size?', str))}"

    return flock


def waiting_flock() -> Flock:
    flock = Flock("recorded")

    @flock.agent
    async def wait(n: int, context: RunContext) -> str:
        await context.sleep(20)
        waits = context.ask("Colour?", str), context.receive("size", int, expires_s=900), context.sleep(8)
        return f"{n} {await asyncio.gather(*waits)}"

    return flock


async def record_waits(engine: TemporalEngine) -> None:
    """A message is sent before it is awaited, with one that does not fit. Each wait starts the step again."""
    run = await engine.submit("wait", {"n": 0})
    batch = await engine.submit_batch("wait", numbers(2), BatchOptions())
    runs = [run, *await engine.get_items(batch.batch_id)]
    for each in runs:
        await until_run(engine, each.run_id, lambda run: run.status is RunStatus.WAITING)
        for message in (b'"large"', b"5"):
            await engine.send_message(each.run_id, "size", msgspec.Raw(message))
    for each in runs:
        await answered(engine, each.run_id)
    await ended(engine, batch)
    await record(engine, "completed-with-sleeps-and-a-message", run_workflow_id(run.run_id, 1))
    await record(engine, "chunk-completed-2-with-sleeps-and-messages", chunk_workflow_id(batch.batch_id, 0, 1))


def running_flock() -> Flock:
    flock = Flock("recorded")

    async def slow() -> None:
        await asyncio.sleep(2)

    @flock.agent
    async def wait(n: int, context: RunContext) -> str:
        if n == 0:
            await asyncio.sleep(1)
        size = context.receive("size", int) if n in (0, 21) else asyncio.sleep(0)
        return f"{n} {await asyncio.gather(size, context.call(slow) if n == 0 else asyncio.sleep(0))}"

    return flock


async def record_messages(engine: TemporalEngine) -> None:
    """One is received by a step that still runs, and one is sent to an item before its chunk has started."""
    run = await engine.submit("wait", {"n": 0})
    await until_run(engine, run.run_id, lambda run: bool(run.waiting_for))
    await engine.send_message(run.run_id, "size", msgspec.Raw(b"5"))
    await engine.wait(run.run_id)
    await record(engine, "completed-with-a-message-to-a-running-step", run_workflow_id(run.run_id, 1))
    batch = await engine.submit_batch("wait", numbers(45), BatchOptions(max_workers=1))
    items = await engine.get_items(batch.batch_id)
    for n in (0, 21):
        await engine.send_message(items[n].run_id, "size", msgspec.Raw(b"5"))
    await ended(engine, batch)
    await record(engine, "batch-completed-with-early-messages", batch_workflow_id(batch.batch_id, 1))
    await record(engine, "chunk-completed-20-with-an-early-message", chunk_workflow_id(batch.batch_id, 1, 1))


async def answered(engine: TemporalEngine, run_id: str) -> Run:
    """Answer all questions of a run, and return it when it has ended."""
    run = await engine.wait(run_id)
    for question in run.questions:
        await engine.answer_call(run_id, question.call_id, msgspec.Raw(b'"red"'))
    return await engine.wait(run_id)


async def record_questions(engine: TemporalEngine) -> None:
    runs = [await engine.submit("ask", {"n": n}, session_id="s") for n in (0, 1, 2, 3)]
    for run in runs[:2]:
        await answered(engine, run.run_id)
    for run in runs[2:]:
        await until_run(engine, run.run_id, lambda run: run.status.is_final)
    names = ("with-two-answers", "with-an-answer", "with-a-default", "since-a-question-expired")
    for name, run in zip(names, runs, strict=True):
        status = (await engine.get_run(run.run_id)).status
        await record(engine, f"{status}-{name}", run_workflow_id(run.run_id, 1))
    await record(engine, "session-with-runs-that-ask", session_workflow_id(runs[0]))

    batch = await engine.submit_batch("ask", numbers(45), BatchOptions(max_workers=2))
    while batch.completed_items + batch.waiting_items < 45 or batch.completed_items < 2:
        await asyncio.sleep(0.1)
        batch = await engine.get_batch(batch.batch_id)
    for item in await engine.get_items(batch.batch_id, statuses=[RunStatus.WAITING]):
        if item.position == 44:
            await engine.cancel_run(item.run_id)
        else:
            await answered(engine, item.run_id)
    batch = await ended(engine, batch)
    await record(engine, "batch-completed-with-questions", batch_workflow_id(batch.batch_id, 1))
    await record(engine, "chunk-completed-19-failed-1-with-questions", chunk_workflow_id(batch.batch_id, 0, 1))
    await record(engine, "chunk-completed-4-cancelled-1-with-questions", chunk_workflow_id(batch.batch_id, 2, 1))


async def record_webhooks(engine: TemporalEngine) -> None:
    """Runs whose agent has a receiver: one is cancelled while it waits, and the question of another expires."""
    engine.has_receiver = lambda agent_name: True
    runs = [await engine.submit("ask", {"n": n}, session_id="s") for n in (0, 3)]
    await until_run(engine, runs[0].run_id, lambda run: run.status is RunStatus.WAITING)
    await engine.cancel_run(runs[0].run_id)
    for run in runs:
        await until_run(engine, run.run_id, lambda run: run.status.is_final)
    await record(engine, "cancelled-with-webhooks", run_workflow_id(runs[0].run_id, 1))
    await record(engine, "failed-with-webhooks", run_workflow_id(runs[1].run_id, 1))
    batch = await ended(engine, await engine.submit_batch("ask", numbers(3)[2:], BatchOptions()))
    await record(engine, "batch-completed-with-a-webhook", batch_workflow_id(batch.batch_id, 1))

    async def given_up(webhook: Webhook, misses: int) -> tuple[Webhook, float]:
        is_first = webhook.type == "run.waiting"
        return replace(webhook, status="given_up" if is_first else "sent", ended_at=now(), error="recorded"), 0

    serving = asyncio.create_task(engine.webhooks.serve(given_up))
    while len(ended_webhooks := [each for each in await engine.webhooks.page(None, None, 9) if each.ended_at]) < 6:  # noqa: ASYNC110
        await asyncio.sleep(0.1)
    serving.cancel()
    for name, status in (("sent", "sent"), ("given-up", "given_up")):
        webhook_id = next(each.webhook_id for each in ended_webhooks if each.status == status)
        workflow_id = webhook_id.replace("msg_", "webhook:").replace("_", ":")
        await record(engine, f"webhook-{name}", workflow_id)


async def main() -> None:
    port = free_port()
    with tempfile.TemporaryDirectory() as folder, temporal_server(Path(folder) / "temporal.db", port):
        for record_all in (record_sessions, record_batches):
            work = Work("recorded")
            async with engine_with_worker(f"127.0.0.1:{port}", work.flock) as engine, engine:
                await record_all(engine, work)
        flock, model = refused_flock()
        async with engine_with_worker(f"127.0.0.1:{port}", flock, model.transport) as engine, engine:
            await record_early_ends(engine)
        async with engine_with_worker(f"127.0.0.1:{port}", asking_flock()) as engine, engine:
            await record_questions(engine)
        async with engine_with_worker(f"127.0.0.1:{port}", asking_flock()) as engine, engine:
            await record_webhooks(engine)
        async with engine_with_worker(f"127.0.0.1:{port}", waiting_flock()) as engine, engine:
            await record_waits(engine)
        async with engine_with_worker(f"127.0.0.1:{port}", running_flock()) as engine, engine:
            await record_messages(engine)


if __name__ == "__main__":
    asyncio.run(main())
