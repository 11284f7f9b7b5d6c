"""A fake provider with a rate limit, and what its answers cost."""

import random
import time
from collections import Counter

import anyio

from flock.runs import Usage
from flock.testing import Failure, FakeModel, ModelRequest, Reply


def usage_of_gpt_4o(input_tokens: int, output_tokens: int) -> Usage:
    """Return these tokens with what they cost at 2.5 and 10 US dollars for a million."""
    return Usage(
        input_tokens=input_tokens,
        output_tokens=output_tokens,
        picodollars=2_500_000 * input_tokens + 10_000_000 * output_tokens,
        priced_tokens=input_tokens + output_tokens,
    )


class LimitedModel(FakeModel):
    """A model that accepts calls at a limited rate, refuses the others with 429, and is randomly overloaded (529).

    Args:
        per_s: the rate. It is a token bucket that holds the calls of *burst_s* seconds.
        overloaded: the share of calls within the limit that are refused with 529. They do not count for the limit.
        latency_s: how long an answer takes.
    """

    def __init__(self, per_s: float, *, overloaded: float = 0.0, burst_s: float = 1.0, latency_s: float = 0.0) -> None:
        super().__init__(self._reply)
        self._per_s, self._overloaded, self._latency_s = per_s, overloaded, latency_s
        self._level = self._capacity = max(1.0, per_s * burst_s)
        self._at = time.monotonic()
        self.statuses: Counter[int] = Counter()

    async def _reply(self, request: ModelRequest) -> Reply | Failure:
        now = time.monotonic()
        self._level, self._at = min(self._capacity, self._level + self._per_s * (now - self._at)), now
        reply: Reply | Failure = Reply({"answer": "yes"})
        if random.random() < self._overloaded:
            reply = Failure(529, "overloaded_error")
        elif self._level >= 1:
            self._level -= 1
        else:
            wait_s = (1 - self._level) / self._per_s
            reply = Failure(429, "rate_limit_exceeded", headers={"retry-after-ms": f"{wait_s * 1000:.0f}"})
        self.statuses[reply.status if isinstance(reply, Failure) else 200] += 1
        await anyio.sleep(self._latency_s)
        return reply

    def share(self, status: int) -> float:
        return self.statuses[status] / max(1, self.statuses.total())
