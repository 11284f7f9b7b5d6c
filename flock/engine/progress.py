"""How far a batch is, as a line on a terminal."""

import contextlib
import sys
from datetime import timedelta
from typing import Any, TextIO, cast

import anyio

from flock.runs import Batch, Engine

__all__ = ["follow_batch"]


async def follow_batch(engine: Engine, batch_id: str, *, is_shown: bool | None = None) -> Batch:
    """The batch once it is final. Until then a line on stderr says how far it is.

    Args:
        is_shown: if None, where stderr is a terminal.

    Raises: as ``Engine.wait_batch``.
    """
    if not (sys.stderr.isatty() if is_shown is None else is_shown):
        return await engine.wait_batch(batch_id)
    import click  # only who looks at a line pays for it

    batch, began_at, text = await engine.get_batch(batch_id), anyio.current_time(), ""
    with click.progressbar(
        range(batch.total_items),
        label=batch.agent_name,
        file=cast(TextIO, _Terminal(sys.stderr)),
        show_eta=False,  # it counts what was done before a crash as done now; the batch knows better
        show_pos=True,
        item_show_func=lambda _: text,
        width=20,
    ) as bar:
        async with contextlib.aclosing(engine.batch_events(batch_id)) as events:
            async for event in events:
                if event is not None:
                    text = _status_text(event.data, batch, anyio.current_time() - began_at)
                    bar.update(event.data["completed_items"] - bar.pos)
                    bar.render_progress()
    return await engine.wait_batch(batch_id)


def _status_text(now: dict[str, Any], before: Batch, took_s: float) -> str:
    """What stands behind the counts: items a second since the line was begun, the time that is left, failures."""
    text = []
    if ended := now["completed_items"] - before.completed_items:
        text.append(f"{ended / max(took_s, 1e-3):.1f}/s")
    if now["eta_s"] is not None:
        text.append(f"{timedelta(seconds=round(now['eta_s']))} left")
    text += [f"{count} {what}" for what in ("failed", "cancelled") if (count := now[f"{what}_items"])]
    return "  ".join(text)


class _Terminal:
    """*file*, taken for a terminal: whoever asks for the line wants to see it, also in a log or a notebook."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def isatty(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)
