"""Webhooks on a cluster: an activity of API processes sends them, and the search of the cluster lists them.

Each is a workflow (``flock.temporal.reports``), whose activity is tried until the webhook is sent or given up. Between
two tries it holds nothing. The last heartbeat of the activity has the state of the webhook, for the next try and for
lists. Whether its host can get a request now is decided by the process that tries it.
"""

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from datetime import UTC, datetime, timedelta
from uuid import UUID

from msgspec.structs import replace
from temporalio import activity
from temporalio.client import WorkflowExecution, WorkflowExecutionDescription, WorkflowExecutionStatus
from temporalio.common import WorkflowIDConflictPolicy
from temporalio.exceptions import ApplicationError, ApplicationErrorCategory
from temporalio.worker import Worker

from flock.errors import EngineFull, NotFound, StoreError
from flock.runs import BatchFilter, Webhook, now
from flock.temporal.cluster import RETRY_AFTER_S, Cluster, logger
from flock.temporal.messages import (
    EARLIER,
    FLOCK,
    WEBHOOK,
    WEBHOOK_ACTIVITY,
    WEBHOOK_WORKFLOW,
    decoded,
    keyword_of,
    recoded,
    task_queue_of,
    webhooks_queue_of,
    workflow_id_of_webhook,
)
from flock.temporal.reports import FlockWebhook
from flock.temporal.search import newest_first, order_of, workflows_of

#: Tries to send a webhook, unless its host cannot get a request now. Its arguments are the webhook, and how often it
#: was not tried. Returns the webhook as it is then, and the pause before the next try, in seconds.
TryWebhook = Callable[[Webhook, int], Awaitable[tuple[Webhook, float]]]

#: How many webhooks one process handles at the same time.
MAX_AT_ONCE = 1000
#: The shortest pause before a webhook looks again whether an earlier one has ended, in seconds.
MIN_PAUSE_S = 0.2
#: How long a try waits for the end of a run or batch, and the longest pause before the next one, in seconds.
ENDS_WITHIN_S, MAX_END_PAUSE_S = 5.0, 60.0
#: For each status, that of its workflow.
EXECUTION_STATUS = {"pending": "= 'Running'", "sent": "= 'Completed'", "given_up": "NOT IN ('Running', 'Completed')"}


