"""The pace of model calls: how fast a provider accepts them, and whether it answers at all.

All calls with one key of a provider share a ``Pace``. It does not throttle before the first refusal. A refusal halves
the rate, which then grows again (AIMD), and all calls wait as long as the provider asks. ``Rate`` and ``Breaker``
decide, and receive the time as an argument. At a ``Gate``, callers wait for their decisions.
"""

import contextlib
import logging
import math
from collections import deque
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from datetime import timedelta
from typing import Any

import anyio
import msgspec
from anyio.lowlevel import RunVar

from flock.errors import ModelError
from flock.runs import now as utc_now
from flock.scopes import clocks_stopped

logger = logging.getLogger("flock.llm")

#: Max seconds of one wait that a provider asks for. Then an item of a batch asks again, and a run fails at once.
MAX_WAIT_S = 120.0
#: A call that has another model to ask does not wait longer than this for the first one, in seconds.
FALLBACK_WAIT_S = 5.0
#: How long a provider is left alone after an outage, by calls that another model may answer, in seconds.
LEFT_ALONE_S = 30.0
#: After how many refusals in a row a quota counts as used up, so that items of batches do not wait for it any longer.
QUOTA_REFUSALS = 3
#: The pause after a refusal because of the quota, in seconds, and after the last of them.
QUOTA_PROBE_PAUSE_S, QUOTA_PAUSE_S = 5.0, 60.0
#: The first and the longest pause before a provider that did not answer is asked again, in seconds.
MIN_PROBE_PAUSE_S, MAX_PROBE_PAUSE_S = 1.0, 15.0
#: After a longer wait, one call is sent first, and the others when it is accepted.
PROBE_AFTER_S = 1.0
#: Waits that are shorter are not reported.
REPORT_AFTER_S = 1.0


# The rate


class _Window:
    """Measures how often something happens: over the last 5 s, or longer if that has fewer than ``MIN_EVENTS``."""

    SECONDS, MAX_SECONDS = 5.0, 60.0
    MIN_EVENTS = 20

    def __init__(self) -> None:
        self._times: deque[float] = deque()

    def add(self, now: float) -> None:
        self._times.append(now)
        self._forget(now)

    def count(self, now: float) -> int:
        self._forget(now)
        return len(self._times)

    def per_s(self, now: float, shortest_s: float) -> float:
        self._forget(now)
        return len(self._times) / max(now - self._times[0], shortest_s) if self._times else 0.0

    def _forget(self, now: float) -> None:
        times = self._times
        while times and times[0] < now - (self.SECONDS if len(times) > self.MIN_EVENTS else self.MAX_SECONDS):
            times.popleft()


class _Bucket:
    """A token bucket: it fills at *per_s*, up to *capacity*."""

    def __init__(self, per_s: float, capacity: float) -> None:
        self.per_s, self.capacity = per_s, capacity
        self.level = capacity
        self._at = -math.inf

    def wait_s(self, now: float, amount: float = 1) -> float:
        """Return the seconds until *amount* can be taken, or the whole capacity, if that is less."""
        if now > self._at:
            self.level = min(self.capacity, self.level + self.per_s * (now - self._at))
            self._at = now
        if self.capacity == math.inf:
            return 0.0
        missing = min(amount, self.capacity) - self.level
        return missing / self.per_s if missing > 1e-9 else 0.0

    def take(self, amount: float = 1) -> None:
        self.level -= amount


