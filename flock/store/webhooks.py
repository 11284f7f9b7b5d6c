"""Webhooks in a ``Database``: the events of runs and batches, until their receivers have accepted them.

Triggers write them in the transaction of the state that they report, whichever statement writes that. So a webhook
exists if and only if the state does.
"""

import logging
import sqlite3
from collections.abc import Collection, Iterable, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any

from flock.runs import Webhook
from flock.store import files, statements
from flock.store.columns import DAMAGED_WEBHOOK, json_or_null, micros, webhook_from, webhook_or_remains
from flock.store.database import Database
from flock.store.port import DamagedRecord
from flock.store.queries import DetectingDamage, text_as_bytes

logger = logging.getLogger("flock.webhooks")

#: No webhook is due later than this after its last try.
LATEST_TRY = timedelta(hours=25)
#: Max webhooks that one transaction deletes or gives up.
CHUNK_SIZE = 1000


class WebhookStore:
    def __init__(self, db: Database) -> None:
        self._db = db

    async def urls(self, flock: str) -> Mapping[str, str]:
        """Return the receivers of the agents of all programs of *flock*, by agent."""
        return self._db.read(lambda db: {name: url for name, url, _ in db.execute(statements.WEBHOOK_URLS, (flock,))})

    async def set_urls(
        self, flock: str, urls: Mapping[str, str | None], new: Collection[str], engine_id: str, now: datetime
    ) -> int:
        """Set the receivers of these agents. Give up the webhooks of agents without a receiver, and return how many.

        What a living process has set is replaced only by itself, or by that of an agent in *new*.
        """

        def changed(db: sqlite3.Connection) -> Mapping[str, str | None]:
            stored = {name: of for name, *of in db.execute(statements.WEBHOOK_URLS, (flock,))}

            def is_changed(name: str, url: str | None, before: str | None = None, by: str | None = None) -> bool:
                if by == engine_id or url is before is None:
                    return url != before
                return name in new or by is None or not files.is_locked(self._db.lock_of(by))

            return {name: url for name, url in urls.items() if is_changed(name, url, *stored.get(name, ()))}

        def apply(db: sqlite3.Connection) -> int:
            left = CHUNK_SIZE
            for name, url in changed(db).items():
                values = (micros(now), "Its agent has no webhook_url any more.", flock, name, left)
                left -= 0 if url is not None else db.execute(statements.GIVE_UP_WEBHOOKS, values).rowcount
                if url is not None:
                    db.execute(statements.SET_WEBHOOK_URL, (flock, name, url, engine_id))
                elif left:  # otherwise the next transaction gives up the rest
                    db.execute(statements.DELETE_WEBHOOK_URL, (flock, name))
            for name, trigger in statements.WEBHOOK_TRIGGERS.items():
                db.execute(f"DROP TRIGGER IF EXISTS {name}")  # it may be of an earlier version
                if db.execute(statements.HAS_WEBHOOK_URLS).fetchone():
                    db.execute(f"CREATE TRIGGER {name} {trigger}")
            return CHUNK_SIZE - left

        count = 0
        while self._db.read(changed):
            count += await self._db.change(apply)
        return count

    async def claim(self, flock: str, engine_id: str) -> bool:
        """Whether the process of *engine_id* sends the webhooks of *flock*. Only one does, until it ends."""
        row = self._db.read(lambda db: db.execute(statements.WEBHOOK_SENDER, (flock,)).fetchone())
        sender = None if row is None else row[0]
        if sender == engine_id:
            return True
        if sender is not None and files.is_locked(self._db.lock_of(sender)):
            return False
        values = (flock, engine_id, sender)
        return await self._db.change(lambda db: db.execute(statements.SET_WEBHOOK_SENDER, values).rowcount == 1)

    async def due(self, flock: str, agents: Iterable[str], now: datetime, limit: int) -> Sequence[Webhook]:
        """Return up to *limit* webhooks of these agents that are to be sent now: of each run or batch its earliest.

        Those that are due too late are included: the clock was ahead when they were written. Damaged ones are given up.
        """
        queries = (("<= ?", now), ("> ?", now + LATEST_TRY))
        values = [(when, (flock, name, micros(time), limit)) for name in agents for when, time in queries]

        def find(db: sqlite3.Connection) -> list[Webhook]:
            with DetectingDamage():
                rows = [row for when, each in values for row in db.execute(statements.due_webhooks(when), each)]
            return [webhook_from(row) for row in rows]

        def give_up(db: sqlite3.Connection) -> list[Webhook]:
            with text_as_bytes(db):
                found = [
                    row for when, of in values for row in db.execute(statements.due_webhooks(when, "number, "), of)
                ]
            damaged = {
                number: webhook
                for number, *row in found
                if (webhook := webhook_or_remains(row)).error == DAMAGED_WEBHOOK
            }
            for number in damaged:
                db.execute(statements.GIVE_UP_WEBHOOK, (micros(now), DAMAGED_WEBHOOK, number))
            return list(damaged.values())

        try:
            found = self._db.read(find)
        except DamagedRecord:
            for webhook in await self._db.change(give_up):
                logger.error("The webhook %s of %s was given up: %s", webhook.type, webhook.record_id, webhook.error)
            found = []
        return sorted(found, key=lambda webhook: webhook.next_try_at)[:limit]

    async def write(self, id_: str, tried: int | None, status: str, tries: int, error: str | None, *times: Any) -> None:
        """Store the outcome of a try. *times*: of the first and the next one, and of the end.

        Args:
            tried: how often it had been sent, since nothing is written if it has changed meanwhile; None writes anyway.
        """
        values = (status, tries, *map(micros, times), error, id_, tried, tried)
        await self._db.change(lambda db: db.execute(statements.UPDATE_WEBHOOK, values) and None)

    async def fail(
        self, flock: str, agents: Iterable[str], error: str | None, now: datetime, given_up: datetime
    ) -> int:
        """Note that the receiver of these agents is down. What it has not accepted since *given_up* is given up.

        Returns: how many were given up.
        """
        values: dict[str, Any] = {"flock": flock, "error": error, "now": micros(now), "given_up": micros(given_up)}
        values["agents"], values["limit"], count = json_or_null(list(agents)), CHUNK_SIZE, 0
        while self._db.read(lambda db: db.execute(statements.WEBHOOKS_TO_FAIL, values).fetchone()) is not None:
            failed = await self._db.change(lambda db: db.execute(statements.FAIL_WEBHOOKS, values).fetchall())
            count += failed.count(("given_up",))
        return count

    async def find(self, flock: str, webhook_id: str) -> Webhook | None:
        row = self._db.read(lambda db: db.execute(statements.FIND_WEBHOOK, (webhook_id, flock)).fetchone())
        return None if row is None else webhook_from(row)

    async def page(self, flock: str, status: str | None, after: str | None, limit: int) -> list[Webhook]:
        """Return up to *limit* webhooks, newest first, from the one after *after* on."""
        values = {"flock": flock, "status": status, "after": after, "limit": limit}
        query = statements.webhook_page(status, after)

        def find(db: sqlite3.Connection) -> list[Webhook]:
            with text_as_bytes(db):
                return list(map(webhook_or_remains, db.execute(query, values)))

        return self._db.read(find)

    async def delete_old(self, before: datetime) -> None:
        """Delete those that were sent or given up before *before*."""
        values = (micros(before), CHUNK_SIZE)
        while self._db.read(lambda db: db.execute(statements.OLD_WEBHOOKS, values).fetchone()) is not None:
            await self._db.change(lambda db: db.execute(statements.DELETE_OLD_WEBHOOKS, values) and None)
