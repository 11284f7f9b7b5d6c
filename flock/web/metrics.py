"""Prometheus metrics of one app: the requests that it answered, and what its engine tells an ``Observer``.

Names follow the semantic conventions of OpenTelemetry where they have one. Every label's values are bounded: agents
that were defined, statuses, methods and routes that there are.
"""

import functools
import math
import os
import weakref
from collections.abc import Callable, Collection
from datetime import datetime
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from flock.runs import Engine, Queue, Run, Step, Usage, now

__all__ = ["Metrics", "metrics_of"]

FOLDER = "PROMETHEUS_MULTIPROC_DIR"

#: In seconds: from a function that adds two numbers to a model that thinks for an hour.
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)

#: RFC 9110, section 9, and PATCH; a client may send any word.
METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})


class _Families:
    """What is counted, in one registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Histogram(
            "http_server_request_duration_seconds",
            "HTTP requests, from their first byte to the last one of the answer.",
            ["http_request_method", "http_route", "http_response_status_code"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.event_streams = Gauge(
            "flock_event_streams", "Event streams that are open.", registry=registry, multiprocess_mode="livesum"
        )
        self.runs = Counter("flock_runs", "Runs that ended.", ["agent_name", "status"], registry=registry)
        self.run_s = Histogram(
            "flock_run_duration_seconds",
            "One attempt of a run, from its first step to its end.",
            ["agent_name"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.step_s = Histogram(
            "flock_step_duration_seconds",
            "One agent's turn that gave a result.",
            ["agent_name"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self.tokens = Counter(
            "flock_tokens", "Tokens that models took and gave.", ["agent_name", "token_type"], registry=registry
        )
        self.retries = Counter(
            "flock_retries", "Attempts after the first one, of runs and of calls to models.", ["of"], registry=registry
        )
        self.queued = Gauge(
            "flock_queued_runs",
            "Runs that wait for their first step, in all processes on the store; items of batches left out.",
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self.oldest_s = Gauge(
            "flock_oldest_queued_run_age_seconds",
            "How long the oldest of them has waited; 0 where none waits.",
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        for of in ("run", "model_call"):
            self.retries.labels(of)  # so that the first one is seen as a change


#: In a folder that processes share there is one place for each value of a process.
_shared_families = functools.cache(_Families)


class Metrics:
    """An ``Observer`` of one engine that also counts the requests of the apps on it; see ``metrics_of``.

    Where ``PROMETHEUS_MULTIPROC_DIR`` was set before prometheus_client was imported, what is shown is the sum over all
    processes that share it.

    Args:
        agents: names that may become a label's value; read anew each time.

    Attributes:
        event_streams: within its ``track_inprogress()`` an event stream is open.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, agents: Collection[str]) -> None:
        self._agents = agents
        self._families = _shared_families() if FOLDER in os.environ else _Families()
        self.event_streams = self._families.event_streams
        # To find the child of a family takes longer than to count.
        self._child: Callable[..., Any] = functools.cache(lambda family, *labels: family.labels(*labels))

    def request_ended(self, method: str, route: str, status_code: int, seconds: float) -> None:
        """Count a request; *route* is a template, such as ``/run/{run_id}``, or empty where none fits."""
        method = method if method in METHODS else "_OTHER"
        self._child(self._families.requests, method, route, str(status_code)).observe(seconds)

    def run_started(self, run: Run) -> None:
        if run.attempt > 1:
            self._child(self._families.retries, "run").inc()

    def step_completed(self, step: Step) -> None:
        agent_name = self._known(step.agent_name)
        self._child(self._families.step_s, agent_name).observe(_seconds(step.started_at, step.completed_at))

    def tokens_spent(self, agent_name: str, usage: Usage) -> None:
        self._child(self._families.tokens, self._known(agent_name), "input").inc(usage.input_tokens)
        self._child(self._families.tokens, self._known(agent_name), "output").inc(usage.output_tokens)

    def run_ended(self, run: Run) -> None:
        agent_name = self._known(run.agent_name)
        self._child(self._families.runs, agent_name, run.status.value).inc()
        if run.started_at is not None and run.completed_at is not None:
            self._child(self._families.run_s, agent_name).observe(_seconds(run.started_at, run.completed_at))

    def model_call_retried(self) -> None:
        self._child(self._families.retries, "model_call").inc()

    def page(self, queue: Queue | None) -> bytes:
        """All of it in the text format of Prometheus, with *queue* as it is now; None is not known."""
        self._families.queued.set(math.nan if queue is None else queue.depth)
        oldest_at = now() if queue is None else queue.oldest_at
        self._families.oldest_s.set(0 if oldest_at is None else _seconds(oldest_at, now()))
        registry = self._families.registry
        if FOLDER in os.environ:
            MultiProcessCollector(registry := CollectorRegistry())  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def mark_process_dead(self, process_id: int | None) -> None:
        """A process that shares the folder is gone, and with it what was open there; what it counted stays."""
        mark_process_dead(process_id)  # type: ignore[no-untyped-call]

    def _known(self, agent_name: str) -> str:
        """Runs of an agent that is no more may still be in the store."""
        return agent_name if agent_name in self._agents else "_OTHER"


def _seconds(start: datetime, end: datetime) -> float:
    """Clocks may be set back."""
    return max(0.0, (end - start).total_seconds())


_metrics: "weakref.WeakKeyDictionary[Engine, Metrics]" = weakref.WeakKeyDictionary()


def metrics_of(engine: Engine, agents: Collection[str]) -> Metrics:
    """The metrics of *engine*, however many apps are on it. Raises OSError where the folder cannot be written."""
    if engine not in _metrics:
        _metrics[engine] = Metrics(agents)
        engine.observe(_metrics[engine])
    return _metrics[engine]