class Rate:
    """The number of calls per second that a provider accepts, learned from its refusals.

    The rate after a refusal is half of the current one, but not less than what the provider accepts at the same time.
    Refusals because of an overload (529) change nothing unless they are many, since they may hit any call.

    Args:
        shortest_s: the shortest time over which a rate is measured.
    """

    #: Growth after a refusal: by ``exp(GROWTH t²)`` in t seconds, so 1 % in the first one, and tenfold in 15.
    GROWTH = 0.01
    #: Beyond this growth there is no limit.
    UNLIMITED = 1e4
    #: The rate after a refusal, as a share of the calls that were within the limit, or were answered in an overload.
    WITHIN_LIMIT, IN_OVERLOAD = 0.95, 1.25
    #: The share of overloads that is ignored, and how many calls are assumed to have been answered before.
    OVERLOADS_IGNORED, ANSWERED_BEFORE = 0.2, 4
    #: The lowest rate, in calls per second.
    MINIMUM = 1 / 30

    def __init__(self, shortest_s: float = 0.5) -> None:
        self._shortest_s = shortest_s
        self._sent, self._within_limit, self._answered = _Window(), _Window(), _Window()
        self._base = math.inf
        self._cut_at = self._grows_from = -math.inf
        self._bucket = _Bucket(1, 1)

    def restart(self, now: float, per_s: float) -> None:
        """Continue after an outage with *per_s*, so that waiting calls are not sent at once."""
        self._base, self._cut_at, self._grows_from = max(self.MINIMUM, per_s), now, now
        self._bucket = _Bucket(1, 1)

    def current(self, now: float) -> float:
        """Return the rate, or the calls that were sent in the last seconds, if they are fewer."""
        return min(self.per_s(now), self._sent.per_s(now, self._shortest_s))

    def per_s(self, now: float) -> float:
        if self._base < math.inf:
            growth = math.exp(min(self.GROWTH * max(0.0, now - self._grows_from) ** 2, 50))
            if growth < self.UNLIMITED:
                return self._base * growth
            self._base = math.inf
        return math.inf

    def wait_s(self, now: float) -> float:
        """Return the seconds until the next call may be sent."""
        per_s = self.per_s(now)
        if per_s == math.inf:
            return 0.0
        self._bucket.per_s, self._bucket.capacity = per_s, max(1.0, per_s)
        return self._bucket.wait_s(now)

    def sent(self, now: float) -> None:
        self._sent.add(now)
        if self._base < math.inf:
            self._bucket.take()

    def answered(self, now: float) -> None:
        self._within_limit.add(now)
        self._answered.add(now)

    def refused(self, now: float, sent_at: float, *, is_overload: bool, until: float) -> None:
        """Halve the rate, unless the call was sent before it was halved last. Nothing is sent before *until*."""
        if is_overload:
            self._within_limit.add(now)
            within_limit, answered = self._within_limit.count(now), self._answered.count(now)
            if within_limit - answered <= self.OVERLOADS_IGNORED * (within_limit + self.ANSWERED_BEFORE):
                return
        if sent_at < self._cut_at:
            return
        current = self.current(now)
        if is_overload:
            floor = self.IN_OVERLOAD * self._answered.per_s(now, self._shortest_s)
        else:
            floor = self.WITHIN_LIMIT * self._within_limit.per_s(now, self._shortest_s)
        if self._base == math.inf:
            self._bucket = _Bucket(1, 1)
        self._base = max(self.MINIMUM, current / 2, min(floor, current))
        self._cut_at, self._grows_from = now, max(now, until)


class Breaker:
    """A circuit breaker: while it is open, no call may pass before a time, and then one, to find out about the others.

    Attributes:
        error: why it is open.
        probe: the call that was let through.
    """

    def __init__(self) -> None:
        self.is_open = False
        self.error: ModelError | None = None
        self.opened_at = self.until = -math.inf
        self.probe: object = None
        self._needs_probe = False

    def open(self, now: float, until: float, error: ModelError | None, *, needs_probe: bool = True) -> None:
        self.is_open, self.error, self.opened_at = True, error and _again(error), now
        self.until = max(self.until, until)
        self._needs_probe = needs_probe or (self._needs_probe and self.until > until)

    def close(self) -> None:
        self.is_open, self.until, self.probe = False, -math.inf, None

    def wait_s(self, now: float) -> float:
        """Return the seconds until the next call may pass; infinity if that depends on the call that has passed."""
        if not self.is_open or now < self.until:
            return max(0.0, self.until - now) if self.is_open else 0.0
        if not self._needs_probe:
            self.close()
        return math.inf if self.probe is not None else 0.0