class TemporalWebhooks:
    """The webhooks of *flock*."""

    def __init__(self, cluster: Cluster, flock: str) -> None:
        self._cluster, self._flock, self._name = cluster, flock, keyword_of(flock)

    async def serve(self, try_: TryWebhook) -> None:
        """Send webhooks with *try_* until cancelled."""

        @activity.defn(name=WEBHOOK_ACTIVITY)
        async def send(webhook: Webhook, earlier: list[str]) -> Webhook:
            try:
                return await self._send(webhook, earlier, try_)
            except asyncio.CancelledError:  # the worker stops, and a cancellation would end the webhook
                raise _again("The process stopped.", 0.1) from None

        while True:
            try:
                worker = Worker(
                    await self._cluster.client_of_worker(),
                    task_queue=webhooks_queue_of(task_queue_of(self._flock)),
                    activities=[send],
                    max_concurrent_activities=MAX_AT_ONCE,
                )
                await worker.run()
            except (StoreError, EngineFull):
                pass  # it is in the log
            except Exception:
                logger.exception("The worker that sends webhooks has failed, and is started again.")
            await asyncio.sleep(RETRY_AFTER_S)

    async def _send(self, webhook: Webhook, earlier: list[str], try_: TryWebhook) -> Webhook:
        """Return the webhook when it is sent or given up. Raises ApplicationError, after which it is tried again."""
        info = activity.info()
        sent, waits = info.heartbeat_details or (webhook, 0)  # waits: attempts that have only waited
        webhook = recoded(sent, Webhook)
        for workflow_id in earlier:
            if (pause_s := await self._pause_after(workflow_id, info.attempt)) is not None:
                activity.heartbeat(webhook, info.attempt)
                raise _again(f"{workflow_id} has not ended.", pause_s)
        webhook, pause_s = await try_(webhook, info.attempt - 1 - waits - webhook.tries)
        if webhook.status == "pending":
            activity.heartbeat(webhook, waits)
            raise _again(webhook.error or "Its host has no room.", pause_s)
        return webhook

    async def _pause_after(self, workflow_id: str, attempt: int) -> float | None:
        """Return how long a webhook waits for an earlier workflow, in seconds, or None if that has ended."""
        is_webhook = workflow_id.startswith("webhook:")
        if not is_webhook:  # a run or batch that is about to end
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ENDS_WITHIN_S):
                    await self._cluster.until_change(workflow_id)
        described = await self._cluster.describe(workflow_id)
        if described is None or described.status is not WorkflowExecutionStatus.RUNNING:
            return None
        if not is_webhook:  # its workers have died
            return min(2.0 ** min(attempt, 6), MAX_END_PAUSE_S)
        left_s = (_next_try_at(described) - now()).total_seconds()
        return max(left_s, 0) + random.uniform(1, 2) * MIN_PAUSE_S

    async def page(self, status: str | None, after: str | None, limit: int) -> list[Webhook]:
        """Return up to *limit* webhooks, those of the newest runs and batches first, from the one after *after* on."""
        query, last = workflows_of(WEBHOOK_WORKFLOW, self._flock), None
        if status is not None:
            query += f" AND ExecutionStatus {EXECUTION_STATUS[status]}"
        if after is not None:
            last = order_of(workflow_id) if (workflow_id := workflow_id_of_webhook(after)) else ("", ())
        until = None if not (last and last[0]) else str(UUID(int=UUID(last[0]).int + 1))
        wanted, page = BatchFilter(after=until, limit=limit), list[Webhook]()
        found = newest_first(self._cluster, query, ("webhook",), wanted, self._read)
        async with aclosing(found) as webhooks:
            async for workflow_id, webhook in webhooks:
                # The search also finds earlier executions, and lags.
                if (last is None or order_of(workflow_id) < last) and status in (None, webhook.status):
                    page.append(webhook)
                if len(page) == limit:
                    break
        return page

    async def _read(self, workflow: WorkflowExecution) -> tuple[str, Webhook]:
        described = await self._cluster.describe(workflow.id)  # its latest execution
        if described is None:
            raise NotFound(f"There is no workflow {workflow.id}.")
        return workflow.id, _state_of(described)

    async def again(self, webhook_id: str) -> Webhook | None:
        """Have a webhook sent again, also one that is being sent. Returns None if there is none."""
        workflow_id = workflow_id_of_webhook(webhook_id)
        described = None if workflow_id is None else await self._cluster.describe(workflow_id)
        if workflow_id is None or described is None or described.typed_search_attributes.get(FLOCK) != self._name:
            return None
        found, at = _state_of(described), now()
        earlier = decoded(described.raw_info.memo.fields[EARLIER], list[str])
        again = replace(found, status="pending", tries=0, first_try_at=None, next_try_at=at, ended_at=None, error=None)
        await self._cluster.start_workflow(
            FlockWebhook.run,
            again,
            earlier,
            flock=self._flock,
            id=workflow_id,
            id_conflict_policy=WorkflowIDConflictPolicy.TERMINATE_EXISTING,
            memo={WEBHOOK: again, EARLIER: earlier},
            search_attributes=described.typed_search_attributes,
        )
        return again


def _state_of(workflow: WorkflowExecutionDescription) -> Webhook:
    webhook = decoded(workflow.raw_info.memo.fields[WEBHOOK], Webhook)
    for pending in workflow.raw_description.pending_activities:
        if pending.HasField("heartbeat_details"):
            webhook = decoded(pending.heartbeat_details.payloads[0], Webhook)
        webhook = replace(webhook, next_try_at=_next_try_at(workflow))
    if workflow.status is not WorkflowExecutionStatus.RUNNING and webhook.status == "pending":
        error = "Its workflow was closed on the cluster before it was sent."
        webhook = replace(webhook, status="given_up", ended_at=workflow.close_time, error=error)
    return webhook


def _next_try_at(workflow: WorkflowExecutionDescription) -> datetime:
    """Return when the next try of a webhook begins, or the current one has begun."""
    for pending in workflow.raw_description.pending_activities:
        return pending.scheduled_time.ToDatetime(UTC)
    return now()


def _again(why: str, pause_s: float) -> ApplicationError:
    """Return the failure after which the cluster tries the activity again."""
    return ApplicationError(
        why,
        type="webhook_pending",
        next_retry_delay=timedelta(seconds=pause_s),
        category=ApplicationErrorCategory.BENIGN,
    )
