"""The events that webhooks report, each a workflow of its own, which the workflow of the run or batch starts.

A run or batch ends when the workflow of its last event has started, so no event is lost, and it waits for no receiver.
Histories have neither addresses nor secrets: these are only in the processes that send (``flock.temporal.webhooks``).
The code must be deterministic.
"""

import asyncio
import contextlib
from datetime import timedelta

from msgspec.structs import replace
from temporalio import workflow
from temporalio.common import RetryPolicy, SearchAttributePair, TypedSearchAttributes
from temporalio.exceptions import ActivityError, ApplicationError, FailureError
from temporalio.exceptions import TimeoutError as ActivityTimeout

from flock.runs import Batch, Run, Webhook
from flock.temporal.messages import (
    EARLIER,
    FLOCK,
    TASK_TIMEOUT,
    WEBHOOK,
    WEBHOOK_ACTIVITY,
    WEBHOOK_WORKFLOW,
    keyword_of,
    recoded,
    webhook_id_of,
    webhook_workflow_id,
    webhooks_queue_of,
)

#: The patch since which events are reported.
REPORTS = "webhooks"
#: How long one try may take, with the time to read the run. If its process dies, the next try comes after that.
TRY_TIMEOUT = timedelta(seconds=25)
#: A webhook that no process sends is given up after this time, since its workflow would stay open.
GIVE_UP_AFTER = timedelta(days=7)
#: Processes set the pauses between tries. This is for those that die, or cannot read the run.
RETRIES = RetryPolicy(initial_interval=timedelta(seconds=1), maximum_interval=timedelta(minutes=1))


class Reports:
    """The events of one attempt of a run or batch, if its agent has a receiver."""

    def __init__(self, record: Run | Batch, *, has_receiver: bool) -> None:
        self._record, self._has_receiver = record, has_receiver
        self._last = None if record.attempt == 1 else self._workflow_id(record.attempt - 1)
        self._starts: list[asyncio.Task[None]] = []

    def _workflow_id(self, attempt: int, number: int = 0) -> str:
        record = self._record
        return webhook_workflow_id(record.batch_id if isinstance(record, Batch) else record.run_id, attempt, number)

    async def send(self, what: str, call_id: str | None = None, *, is_end: bool = False) -> None:
        """Have an event sent, after the one before.

        Args:
            what: the type of the event, without ``run.`` or ``batch.`` if it is a status.
            is_end: it is the last one of the attempt. Then its workflow has started when this returns.

        Cancellation: ignored if *is_end*, because the state is reported already.
        """
        if not self._has_receiver or not workflow.patched(REPORTS):
            return
        record = self._record
        kind, record_id = ("batch", record.batch_id) if isinstance(record, Batch) else ("run", record.run_id)
        workflow_id = self._workflow_id(record.attempt, 0 if is_end else len(self._starts) + 1)
        earlier = [self._last] if self._last is not None else []
        if is_end:
            earlier.append(workflow.info().workflow_id)
        webhook = Webhook(
            webhook_id=webhook_id_of(workflow_id),
            type=what if "." in what else f"{kind}.{what}",
            record_id=record_id,
            call_id=call_id,
            agent_name=record.agent_name,
            attempt=record.attempt,
            status="pending",
            tries=0,
            created_at=workflow.now(),
            next_try_at=workflow.now(),
            first_try_at=None,
            ended_at=None,
            error=None,
            url=None,
        )
        self._last = workflow_id
        self._starts.append(asyncio.create_task(self._start(workflow_id, webhook, earlier, self._starts[-1:])))
        while is_end and not self._starts[-1].done():
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.wait(self._starts[-1:])

    async def _start(
        self, workflow_id: str, webhook: Webhook, earlier: list[str], before: list[asyncio.Task[None]]
    ) -> None:
        """Start the workflow of an event, after that of the one *before*."""
        for start in before:
            await start
        with contextlib.suppress(FailureError):  # an operator has reset the run, and it is being sent
            await workflow.start_child_workflow(
                FlockWebhook.run,
                args=[webhook, earlier],
                id=workflow_id,
                memo={WEBHOOK: webhook, EARLIER: earlier},
                search_attributes=TypedSearchAttributes([SearchAttributePair(FLOCK, keyword_of(self._record.flock))]),
                parent_close_policy=workflow.ParentClosePolicy.ABANDON,
                task_timeout=TASK_TIMEOUT,
            )


@workflow.defn(name=WEBHOOK_WORKFLOW)
class FlockWebhook:
    """One webhook, until its receiver has accepted it or it is given up, and then it fails. Its memo has its state.

    Args:
        earlier: the workflows that end before it is sent: that of the event before it, and at the end of a run or batch
            its own, which then has the state that is reported.
    """

    @workflow.run
    async def run(self, webhook: Webhook, earlier: list[str]) -> None:
        try:
            ended = await workflow.execute_activity(
                WEBHOOK_ACTIVITY,
                args=[webhook, earlier],
                result_type=Webhook,
                task_queue=webhooks_queue_of(workflow.info().task_queue),
                start_to_close_timeout=TRY_TIMEOUT,
                schedule_to_close_timeout=GIVE_UP_AFTER,
                retry_policy=RETRIES,
            )
        except ActivityError as exc:
            tried = exc.cause.last_heartbeat_details if isinstance(exc.cause, ActivityTimeout) else ()
            webhook = recoded(tried[0], Webhook) if tried else webhook
            error = f"It was not sent within {GIVE_UP_AFTER.days} days. {webhook.error or ''}".rstrip()
            ended = replace(webhook, status="given_up", ended_at=workflow.now(), error=error)
            workflow.logger.error("The webhook %s of %s was given up: %s", webhook.type, webhook.record_id, error)
        workflow.upsert_memo({WEBHOOK: ended})
        if ended.status == "given_up":
            raise ApplicationError(ended.error or "", type=ended.status, non_retryable=True)