def _again(error: ModelError, more: str = "") -> ModelError:
    """Return an equal error without a traceback, which would grow each time that it is raised."""
    return ModelError(f"{error}{more}", error.error_type, error.log_detail)


# Waiting


class Caller(msgspec.Struct, frozen=True, kw_only=True):
    """The caller of a model, with everything that affects how long it waits.

    Attributes:
        is_item: it is an item of a batch, which can wait. Runs go first, since clients may wait for them.
        has_fallback: there is another model to ask next.
        models: how many models may be asked. If there are several, an item waits for the first one that is back.
        have_all_failed: none of the models has answered, so that a provider is not left alone for long.
        server_errors: an entry for each status 500 that the call has received.
        on_wait: called with what the call waits for, and with None when it no longer waits.
    """

    is_item: bool = False
    has_fallback: bool = False
    models: int = 1
    have_all_failed: bool = False
    server_errors: list[int] = []
    on_wait: Callable[[str | None], None] = lambda reason: None


class Passage:
    """A call that is about to be sent, or on its way.

    Attributes:
        tokens: an estimate of its tokens, or what the provider has counted.
        sent_at: when it passed the last gate.
        headers: of the response.
    """

    def __init__(self, tokens: float = 0) -> None:
        self.tokens = self.estimate = tokens
        self.sent_at = -math.inf
        self.headers: Mapping[str, str] = {}


async def wait(seconds: float, caller: Caller, reason: str) -> None:
    """Wait, and report it if it takes long."""
    if seconds < REPORT_AFTER_S:
        await anyio.sleep(seconds)
        return
    caller.on_wait(_until(reason, seconds))
    try:
        await anyio.sleep(seconds)
    finally:
        caller.on_wait(None)


def _until(reason: str, seconds: float) -> str:
    if seconds == math.inf:
        return reason
    return f"{reason} until {utc_now() + timedelta(seconds=seconds):%H:%M:%S}Z"


class Gate:
    """Lets calls pass one after the other, runs before items of batches, each in FIFO order.

    Only the first waiting call looks at the clock. When it passes, it wakes the next one, so a crowd is never woken at
    once. A call that is cancelled while it waits leaves nothing behind.
    """

    def __init__(self) -> None:
        self._runs: dict[Passage, anyio.Event] = {}
        self._items: dict[Passage, anyio.Event] = {}
        #: the gates whose calls wait there until they may pass here
        self.gates: list[Gate] = []

    # To be overridden

    #: What a call waits for, in words.
    reason = ""

    def check(self, now: float, caller: Caller) -> None:
        """Raise ModelError if waiting is of no use."""

    def wait_s(self, now: float, caller: Caller, passage: Passage) -> float:
        """Return the seconds until a call may pass; infinity if that depends on others."""
        raise NotImplementedError

    def admit(self, now: float, caller: Caller, passage: Passage) -> None:
        """Count a call that passes."""

    def leave(self, passage: Passage) -> None:
        """Count a call that has ended, or did not reach the provider."""

    # Waiting

    @property
    def waiting(self) -> int:
        return len(self._runs) + len(self._items)

    async def enter(self, caller: Caller, passage: Passage) -> None:
        """Wait until the call may pass. Raises ModelError if waiting is of no use."""
        queue, began_at = self._items if caller.is_item else self._runs, anyio.current_time()
        is_reported = False
        queue[passage] = anyio.Event()
        try:
            if self._first() is queue[passage] and self.wait_s(began_at, caller, passage) <= 0:
                self.check(began_at, caller)
                self.admit(began_at, caller, passage)  # as most calls: no clock has to be stopped for them
                return
            with clocks_stopped():
                while True:
                    now = anyio.current_time()
                    self.check(now, caller)
                    wait_s = self.wait_s(now, caller, passage) if self._first() is queue[passage] else math.inf
                    if wait_s <= 0:
                        self.admit(now, caller, passage)
                        return
                    if not is_reported and now - began_at >= REPORT_AFTER_S:
                        is_reported = True
                        caller.on_wait(_until(self.reason, wait_s))
                    with anyio.move_on_after(wait_s if is_reported else min(wait_s, REPORT_AFTER_S)):
                        await queue[passage].wait()
                    queue[passage] = anyio.Event()
        finally:
            del queue[passage]
            self.wake()
            if is_reported:
                caller.on_wait(None)

    def _first(self) -> anyio.Event | None:
        return next(iter((self._runs or self._items).values()), None)

    def wake(self) -> None:
        """Let the first waiting call look again."""
        if first := self._first():
            first.set()
        for gate in self.gates:
            gate.wake()

    def wake_all(self) -> None:
        for event in (*self._runs.values(), *self._items.values()):
            event.set()
        for gate in self.gates:
            gate.wake_all()


