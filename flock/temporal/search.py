"""Lists of runs and batches, and the earlier runs of a session, from the search of the cluster.

The search may lag by a moment, and not every cluster can sort. So lists are read in ranges of ids, which are ordered by
time, and each range is sorted here.
"""

import asyncio
import contextlib
import math
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import TypeVar

from temporalio.client import WorkflowExecution

from flock.errors import NotFound
from flock.runs import Batch, BatchFilter, Call, Page, QuestionFilter, Run, RunFilter, RunStatus, now
from flock.runs.ids import first_id_at
from flock.temporal.cluster import Cluster
from flock.temporal.messages import (
    AGENT,
    ASKING,
    ASLEEP,
    CHUNK_WORKFLOW,
    FLOCK,
    ID,
    INBOX,
    PRINCIPAL,
    RUN_WORKFLOW,
    SESSION,
    STATUS,
    Inbox,
    decoded,
    keyword_of,
    run_workflow_id,
)
from flock.temporal.records import Traces, run_of
from flock.temporal.reservations import Reservations

Record = TypeVar("Record", Run, Batch)
T = TypeVar("T")

#: How many records of a list are read concurrently.
READS_AT_ONCE = 20
#: Max workflows in one range.
WORKFLOWS_PER_RANGE = 1000
#: Ids may come from a clock that is ahead by up to this time.
MAX_CLOCK_LEAD = timedelta(days=7)
EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

IS_ASKING = f"{STATUS.name} = '{ASKING}'"
IS_WAITING = f"{STATUS.name} IN ('{ASKING}', '{ASLEEP}')"
#: For each final status of a run, the execution statuses that its workflow may have. Before, it is "Running".
EXECUTION_STATUS = {
    RunStatus.COMPLETED: "'Completed'",
    RunStatus.FAILED: "'Failed', 'Terminated', 'TimedOut'",
    RunStatus.CANCELLED: "'Canceled'",
}


class AskingRuns(RunFilter, frozen=True, kw_only=True):
    """Selects waiting runs with open questions, and not those that wait for a time or a message."""


def workflows_of(workflow_type: str, flock: str) -> str:
    """Return a query for the workflows of *flock* that have this type."""
    return f"WorkflowType = '{workflow_type}' AND {FLOCK.name} = {_quoted(flock)}"


def open_runs(flock: str, principal: str | None = None) -> str:
    """Return a query for the runs of *flock*, or of one *principal* in it, that have not ended and do not wait."""
    of = "" if principal is None else f" AND {PRINCIPAL.name} = {_quoted(principal)}"
    return f"{workflows_of(RUN_WORKFLOW, flock)} AND ExecutionStatus = 'Running' AND {STATUS.name} IS NULL{of}"


def asking_workflows(flock: str) -> str:
    """Return a query for the workflows with runs or items of *flock*. Those that ask have ``IS_ASKING`` too."""
    return f"WorkflowType IN ('{RUN_WORKFLOW}', '{CHUNK_WORKFLOW}') AND {FLOCK.name} = {_quoted(flock)}"


def inbox_in(workflow: WorkflowExecution) -> Inbox:
    """Return what a workflow has written into its memo. Those of earlier versions write nothing."""
    fields = workflow.raw_info.memo.fields
    return decoded(fields[INBOX], Inbox) if INBOX in fields else Inbox()


def may_have(workflow: WorkflowExecution, wanted: QuestionFilter) -> bool:
    """Whether a workflow may have questions that are *wanted*, by what it says of the roles that may answer them."""
    by, roles = wanted.by, inbox_in(workflow).roles
    if not roles:
        return True
    if by is not None:
        is_own = by.admin or workflow.typed_search_attributes.get(PRINCIPAL) == keyword_of(by.name)
        roles = tuple(role for role in roles if role in by.roles or (is_own and not role))
    return any(wanted.role in (None, role) for role in roles)


def waiting_runs(flock: str) -> str:
    """Return a query for the runs of *flock* that wait for answers."""
    return f"{workflows_of(RUN_WORKFLOW, flock)} AND ExecutionStatus = 'Running' AND {IS_ASKING}"


