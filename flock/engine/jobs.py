"""Jobs in the batch endpoints of providers: the calls of a batch's items, submitted together for half the price.

The engine that works on a batch owns its jobs. A job is stored with its calls before anything is sent, and the id of
its provider after that has accepted it. If the process dies in between, or the answer is lost, the provider is asked
for a job with our id before anything is sent again. A reply and the end of the wait for it are one transaction.
"""

import contextlib
import logging
import math
from collections.abc import AsyncIterator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import anyio

from flock.agents.agent import ModelAgent
from flock.engine.runner import Runner
from flock.errors import ModelError, OwnershipLost, StoreError, cut
from flock.fair import FairShare
from flock.models.batchapi import MAX_BYTES, MAX_CALLS, WINDOW_S, BatchEndpoint, RemoteJob, Result
from flock.models.models import Model, models_of
from flock.models.prices import Budget, priced
from flock.models.providers import endpoint_of, target_of
from flock.models.replies import TRANSIENT, model_error
from flock.models.requests import rejects_format
from flock.runs import Batch, new_id, now
from flock.steps.raised import raised_by
from flock.store.port import RETRY_AFTER_S, Job, Reply

logger = logging.getLogger("flock.runs")

#: How often the jobs of a batch are looked after, and how long calls are collected while others follow, in seconds.
TICK_S, COLLECT_S = 0.25, 60.0
#: A job is polled again after this share of its age, within these limits, in seconds.
POLL_SHARE, MIN_POLL_S, MAX_POLL_S = 0.1, 1.0, 60.0
#: A job that has not ended this long after its window is cancelled, and given up after this time again, in seconds.
MAX_DELAY_S = 3600.0
#: A job or a file is gone if its provider has said so for this long, in seconds.
GONE_S = 600.0
#: How many replies one transaction writes.
CHUNK_SIZE = 100
#: How long the provider may take to accept a cancellation, in seconds.
CANCEL_TIMEOUT_S = 30.0
#: What OpenAI says if more calls are enqueued than the account may have. They are put into smaller jobs, after a pause.
TOO_MANY_ENQUEUED, ENQUEUE_PAUSE_S = "token_limit_exceeded", 60.0


class Items(Protocol):
    """The items of the batch.

    Attributes:
        is_over: the engine shuts down, or the batch was cancelled: leave everything as it is.
        is_stopped: no more calls may be made.
    """

    @property
    def is_over(self) -> bool: ...

    @property
    def is_stopped(self) -> bool: ...

    async def is_idle(self) -> bool:
        """Whether no item runs or can start now, so no more calls come."""