@contextlib.asynccontextmanager
async def passing(gates: Sequence[Gate], caller: Caller, passage: Passage) -> AsyncGenerator[None, None]:
    """Pass all gates, and leave them at the end. Raises ModelError if waiting is of no use."""
    entered: list[Gate] = []
    try:
        for gate in gates:
            await gate.enter(caller, passage)
            entered.append(gate)
        passage.sent_at = anyio.current_time()
        yield
    finally:
        for gate in entered:
            gate.leave(passage)


class ModelLimits(Gate):
    """The limits that a ``Model`` names.

    A call passes when it may also pass its pace, so that it holds no slot while it waits for its provider.

    Args:
        limits: requests per minute, tokens per minute, and calls at the same time; None means no limit.
        pace: the pace of its provider.
    """

    #: How many seconds of tokens may be used at once. Requests are spread, but one call needs many tokens.
    TOKEN_BURST_S = 10

    def __init__(self, name: str, limits: tuple[int | None, int | None, int | None], pace: "Pace") -> None:
        super().__init__()
        self._name, self._pace = name, pace
        pace.gates.append(self)
        requests, tokens, calls = (math.inf if limit is None else limit / _processes for limit in limits)
        self._requests = _Bucket(requests / 60, max(1.0, requests / 60))
        self._tokens = _Bucket(tokens / 60, tokens / 60 * self.TOKEN_BURST_S)
        self._free = max(1.0, calls)

    @property
    def reason(self) -> str:  # type: ignore[override]
        if self._pace.outage.is_open or self._pace.limit.is_open:
            return self._pace.reason
        return f"waiting for the limits of the Model {self._name}"

    async def enter(self, caller: Caller, passage: Passage) -> None:
        """Wait as any gate, but at most ``FALLBACK_WAIT_S`` if there is another model to ask."""
        if not caller.has_fallback:
            return await super().enter(caller, passage)
        spread_s = self._requests.wait_s(anyio.current_time()) + self.waiting / self._requests.per_s
        if spread_s <= FALLBACK_WAIT_S:
            with anyio.move_on_after(FALLBACK_WAIT_S):
                return await super().enter(caller, passage)
        message = f"The limits of the Model {self._name} mean a wait of more than {FALLBACK_WAIT_S:g} s."
        raise ModelError(message, "model_rate_limited")

    def check(self, now: float, caller: Caller) -> None:
        self._pace.check(now, caller)

    def wait_s(self, now: float, caller: Caller, passage: Passage) -> float:
        if self._free < 1:
            return math.inf
        own_s = max(self._requests.wait_s(now), self._tokens.wait_s(now, passage.estimate))
        return max(own_s, self._pace.wait_s(now, caller, passage))

    def admit(self, now: float, caller: Caller, passage: Passage) -> None:
        self._free -= 1
        self._requests.take()
        self._tokens.take(passage.estimate)

    def leave(self, passage: Passage) -> None:
        self._free += 1
        self._tokens.take(passage.tokens - passage.estimate)
        self.wake()