async def page_of(
    cluster: Cluster, query: str, prefix: str, wanted: BatchFilter, read: Callable[[str], Awaitable[Record]]
) -> Page[Record]:
    """Return a page of the runs or batches that match *wanted*, newest first.

    Args:
        query, prefix: see ``newest_first``.
        read: returns the record with an id. Raises NotFound if it was deleted.
    """
    page = Page[Record](wanted.limit)
    found = newest_first(cluster, query, (prefix,), wanted, lambda each: read(each.id.split(":")[1]))
    async with contextlib.aclosing(found) as records:
        async for record in records:
            # The search also finds earlier attempts, and lags.
            if wanted.status in (None, record.status) and not page.add(record):
                break
    return page


async def newest_first(
    cluster: Cluster,
    query: str,
    prefixes: Sequence[str],
    wanted: BatchFilter,
    read: Callable[[WorkflowExecution], Awaitable[T]],
) -> AsyncGenerator[T, None]:
    """Yield what *read* returns for the workflows that may match *wanted*, newest first.

    Args:
        query: selects workflows of the right types and flock.
        prefixes: the starts of their workflow ids.
        read: is called with one of the attempts of a run or batch. Raises NotFound if it was deleted.
    """
    at_once = 1  # a long record can exceed a page
    async for workflows in _ranges(cluster, query, prefixes, wanted):
        unread = iter(workflows)
        while some := list(islice(unread, at_once)):
            at_once = min(READS_AT_ONCE, wanted.limit)
            for found in await asyncio.gather(*map(read, some), return_exceptions=True):
                if isinstance(found, BaseException) and not isinstance(found, NotFound):
                    raise found
                if not isinstance(found, BaseException):
                    yield found


def order_of(workflow_id: str) -> tuple[str, Sequence[float]]:
    """Return the id of a run or batch, and where it has a chunk or a webhook, from a workflow id; see ``messages``."""
    kind, id_, *numbers = workflow_id.split(":")
    if kind == "webhook":  # that of the end of an attempt has no number
        return id_, (int(numbers[0]), int(numbers[1]) if len(numbers) > 1 else math.inf)
    return id_, (int(numbers[0]),) if kind == "chunk" else ()