@dataclass(eq=False)
class Jobs:
    """The jobs of one batch.

    Args:
        store: see ``flock.store.jobs``.
        budget: of the batch, in which open jobs hold what they will probably cost.

    Attributes:
        is_running, has_run: ``run`` is running, or was.
        has_open: there are jobs whose replies are still awaited.
    """

    batch: Batch
    store: Any
    runner: Runner
    budget: Budget | None

    def __post_init__(self) -> None:
        self.is_running = self.has_run = self.has_open = False
        self._max_calls, self._not_before = MAX_CALLS, 0.0
        #: when a job was done last, by the loop's clock
        self._done_at = -math.inf
        #: jobs that no provider can have
        self._unsent = set[str]()
        #: why calls have no reply, by jobs that will not give more; None if another job is to be made for them
        self._rest = dict[str, ModelError | None]()
        #: the jobs that were open when the provider said that too much is enqueued, until one of them has ended
        self._full_with = set[str]()
        #: when a job is looked after next, by the loop's clock, and with what error that fails since when
        self._next, self._failing = dict[str, float](), dict[str, tuple[str, float]]()

    async def run(self, items: Items) -> None:
        """Submit the calls of *items* that wait, and give them the replies, until there are no more.

        Cancellation: everything is in the store, and continues at the next start.
        """
        self.is_running = self.has_run = True
        self._items = items
        try:
            while not items.is_over:
                try:
                    if not await self._is_left():
                        return
                    await anyio.sleep(TICK_S)
                except StoreError as exc:
                    logger.error("batch %s: its jobs cannot be read or written: %s", self.batch.batch_id, exc)
                    await anyio.sleep(RETRY_AFTER_S)
        except OwnershipLost:
            pass  # whoever works on the batch notices it too
        finally:
            self.is_running = self.has_open = False
            del self._items  # they refer to their jobs

    async def _is_left(self) -> bool:
        """Do what is due now. Return whether there are jobs, or calls for them. Raises OwnershipLost, StoreError."""
        jobs = await self.store.open(self.batch)
        count, first = await self.store.new_calls(self.batch, self._max_calls)
        self.has_open = bool(jobs)
        if not jobs and (not count or self._items.is_stopped):
            return False
        for job in jobs:
            if anyio.current_time() >= self._next.get(job.job_id, 0) and not self._items.is_over:
                await self._look_after(job)
        if count and first is not None and not self._items.is_stopped:
            await self._collect(count, (now() - first).total_seconds(), has_open=bool(jobs))
        return True

    async def cancel(self) -> None:
        """Cancel all jobs at their providers. What they have done until then is kept, in case of a retry."""
        jobs, cancelled = await self.store.open(self.batch), list[Job]()

        async def cancel(job: Job) -> None:
            try:
                with anyio.fail_after(CANCEL_TIMEOUT_S):
                    while not await self._is_cancelled(job):  # noqa: ASYNC110 - it asks the provider
                        await anyio.sleep(MIN_POLL_S)
                cancelled.append(job)
            except (ModelError, TimeoutError) as exc:
                template = "batch %s: the job %s could not be cancelled at the provider of %s: %s"
                logger.error(template, self.batch.batch_id, job.provider_id or job.job_id, job.target, exc)

        async with anyio.create_task_group() as tasks:
            for job in jobs:
                tasks.start_soon(cancel, job)
        for job in cancelled:
            await self.store.cancelled(self.batch, job)

    async def _is_cancelled(self, job: Job) -> bool:
        """Cancel a job, unless its provider does not have it. Return False if that failed for a while."""
        if job.job_id in self._unsent:
            return True
        try:
            endpoint = await self._endpoint(job.target)
            provider_id = job.provider_id or await self._find(endpoint, job)
            remote = None if provider_id is None else await endpoint.get(provider_id)
            if remote is not None and not remote.is_final and remote.status != "cancelling":
                await endpoint.cancel(remote.id)
        except ModelError as exc:
            if exc.error_type not in TRANSIENT:
                raise
            return False
        return True

    async def hold(self) -> None:
        """Let the budget hold what calls in jobs will probably cost that may still get a reply."""
        if self.budget is not None:
            held = await self.store.held(self.batch.batch_id)
            self.budget.hold(sum(cost for job_id, (cost, _) in held.items() if job_id not in self._rest))

    async def _collect(self, count: int, waited_s: float, *, has_open: bool) -> None:
        """Make a job if there are enough new calls, or they have waited long enough, or no more will come."""
        if self._full_with or anyio.current_time() < self._not_before:
            return
        is_idle = await self._items.is_idle()
        if count < self._max_calls and waited_s < COLLECT_S and not is_idle:
            return
        budget, is_too_little = self.budget, False

        def costs(calls: Sequence[tuple[str, int, int | None]], size: int, total: int) -> list[int]:
            """Return the costs of as many calls as fit into a file and the budget."""
            nonlocal is_too_little
            chosen = list[int]()
            for model, length, max_tokens in calls:
                is_first, size, cost = not size, size + length + 1, 0
                if budget is not None:
                    expected = budget.expected_in_batch(model, length // 4, max_tokens, total)
                    is_too_little, cost = expected is None, expected or 0
                if is_too_little or (size > MAX_BYTES and not is_first):
                    break
                chosen.append(cost)
                total += cost
            return chosen

        self._unsent.add(job_id := new_id())
        job = await self.store.create(self.batch, job_id, self._max_calls, costs)
        if job is not None:
            await self.hold()
            await self._look_after(job)
            return
        self._unsent.discard(job_id)
        self._not_before = anyio.current_time() + MIN_POLL_S
        if is_too_little and is_idle and not has_open and budget is not None:  # nothing that would free some is left
            budget.is_used_up = True

    async def _look_after(self, job: Job) -> None:
        """Submit or poll a job, or end it. What fails for a while is tried again."""
        pause_s = min(max(POLL_SHARE * job.age_s, MIN_POLL_S), MAX_POLL_S)
        if job.job_id not in self._rest:
            try:
                endpoint = await self._endpoint(job.target)
                await (self._submit if job.provider_id is None else self._poll)(endpoint, job)
                self._failing.pop(job.job_id, None)
            except ModelError as exc:
                failed_s = self._failed_s(job, exc)
                pause_s = min(max(failed_s, MIN_POLL_S), MAX_POLL_S)
                template = "batch %s: the job %s of %s: %s %s"
                logger.warning(
                    template, self.batch.batch_id, job.provider_id or job.job_id, job.target, exc, exc.log_detail
                )
                is_late = job.age_s > WINDOW_S + MAX_DELAY_S and failed_s > MAX_DELAY_S
                if exc.error_type not in TRANSIENT and (is_late or job.job_id in self._unsent):
                    self._rest[job.job_id] = exc
            if job.job_id in self._rest:
                await self.hold()
        if job.job_id in self._rest:
            await self._end(job)
            pause_s = 0
        self._next[job.job_id] = anyio.current_time() + pause_s

    def _failed_s(self, job: Job, error: ModelError) -> float:
        """Return for how long a job has failed with this type of error, in seconds."""
        at = anyio.current_time()
        error_type, since = self._failing.get(job.job_id, ("", at))
        self._failing[job.job_id] = (error.error_type, since if error_type == error.error_type else at)
        return at - self._failing[job.job_id][1]

    async def _endpoint(self, target: str) -> BatchEndpoint:
        """Return the endpoint of a model of this program. Raises ModelError."""
        model = self._models().get(target)
        if model is None:
            raise model_error(target, "model_not_found", "is not a model of this program any more")
        return BatchEndpoint(self.runner.executor.models, await endpoint_of(model))

    def _models(self) -> dict[str, Model]:
        executor, found = self.runner.executor, dict[str, Model]()
        agents = [agent for agent in executor.agents.values() if isinstance(agent, ModelAgent)]
        for model in (*(m for agent in agents for m in models_of(agent.model, "")), *executor.models.default_model):
            with contextlib.suppress(ModelError, LookupError):  # it has no address
                found.setdefault(target_of(model), model)
        return found

    async def _find(self, endpoint: BatchEndpoint, job: Job) -> str | None:
        remote = await endpoint.find(job.job_id, job.created_at / 10**6 - WINDOW_S)
        return None if remote is None else remote.id

    async def _submit(self, endpoint: BatchEndpoint, job: Job) -> None:
        """Send a job, unless the provider has it: an answer may have been lost. Raises ModelError."""
        found = None
        if job.job_id not in self._unsent:  # until the provider has said so, its calls may be paid already
            found = await self._find(endpoint, job)
            if found is None:
                self._unsent.add(job.job_id)
            done = f"the provider has it as {found}" if found else "the provider does not have it, so it is sent again"
            logger.warning(
                "batch %s: whether the job %s was sent is unknown; %s", self.batch.batch_id, job.job_id, done
            )
        count, size = await self.store.size(job)
        if found is None and (job.is_cancelled or not count):
            self._rest[job.job_id] = None
            return
        if found is None:
            file_id = await endpoint.upload(f"flockapi-{job.job_id}", size, self._lines(job))
            if self._items.is_over:
                return
            self._unsent.discard(job.job_id)
            try:
                found = (await endpoint.create(file_id, job.job_id)).id
            except ModelError as exc:
                if exc.error_type not in TRANSIENT:
                    self._unsent.add(job.job_id)
                raise
        await self.store.submitted(self.batch, job, found)
        logger.info("batch %s: %d calls of %s are in the job %s", self.batch.batch_id, count, job.target, found)

    async def _lines(self, job: Job) -> AsyncIterator[bytes]:
        after, share = "", FairShare()
        while page := await self.store.lines(job, after):
            yield b"".join(line + b"\n" for _, line in page)
            after = page[-1][0]
            await share.checkpoint()

    async def _poll(self, endpoint: BatchEndpoint, job: Job) -> None:
        """Ask for the state of a job, and if it has ended, give its replies to the items. Raises ModelError."""
        assert job.provider_id is not None
        try:
            remote = await endpoint.get(job.provider_id)
        except ModelError as exc:
            if exc.error_type != "model_not_found" or self._failed_s(job, exc) < GONE_S:
                raise
            reason = f"has no job {job.provider_id} any more"
            self._rest[job.job_id] = model_error(job.target, "model_unavailable", reason)
            return
        late_s = job.age_s - WINDOW_S
        if remote.is_final:
            await self._take(endpoint, job, remote)
        elif late_s > 2 * MAX_DELAY_S:
            self._rest[job.job_id] = model_error(job.target, "model_timeout", "has a job that did not end in a day")
        elif late_s > MAX_DELAY_S and remote.status != "cancelling":  # then it has the replies that were done
            await endpoint.cancel(remote.id)

    async def _take(self, endpoint: BatchEndpoint, job: Job, remote: RemoteJob) -> None:
        """Give the replies of a job to its items, and decide about the calls that have none."""
        unknown, waits = 0, job.is_cancelled or self._falls_back(job)
        for file_id in filter(None, (remote.output_file_id, remote.error_file_id)):
            page, share = list[tuple[str, Reply]](), FairShare()
            try:
                async with contextlib.aclosing(endpoint.results(file_id)) as results:
                    async for result in results:
                        reply = None if result is None else self._reply_of(job, result, waits=waits)
                        if result is None:
                            unknown += 1
                        elif reply is not None:
                            page.append((result.custom_id, reply))
                        if len(page) >= CHUNK_SIZE:
                            unknown += await self._give(job, page)
                            page = []
                        if self._items.is_over:
                            return
                        await share.checkpoint()
            except ModelError as exc:
                if exc.error_type != "model_not_found" or self._failed_s(job, exc) < GONE_S:
                    raise  # the rest is read again, and what has a reply is skipped
                logger.warning("batch %s: the file %s of a job is gone", self.batch.batch_id, file_id)
            unknown += await self._give(job, page)
        if unknown:
            template = "batch %s: the job %s has %d lines that are unreadable, or have a reply already"
            logger.warning(template, self.batch.batch_id, remote.id, unknown)
        reason = f"did not answer this call in its job {remote.id}, which is {remote.status}"
        error = model_error(job.target, "model_unavailable", reason, remote.problem)
        is_again = job.is_cancelled
        if TOO_MANY_ENQUEUED in remote.problem:
            is_again |= await self._wait_for_room(job)
        else:
            self._done_at = anyio.current_time()
        self._rest[job.job_id] = None if is_again else error

    async def _wait_for_room(self, job: Job) -> bool:
        """Make smaller jobs, unless another one has used the room. Return False if this one cannot be smaller."""
        others = [each.job_id for each in await self.store.open(self.batch) if each.provider_id is not None]
        self._full_with = {*others} - {job.job_id, *self._rest}
        if self._full_with or anyio.current_time() - self._done_at < job.age_s:
            return True
        count: int = (await self.store.size(job))[0]
        self._max_calls, self._not_before = max(1, count // 2), anyio.current_time() + ENQUEUE_PAUSE_S
        return count > 1

    def _reply_of(self, job: Job, result: Result, *, waits: bool) -> Reply | None:
        """Return the reply for an item; None if the call is to be decided about when the others have theirs.

        Args:
            waits: other errors than those of the call itself are not its reply.
        """
        if result.completion is not None:
            model = result.completion.model
            usage = priced(self.runner.executor.prices, result.completion.usage, model, is_batch=True)
            return Reply(result.completion, usage, model)
        assert result.error is not None
        is_own = result.is_own and not rejects_format(result.error)
        return self._failed(job, result.error) if is_own or not waits else None

    def _failed(self, job: Job, error: ModelError) -> Reply:
        usage, model = error.usage, error.model or None
        usage = None if usage is None else priced(self.runner.executor.prices, usage, model, is_batch=True)
        raised = raised_by(job.target, error)
        return Reply(None, usage, model, cut(str(error)), error.error_type, raised)

    def _falls_back(self, job: Job) -> bool:
        model = self._models().get(job.target)
        return model is None or model.batch_fallback

    async def _give(self, job: Job, page: Sequence[tuple[str, Reply]]) -> int:
        """Give replies to the items. Return how many are for no open call."""
        given = set(await self.store.reply(self.batch, job, page)) if page else set[str]()
        self._count(reply for id_, reply in page if id_ in given)
        if given:
            await self.hold()
        return len(page) - len(given)

    def _count(self, replies: Iterable[Reply]) -> None:
        budgets = (self.budget, self.runner.day_budget_of(self.batch))
        for usage in (reply.usage for reply in replies if reply.usage is not None):
            for budget in filter(None, budgets):
                budget.add(usage)
            self.runner.executor.notify("tokens_spent", self.batch.agent_name, usage)

    async def _end(self, job: Job) -> None:
        """Let the calls of a job that have no reply fall back to normal calls, or fail, or wait for another job.

        First the items with replies get to their ends: if the batch is stopped, they must not be paid again.
        """
        if not await self._items.is_idle():
            return
        error = self._rest[job.job_id]
        if error is not None:
            reply = Reply() if self._falls_back(job) else self._failed(job, error)
            if reply == Reply() and await self.store.rest(job, 1):
                logger.warning("batch %s: normal calls replace those of a job. %s", self.batch.batch_id, error)
            while not self._items.is_stopped and (ids := await self.store.rest(job, CHUNK_SIZE)):
                await self._give(job, [(id_, reply) for id_ in ids])
        if self._items.is_over:
            return
        await self.store.end(self.batch, job)
        for state in (self._rest, self._failing):
            state.pop(job.job_id, None)
        if job.job_id in self._full_with:
            self._full_with.clear()
        await self.hold()
