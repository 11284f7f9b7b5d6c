"""What principals spend: a workflow for each of them, to which workers report, and from which engines read.

A worker reports what a call has cost before the call is stored, and everything at the end of a step. A report is
repeated until the cluster has it, and counts once.
"""

import asyncio
import functools
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from msgspec.structs import replace
from temporalio.common import SearchAttributePair, TypedSearchAttributes, WorkflowIDConflictPolicy
from temporalio.service import RPCError, RPCStatusCode

from flock.models.prices import DayBudget, Price
from flock.runs import Account, Spent, Usage, UsageFilter, UsageRow, new_id, now, spent_with
from flock.temporal.cluster import Cluster
from flock.temporal.messages import (
    ACCOUNT_QUERY,
    ACCOUNT_WORKFLOW,
    FLOCK,
    SPENT_SIGNAL,
    USAGE_QUERY,
    AccountState,
    SpentReport,
    account_workflow_id,
    keyword_of,
)
from flock.temporal.search import workflows_of

#: How long what other workers have spent may be unknown to a worker, in seconds.
FRESH_S = 1.0


async def signal_account(cluster: Cluster, flock: str, principal: str, signal: str, value: Any) -> None:
    """Send a signal to the workflow of a principal, which is started if there is none.

    Raises: StoreError, EngineFull.
    """
    await cluster.start_workflow(
        ACCOUNT_WORKFLOW,
        AccountState(principal=principal),
        flock=flock,
        id=account_workflow_id(flock, principal),
        id_conflict_policy=WorkflowIDConflictPolicy.USE_EXISTING,
        search_attributes=TypedSearchAttributes([SearchAttributePair(FLOCK, keyword_of(flock))]),
        start_signal=signal,
        start_signal_args=[value],
    )


async def account_in_memo(cluster: Cluster, flock: str, principal: str) -> Account:
    """Return the account of a principal, as its workflow has written it last. It needs no worker.

    Raises: StoreError, EngineFull.
    """
    described = await cluster.describe(account_workflow_id(flock, principal))
    memo = {} if described is None else await described.memo()
    is_today = memo.get("day") == now().date().toordinal()
    return Account(max_cost=memo.get("max_cost"), picodollars=memo.get("picodollars", 0) if is_today else 0)


async def usage_of(cluster: Cluster, flock: str, wanted: UsageFilter) -> Sequence[Sequence[UsageRow]]:
    """Return the usage of each principal that *wanted* selects. Workers answer. Raises StoreError, EngineFull."""
    async with cluster.rpc_scope():
        if wanted.principal is not None:
            ids = [account_workflow_id(flock, wanted.principal)]
        else:
            query = f"{workflows_of(ACCOUNT_WORKFLOW, flock)} AND ExecutionStatus = 'Running'"
            ids = [found.id async for found in cluster.client.list_workflows(query)]
    days = [wanted.first_day.toordinal(), wanted.last_day.toordinal()]
    pages = []
    for workflow_id in ids:
        async with cluster.rpc_scope(missing_ok=True):
            handle = cluster.handle(workflow_id)
            pages.append(await handle.query(USAGE_QUERY, args=days, result_type=list[UsageRow]))
    return pages


class _Known:
    """What a worker knows of the account of one principal."""

    def __init__(self) -> None:
        self.account = Account()
        #: when the account has to be read again
        self.stale_at = 0.0
        #: what is not reported yet, by day
        self.unsent: defaultdict[int, tuple[Spent, ...]] = defaultdict(tuple)
        self.sending: asyncio.Task[None] | None = None
        #: held while a report is sent, or the account is read
        self.lock = asyncio.Lock()


class Accounts:
    """The accounts of principals, as one worker sees them.

    Args:
        flock: the name under which runs are stored.
        prices: of models, by name.
    """

    def __init__(self, cluster: Cluster, flock: str, prices: Mapping[str, Price]) -> None:
        self._cluster = cluster
        self._flock = flock
        self._prices = prices
        self._worker_id = new_id()
        self._sent = 0
        self._known: defaultdict[str, _Known] = defaultdict(_Known)
        self._budgets: dict[str, DayBudget] = {}
        self._spending = threading.Lock()

    def budget_of(self, principal: str | None) -> DayBudget | None:
        """Return what a principal may spend in a day. All its runs in this worker share it."""
        if principal is None:
            return None
        if principal not in self._budgets:
            self._budgets[principal] = DayBudget(self._prices, lambda: self._read(principal))
        return self._budgets[principal]

    def spend(self, principal: str, agent_name: str, usage: Usage, model: str | None) -> None:
        """Note what a call has cost. It may be called from any thread."""
        with self._spending:
            known, day = self._known[principal], now().date().toordinal()
            known.unsent[day] = spent_with(known.unsent[day], agent_name, model or "", usage)
            known.account = replace(known.account, picodollars=known.account.picodollars + usage.picodollars)

    async def flush(self, principal: str) -> None:
        """Return when all that was spent before is reported.

        Cancellation: the report may be sent nevertheless, and is sent again.
        """
        if principal in self._known:
            known = self._known[principal]
            async with known.lock:
                await self._send(principal, known)

    async def _send(self, principal: str, known: _Known) -> None:
        """Send one report after the other, since the account ignores one with a lower number."""
        while known.unsent or known.sending is not None:
            if known.sending is None:
                with self._spending:
                    day, spent = known.unsent.popitem()
                self._sent += 1
                report = SpentReport(worker=self._worker_id, number=self._sent, day=day, spent=spent)
                send = functools.partial(signal_account, self._cluster, self._flock, principal, SPENT_SIGNAL, report)
                # In a task of its own: if the caller is cancelled, the report is not lost.
                known.sending = asyncio.create_task(self._cluster.answered(send))
            await asyncio.shield(known.sending)
            known.sending = None

    async def _read(self, principal: str) -> Account:
        """Return the account with what this worker has spent. What others have spent may be missing for ``FRESH_S``."""
        known = self._known[principal]
        if time.monotonic() < known.stale_at and not known.account.is_spent:  # it may have been raised
            return known.account
        async with known.lock:
            await self._send(principal, known)
            account = await self._cluster.answered(lambda: self._query(principal))
            with self._spending:
                unsent = sum(each.usage.picodollars for spent in known.unsent.values() for each in spent)
                known.account = replace(account, picodollars=account.picodollars + unsent)
            known.stale_at = time.monotonic() + FRESH_S
        return known.account

    async def _query(self, principal: str) -> Account:
        day = now().date().toordinal()
        try:
            async with self._cluster.rpc_scope():
                handle = self._cluster.handle(account_workflow_id(self._flock, principal))
                found: Account = await handle.query(ACCOUNT_QUERY, day, result_type=Account)
                return found
        except RPCError as exc:
            if exc.status is RPCStatusCode.NOT_FOUND:
                return Account()
            raise
