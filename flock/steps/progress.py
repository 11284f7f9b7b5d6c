"""The progress of a batch, as a line on a terminal."""

import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import timedelta
from typing import Any, TextIO, cast

import anyio
import msgspec

from flock.runs import Batch, Engine, event_of_batch

Count = Callable[[str], Awaitable[int]]
#: How often the state of the batch is read, and shown in a progress line, in seconds.
CHECK_INTERVAL_S, BAR_INTERVAL_S = 1.0, 0.2
#: How often a line is printed if stderr is not a terminal, in seconds.
LINE_INTERVAL_S = 10.0


async def _none(batch_id: str) -> int:
    return 0


async def follow_batch(
    engine: Engine, batch_id: str, count_submitted: Count = _none, *, is_shown: bool | None = None
) -> Batch:
    """Return the batch when it is final. Until then, show its progress on stderr.

    Args:
        count_submitted: returns how many calls of its items are in batch endpoints.
        is_shown: whether to show a progress line. By default only if stderr is a terminal.

    Raises: the same as ``Engine.wait_batch``; StoreError also when the results can no longer be stored.
    """
    if not (sys.stderr.isatty() if is_shown is None else is_shown):
        states = _states(engine, batch_id, CHECK_INTERVAL_S)
        while not (batch := await anext(states)).status.is_final:
            pass
        return batch
    import click  # here, since only a progress line needs it

    batch, started_at, text = await engine.get_batch(batch_id), anyio.current_time(), ""
    with click.progressbar(
        range(batch.total_items),
        label=batch.agent_name,
        file=cast(TextIO, _Terminal(sys.stderr)),
        show_eta=False,  # it would count items from before a crash; eta_s of the batch does not
        show_pos=True,
        item_show_func=lambda _: text,
        width=20,
    ) as bar:
        async for state in _states(engine, batch_id, BAR_INTERVAL_S):
            submitted = await count_submitted(batch_id) if state.waiting_items else 0
            text = _status_text(event_of_batch(state).data, batch, anyio.current_time() - started_at, submitted)
            bar.update(state.completed_items - bar.pos)
            bar.render_progress()
    return state


async def print_progress(engine: Engine, batch_id: str, count_submitted: Count = _none, *, as_json: bool) -> Batch:
    """Like ``follow_batch``, but print a line each 10 s on stderr; as JSON also at the end."""
    before, started_at = await engine.get_batch(batch_id), anyio.current_time()
    printed_at = started_at
    async for batch in _states(engine, batch_id, CHECK_INTERVAL_S):
        at = anyio.current_time()
        if at < printed_at + LINE_INTERVAL_S and not batch.status.is_final:
            continue
        printed_at, data = at, event_of_batch(batch).data
        if as_json:
            print(msgspec.json.encode(data).decode(), file=sys.stderr, flush=True)
        elif not batch.status.is_final:
            counts = f"{batch.agent_name}: {batch.completed_items:,} of {batch.total_items:,} rows"
            submitted = await count_submitted(batch_id) if batch.waiting_items else 0
            print(f"{counts}  {_status_text(data, before, at - started_at, submitted)}", file=sys.stderr, flush=True)
    return batch


async def _states(engine: Engine, batch_id: str, interval_s: float) -> AsyncIterator[Batch]:
    """Yield the batch at an interval, and when it is final. Raises StoreError if its results cannot be stored."""
    while True:
        batch = await engine.wait_batch(batch_id, interval_s)
        yield batch
        if batch.status.is_final:
            return
        await engine.check_ready()


def _status_text(now: dict[str, Any], before: Batch, took_s: float, submitted: int) -> str:
    """Return the text after the counts: items per second while following, the remaining time, cost, and outcomes."""
    parts = []
    if (ended := now["completed_items"] - before.completed_items) > 0:  # a retry may still reopen some
        parts.append(f"{ended / max(took_s, 1e-3):.1f}/s")
    if now["eta_s"] is not None:
        parts.append(f"{timedelta(seconds=round(now['eta_s']))} left")
    if "cost" in now:
        is_partial = "estimated_cost" in now and now["completed_items"] < now["total_items"]
        parts.append(f"${now['cost']:.4f}" + (f" of about ${now['estimated_cost']:.4f}" if is_partial else ""))
    parts += [f"{count} {what}" for what in ("waiting", "failed", "cancelled") if (count := now[f"{what}_items"])]
    parts += [f"{submitted} submitted"] if submitted else []
    return "  ".join(parts)


class _Terminal:
    """*file*, reported as a terminal, so that click shows the line in a log or a notebook too."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def isatty(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