async def _ranges(
    cluster: Cluster, query: str, prefixes: Sequence[str], wanted: BatchFilter
) -> AsyncIterator[list[WorkflowExecution]]:
    """Yield the workflows for ``newest_first``, one list for each range of ids."""
    conditions, after = [query], wanted.after
    status = None if wanted.status is None else RunStatus(wanted.status)
    if status is not None and isinstance(wanted, RunFilter):
        statuses = EXECUTION_STATUS.get(status, "'Running'")
        conditions.append(f"ExecutionStatus IN ({statuses})")
        if not status.is_final:
            conditions.append(IS_WAITING if status is RunStatus.WAITING else f"{STATUS.name} IS NULL")
    elif status is not None:  # the workflow of a batch completes, whatever the status of the batch is
        conditions.append(f"ExecutionStatus {'!=' if status.is_final else '='} 'Running'")
    if isinstance(wanted, AskingRuns):
        conditions.append(f"ExecutionStatus = 'Running' AND {IS_ASKING}")
    named = {AGENT: wanted.agent_name, PRINCIPAL: wanted.principal}
    bottom, top = 0, _milliseconds(now() + MAX_CLOCK_LEAD)
    if isinstance(wanted, RunFilter):
        named[SESSION] = wanted.session_id
        bottom = 0 if wanted.created_after is None else _milliseconds(wanted.created_after) + 1
        top = top if wanted.created_before is None else _milliseconds(wanted.created_before)
    conditions += [f"{key.name} = {_quoted(name)}" for key, name in named.items() if name is not None]
    high = first_id_at(EPOCH, top)
    if after is not None and not ID.fullmatch(after):
        return  # it is not an id, so no page follows it
    if after is not None and after < high:
        high, top = after, int(after.replace("-", "")[:12], 16)
    span = top - bottom
    while top >= bottom:
        low = max(bottom, top - span)
        low_id = first_id_at(EPOCH, low)
        ids = [f"WorkflowId >= '{prefix}:{low_id}' AND WorkflowId < '{prefix}:{high}'" for prefix in prefixes]
        within = " AND ".join([*conditions, f"({' OR '.join(ids)})"])
        async with cluster.rpc_scope():
            if (await cluster.client.count_workflows(within)).count > WORKFLOWS_PER_RANGE and span > 1:
                span = max(1, span // 4)
                continue
            workflows = cluster.client.list_workflows(within, page_size=1000)
            found = {order_of(workflow.id): workflow async for workflow in workflows}
        yield [found[order] for order in sorted(found, reverse=True)]
        if low == bottom:
            return
        high, top, span = low_id, low, span * 2


async def earlier_runs(cluster: Cluster, run: Run, latest: Sequence[str], limit: int, max_bytes: int) -> Sequence[Run]:
    """Return completed runs of the session and the agent of *run*; see ``ActiveRun.earlier_runs``.

    Args:
        latest: the workflow ids of the last runs of the session, since the search of the cluster may lag.

    Raises: StoreError, EngineFull.
    """
    reservations = Reservations(cluster, run.flock)
    found: list[Run] = []
    async with contextlib.aclosing(_workflow_ids(cluster, run, latest)) as workflow_ids:
        async for workflow_id in workflow_ids:
            async with cluster.rpc_scope(missing_ok=True):  # it may have been deleted
                earlier = run_of(await cluster.history_of(workflow_id))
                is_turn = earlier.status is RunStatus.COMPLETED and earlier.agent_name == run.agent_name
                if not is_turn or await reservations.is_deleted(earlier.run_id):
                    continue
                max_bytes -= earlier.exchange_bytes
                if max_bytes < 0:
                    break
                found.append(earlier)
                if len(found) == limit:
                    break
    return sorted(found, key=lambda run: run.run_id)


async def calls_of(cluster: Cluster, run: Run, position: int) -> Sequence[Call]:
    """Return the calls of a step of *run*; see ``ActiveRun.calls_of``. Those of attempts that were deleted are missing.

    Raises: StoreError, EngineFull.
    """
    found = Traces()
    for attempt in range(run.steps[position].first_try, run.attempt + 1):
        async with cluster.rpc_scope(missing_ok=True):
            run_of(await cluster.history_of(run_workflow_id(run.run_id, attempt)), found, is_whole=True)
    return found.calls.get(position, [])


async def _workflow_ids(cluster: Cluster, run: Run, latest: Sequence[str]) -> AsyncGenerator[str, None]:
    """Yield the workflow ids of *latest*, and of the completed runs that the search finds, last first."""
    for workflow_id in reversed(latest):
        yield workflow_id
    async with cluster.rpc_scope(None):
        async for workflow in cluster.client.list_workflows(_earlier_turns(run), page_size=100):
            if workflow.id not in latest:
                yield workflow.id


def _earlier_turns(run: Run) -> str:
    """Return a query for the completed runs of the session and the agent of *run*. The last to close comes first."""
    of = f"{SESSION.name} = {_quoted(run.session_id or '')} AND {AGENT.name} = {_quoted(run.agent_name)}"
    principal = "IS NULL" if run.principal is None else f"= {_quoted(run.principal)}"
    completed = f"{PRINCIPAL.name} {principal} AND ExecutionStatus = 'Completed'"
    if run.started_at is not None:  # later runs of the session may have ended while it waited for an answer
        completed += f" AND CloseTime < '{run.started_at.isoformat()}'"
    return f"{workflows_of(RUN_WORKFLOW, run.flock)} AND {of} AND {completed}"


def _milliseconds(time: datetime) -> int:
    return max(0, (time - EPOCH) // timedelta(milliseconds=1))


def _quoted(text: str) -> str:
    return "'" + keyword_of(text).replace("'", "''") + "'"
