"""What principals spend: a workflow for each of them, to which workers report, and from which engines read.

A worker reports what a call has cost before the call is stored, and everything at the end of a step. A report is
repeated until the cluster has it, and counts once.
"""

import asyncio
import functools
import threading
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from msgspec.structs import replace
from temporalio.common import SearchAttributePair, TypedSearchAttributes, WorkflowIDConflictPolicy

from flock.models.prices import DayBudget, Price
from flock.runs import Account, Spent, Usage, UsageFilter, UsageRow, new_id, now, spent_with
from flock.temporal.cluster import Cluster
from flock.temporal.messages import ACCOUNT_WORKFLOW, FLOCK, AccountState, SpentReport, account_workflow_id, keyword_of
from flock.temporal.search import workflows_of
from flock.temporal.workflows import FlockAccount

#: How long what other workers have spent may be unknown to a worker, in seconds.
FRESH_S = 1.0


async def signal_account(cluster: Cluster, flock: str, principal: str, signal: Callable[..., None], value: Any) -> None:
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
        start_signal=signal.__name__,
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


async def usage_of(cluster: Cluster, flock: str, wanted: UsageFilter) -> AsyncIterator[Sequence[UsageRow]]:
    """Yield the usage of each principal that *wanted* selects. Workers answer. Raises StoreError, EngineFull."""
    async with cluster.rpc_scope():
        if wanted.principal is not None:
            ids = [account_workflow_id(flock, wanted.principal)]
        else:
            query = f"{workflows_of(ACCOUNT_WORKFLOW, flock)} AND ExecutionStatus = 'Running'"
            ids = [found.id async for found in cluster.client.list_workflows(query)]
    days = wanted.first_day.toordinal(), wanted.last_day.toordinal()
    for workflow_id in ids:
        page: Sequence[UsageRow] = ()
        async with cluster.rpc_scope(missing_ok=True):
            page = await cluster.ask(workflow_id, FlockAccount.usage, *days)
        yield page


class SharedAccount:
    """The account of one principal, as one worker sees it. All runs of the principal in the worker share it.

    Attributes:
        budget: what it may spend in a day.
    """

    def __init__(self, cluster: Cluster, flock: str, principal: str, prices: Mapping[str, Price], worker: str) -> None:
        self._cluster, self._flock, self._principal, self._worker = cluster, flock, principal, worker
        self.budget = DayBudget(prices, self._read)
        self._account = Account()
        #: when the account has to be read again
        self._stale_at = 0.0
        #: what is not reported yet, by day
        self._unsent: defaultdict[int, tuple[Spent, ...]] = defaultdict(tuple)
        self._sending: asyncio.Task[None] | None = None
        self._sent = 0
        #: held while a report is sent, or the account is read
        self._lock = asyncio.Lock()
        self._spending = threading.Lock()

    def spend(self, agent_name: str, usage: Usage, model: str | None) -> None:
        """Note what a call has cost. It may be called from any thread."""
        with self._spending:
            day, account = now().date().toordinal(), self._account
            self._unsent[day] = spent_with(self._unsent[day], agent_name, model or "", usage)
            self._account = replace(account, picodollars=account.picodollars + usage.picodollars)

    async def flush(self) -> None:
        """Return when all that was spent before is reported.

        Cancellation: the report may be sent nevertheless, and is sent again.
        """
        async with self._lock:
            await self._send()

    async def _send(self) -> None:
        """Send one report after the other, since the account ignores one with a lower number."""
        while self._unsent or self._sending is not None:
            if self._sending is None:
                with self._spending:
                    day, spent = self._unsent.popitem()
                self._sent += 1
                report = SpentReport(worker=self._worker, number=self._sent, day=day, spent=spent)
                of = self._cluster, self._flock, self._principal
                send = functools.partial(signal_account, *of, FlockAccount.spent, report)
                # In a task of its own: if the caller is cancelled, the report is not lost.
                self._sending = asyncio.create_task(self._cluster.answered(send))
            await asyncio.shield(self._sending)
            self._sending = None

    async def _read(self) -> Account:
        """Return the account with what this worker has spent. What others have spent may be missing for ``FRESH_S``."""
        if time.monotonic() < self._stale_at and not self._account.is_spent:  # it may have been raised
            return self._account
        async with self._lock:
            await self._send()
            account = await self._cluster.answered(self._query)
            with self._spending:
                unsent = sum(each.usage.picodollars for spent in self._unsent.values() for each in spent)
                self._account = replace(account, picodollars=account.picodollars + unsent)
            self._stale_at = time.monotonic() + FRESH_S
        return self._account

    async def _query(self) -> Account:
        day = now().date().toordinal()
        async with self._cluster.rpc_scope(missing_ok=True):
            of_principal = account_workflow_id(self._flock, self._principal)
            return await self._cluster.ask(of_principal, FlockAccount.account, day)
        return Account()


class Accounts:
    """The accounts of principals, as one worker sees them.

    Args:
        flock: the name under which runs are stored.
        prices: of models, by name.
    """

    def __init__(self, cluster: Cluster, flock: str, prices: Mapping[str, Price]) -> None:
        self._of_worker = cluster, flock, prices, new_id()
        self._known: dict[str, SharedAccount] = {}

    def of(self, principal: str | None) -> SharedAccount:
        """Return the account of a principal, or of the runs without one."""
        name = principal or ""
        if name not in self._known:
            cluster, flock, prices, worker = self._of_worker
            self._known[name] = SharedAccount(cluster, flock, name, prices, worker)
        return self._known[name]