class Pace(Gate):
    """The pace of all calls with one key of a provider.

    Args:
        provider: its name.
        shortest_s: see ``Rate``.
    """

    def __init__(self, provider: str, shortest_s: float = 0.5) -> None:
        super().__init__()
        self.provider = provider
        self.rate = Rate(shortest_s)
        #: the provider asked to wait; it does not answer; the quota is used up
        self.limit, self.outage, self.quota = Breaker(), Breaker(), Breaker()
        #: how many calls in a row were refused because of the quota, of those that were sent after one another
        self._quota_refusals = 0
        self._asked_until = -math.inf
        self._pause_s = self._rate_before = 0.0
        #: when the last call was sent that got an answer
        self.answered_sent_at = -math.inf

    @property
    def reason(self) -> str:  # type: ignore[override]
        if self.outage.is_open:
            return f"waiting for {self.provider}, which does not answer,"
        if self.quota.is_open:
            return f"waiting to see whether {self.provider} has quota again"
        return f"waiting for the rate limit of {self.provider}"

    def waits_for_quota(self, caller: Caller) -> bool:
        """Whether *caller* waits after a refusal because of the quota, which may have been a mistake or be cured."""
        return caller.is_item and not caller.has_fallback and self._quota_refusals < QUOTA_REFUSALS

    def check(self, now: float, caller: Caller) -> None:
        if self.quota.error is not None and self.quota.wait_s(now) > 0 and not self.waits_for_quota(caller):
            if now < self.quota.until or caller.has_fallback:
                raise _again(self.quota.error)
        if (caller.has_fallback or (caller.models > 1 and caller.is_item)) and self.outage.is_open:
            is_short = caller.have_all_failed or not caller.has_fallback
            until = self.outage.until if is_short else self.outage.opened_at + LEFT_ALONE_S
            if self.outage.error is not None and (now < until or self.outage.probe is not None):
                raise LeftAlone(self, self.outage.error)
        if self.limit.error is None:
            return
        if self.limit.is_open and now < self.limit.until:
            asked_s = self._asked_until - now
            is_too_long = asked_s > MAX_WAIT_S and not caller.is_item
            is_too_late = now + min(asked_s, MAX_WAIT_S) > anyio.current_effective_deadline()
            if is_too_long or is_too_late or (caller.has_fallback and asked_s > FALLBACK_WAIT_S):
                raise _again(self.limit.error, f" It asks to wait {asked_s:.1f} s.")
        if caller.has_fallback and self.waiting > FALLBACK_WAIT_S * self.rate.per_s(now):
            raise _again(self.limit.error)

    def wait_s(self, now: float, caller: Caller, passage: Passage) -> float:
        return max(*(breaker.wait_s(now) for breaker in self._breakers(caller)), self.rate.wait_s(now))

    def admit(self, now: float, caller: Caller, passage: Passage) -> None:
        self.rate.sent(now)
        for breaker in self._breakers(caller):
            if breaker.is_open:
                breaker.probe = passage

    def _breakers(self, caller: Caller) -> Sequence[Breaker]:
        """Return the breakers that stop a call. A run without another model to ask tries even during an outage."""
        if caller.is_item or caller.has_fallback:
            return self.quota, self.limit, self.outage
        return self.quota, self.limit

    def leave(self, passage: Passage) -> None:
        for breaker in (self.quota, self.limit, self.outage):
            if breaker.probe is passage:
                breaker.probe = None
        self.wake()

    # What a call reveals about its provider

    def answered(self, now: float, passage: Passage, hold_s: float = 0.0) -> None:
        """A call was answered. *hold_s* is the time until the next one is possible, as the answer says."""
        self.answered_sent_at = max(self.answered_sent_at, passage.sent_at)
        self.rate.answered(now)
        self._pause_s = 0.0
        for breaker in (self.quota, self.limit, self.outage):
            if breaker.is_open and (breaker.probe is passage or passage.sent_at > breaker.opened_at):
                breaker.close()
                if breaker is self.quota:
                    self._quota_refusals = 0
                if breaker is self.outage and (self.waiting or any(gate.waiting for gate in self.gates)):
                    self.rate.restart(now, self._rate_before)
        if hold_s > 0:
            self._asked_until = now + hold_s
            self.limit.open(now, now + min(hold_s, MAX_WAIT_S), self.limit.error, needs_probe=False)
        self.wake()

    def refused(
        self, now: float, passage: Passage, error: ModelError, asked_s: float | None, *, is_overload: bool
    ) -> None:
        """A call was refused, since there are too many. *asked_s* is how long the provider asks to wait."""
        pause_s = min(asked_s or 0.0, MAX_WAIT_S)
        if self.limit.probe is passage and not asked_s:
            self._pause_s = pause_s = min(MAX_PROBE_PAUSE_S, max(MIN_PROBE_PAUSE_S, 2 * self._pause_s))
        if self.rate.per_s(now) == math.inf:
            logger.info("%s refuses calls, so they are sent more slowly. %s", self.provider, error)
        self.rate.refused(now, passage.sent_at, is_overload=is_overload, until=now + pause_s)
        self.limit.error = _again(error)
        if pause_s > 0:
            self._asked_until = now + (asked_s or 0.0)
            self.limit.open(now, now + pause_s, error, needs_probe=pause_s > PROBE_AFTER_S)
            self.wake_all()

    def failed(self, now: float, passage: Passage, error: ModelError, *, is_last: bool, has_others: bool) -> None:
        """A call could not reach the provider, or the provider failed. *is_last*: the call is not repeated at once."""
        if self.outage.probe is passage:
            longest_s = FALLBACK_WAIT_S if has_others else MAX_PROBE_PAUSE_S
            self._pause_s = min(longest_s, max(MIN_PROBE_PAUSE_S, 2 * self._pause_s))
        elif self.outage.is_open or not is_last:
            return
        else:
            self._pause_s, self._rate_before = MIN_PROBE_PAUSE_S, self.rate.current(now)
            logger.warning("%s does not answer. %s", self.provider, error)
        self.outage.open(now, now + self._pause_s, error)
        self.wake_all()

    def exhausted(self, now: float, passage: Passage, error: ModelError) -> None:
        """A call was refused, since the quota of the key is used up."""
        if not self.quota.is_open or self.quota.probe is passage:
            self._quota_refusals += 1
            pause_s = QUOTA_PAUSE_S if self._quota_refusals >= QUOTA_REFUSALS else QUOTA_PROBE_PAUSE_S
            logger.warning("%s Calls with this key fail at once for %g s.", error, pause_s)
            self.quota.open(now, now + pause_s, error)
        self.wake_all()


class LeftAlone(ModelError):
    """A provider is not asked, since it has an outage."""

    def __init__(self, pace: Pace, error: ModelError) -> None:
        super().__init__(str(error), error.error_type, error.log_detail)
        self.pace = pace


class AllOut(Gate):
    """The gate at which an item waits if all of its models have an outage, until one of them may be asked."""

    def __init__(self, paces: Sequence[Pace]) -> None:
        super().__init__()
        self._paces = paces
        self.reason = f"waiting for {' or '.join(dict.fromkeys(pace.provider for pace in paces))}, which do not answer,"
        for pace in paces:
            pace.gates.append(self)

    def wait_s(self, now: float, caller: Caller, passage: Passage) -> float:
        return min(pace.outage.wait_s(now) for pace in self._paces)


# Sharing

_paces: RunVar[dict[Any, Any]] = RunVar("flock_paces")
_processes = 1


def paces_of_loop() -> dict[Any, Any]:
    """Return the gates that all engines of this event loop share, by key."""
    paces = _paces.get(None)
    if paces is None:
        _paces.set(paces := {})
    return paces


def share_limits_among(processes: int) -> None:
    """Let this process use its part of the limits that models name."""
    global _processes
    _processes = processes
