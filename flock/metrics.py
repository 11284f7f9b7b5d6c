"""Prometheus metrics of one app: the requests that it answered, and what its engine tells an ``Observer``.

Names follow the semantic conventions of OpenTelemetry where they have one. Every label's values are bounded: agents
that were defined, statuses, methods and routes that there are.
"""

import math
import os
from collections.abc import Collection
from datetime import datetime

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead

from flock.runs import Queue, Run, Step, now

__all__ = ["Metrics"]

#: In seconds: from a function that adds two numbers to a model that thinks for an hour.
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)

#: RFC 9110, section 9, and PATCH; a client may send any word.
METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})


class Metrics:
    """An ``Observer`` of an engine that also counts requests. Each has a registry of its own.

    Where ``PROMETHEUS_MULTIPROC_DIR`` was set before prometheus_client was imported, what is shown is the sum over all
    processes that share it.

    Args:
        agents: names that may become a label's value; read anew each time.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, agents: Collection[str]) -> None:
        self._agents = agents
        self._registry = registry = CollectorRegistry()
        self._requests = Histogram(
            "http_server_request_duration_seconds",
            "HTTP requests, from their first byte to the last one of the answer.",
            ["http_request_method", "http_route", "http_response_status_code"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        #: an inner context of it is an open event stream
        self.event_streams = Gauge(
            "flock_event_streams", "Event streams that are open.", registry=registry, multiprocess_mode="livesum"
        )
        self._runs = Counter("flock_runs", "Runs that ended.", ["agent_name", "status"], registry=registry)
        self._run_s = Histogram(
            "flock_run_duration_seconds",
            "One attempt of a run, from its first step to its end.",
            ["agent_name"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._step_s = Histogram(
            "flock_step_duration_seconds",
            "One agent's turn that gave a result.",
            ["agent_name"],
            buckets=BUCKETS_S,
            registry=registry,
        )
        self._tokens = Counter(
            "flock_tokens", "Tokens that models took and gave.", ["agent_name", "token_type"], registry=registry
        )
        self._retries = Counter(
            "flock_retries", "Attempts after the first one, of runs and of calls to models.", ["of"], registry=registry
        )
        self._queued = Gauge(
            "flock_queued_runs",
            "Runs that wait for their first step, in all processes on the store; items of batches left out.",
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        self._oldest_s = Gauge(
            "flock_oldest_queued_run_age_seconds",
            "How long the oldest of them has waited; 0 where none waits.",
            registry=registry,
            multiprocess_mode="mostrecent",
        )
        for of in ("run", "model_call"):
            self._retries.labels(of)  # so that the first one is seen as a change

    def request_ended(self, method: str, route: str, status_code: int, seconds: float) -> None:
        """Count a request; *route* is a template, such as ``/run/{run_id}``, or empty where none fits."""
        self._requests.labels(method if method in METHODS else "_OTHER", route, str(status_code)).observe(seconds)

    def run_started(self, run: Run) -> None:
        if run.attempt > 1:
            self._retries.labels("run").inc()

    def step_completed(self, step: Step) -> None:
        agent_name = self._known(step.agent_name)
        self._step_s.labels(agent_name).observe(_seconds(step.started_at, step.completed_at))
        if step.usage is not None:
            self._tokens.labels(agent_name, "input").inc(step.usage.input_tokens)
            self._tokens.labels(agent_name, "output").inc(step.usage.output_tokens)

    def run_ended(self, run: Run) -> None:
        agent_name = self._known(run.agent_name)
        self._runs.labels(agent_name, run.status.value).inc()
        if run.started_at is not None and run.completed_at is not None:
            self._run_s.labels(agent_name).observe(_seconds(run.started_at, run.completed_at))

    def model_call_retried(self) -> None:
        self._retries.labels("model_call").inc()

    def page(self, queue: Queue | None) -> bytes:
        """All of it in the text format of Prometheus, with *queue* as it is now; None is not known."""
        self._queued.set(math.nan if queue is None else queue.depth)
        oldest_at = now() if queue is None else queue.oldest_at
        self._oldest_s.set(0 if oldest_at is None else _seconds(oldest_at, now()))
        registry = self._registry
        if "PROMETHEUS_MULTIPROC_DIR" in os.environ:
            MultiProcessCollector(registry := CollectorRegistry())  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def forget_process(self, process_id: int | None) -> None:
        """A process that shares the folder is gone, and with it what was open there; what it counted stays."""
        mark_process_dead(process_id)  # type: ignore[no-untyped-call]

    def _known(self, agent_name: str) -> str:
        """Runs of an agent that is no more may still be in the store."""
        return agent_name if agent_name in self._agents else "_OTHER"


def _seconds(start: datetime, end: datetime) -> float:
    """Clocks may be set back."""
    return max(0.0, (end - start).total_seconds())
