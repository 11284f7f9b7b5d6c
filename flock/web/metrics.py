"""Prometheus metrics of one app: its HTTP requests, and the events that its engine reports to an ``Observer``.

Names follow the OpenTelemetry semantic conventions if these define one. The values of every label are bounded: defined
agents, statuses, known methods, and routes.
"""

import functools
import math
import os
import sys
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping
from datetime import datetime
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector, mark_process_dead
from prometheus_client.registry import Collector

from flock import __version__
from flock.runs import DOLLAR, Call, Engine, Observer, Queue, Run, RunStatus, Step, Usage, now

FOLDER = "PROMETHEUS_MULTIPROC_DIR"

#: In seconds, from a trivial function to a model that takes an hour.
BUCKETS_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 900, 3600)

#: The methods of RFC 9110, section 9, and PATCH. A client can send any other word.
METHODS = frozenset({"CONNECT", "DELETE", "GET", "HEAD", "OPTIONS", "PATCH", "POST", "PUT", "TRACE"})


_ALL = "in all processes on the store"
#: The gauges that only ``page`` sets: name, description and labels, by field of ``Queue``. A time is shown as an age.
OF_QUEUE: Mapping[str, tuple[Any, ...]] = {
    "depth": ("flock_queued_runs", f"Runs that wait for their first step, {_ALL}, without items of batches."),
    "by_agent": (
        "flock_queued_runs_of_agent",
        f"Runs of an agent that wait for their first step, {_ALL}, without items of batches.",
        ["agent_name"],
    ),
    "asking": ("flock_waiting_runs", f"Runs that wait for answers of people, {_ALL}, without items of batches."),
    "oldest_at": (
        "flock_oldest_queued_run_age_seconds",
        "How long the oldest queued run has waited, or 0 if no run is queued.",
    ),
    "questions": ("flock_open_questions", f"Questions that wait for answers, {_ALL}."),
    "oldest_question_at": (
        "flock_oldest_open_question_age_seconds",
        "How long the oldest open question has waited, or 0 if none is open.",
    ),
    "webhooks": ("flock_pending_webhooks", f"Webhooks that wait to be sent, {_ALL}."),
    "oldest_webhook_at": (
        "flock_oldest_pending_webhook_age_seconds",
        "How long the oldest pending webhook has waited, or 0 if none is pending.",
    ),
}
#: The suffixes of the names of a metric's samples. OpenTelemetry has no observable histogram, so it gets counters.
ENDS = {"gauge": ("",), "counter": ("_total",), "histogram": ("_bucket", "_count", "_sum")}


class _Families:
    """The metrics in one registry."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        counter = functools.partial(Counter, registry=registry)
        gauge = functools.partial(Gauge, registry=registry, multiprocess_mode="mostrecent")
        histogram = functools.partial(Histogram, registry=registry, buckets=BUCKETS_S)
        self.requests = histogram(
            "http_server_request_duration_seconds",
            "Duration of HTTP requests, from the first byte of the request to the last byte of the response.",
            ["http_request_method", "http_route", "http_response_status_code"],
        )
        self.event_streams = gauge("flock_event_streams", "Open event streams.", multiprocess_mode="livesum")
        self.runs = counter("flock_runs", "Runs that ended.", ["agent_name", "status"])
        self.run_s = histogram(
            "flock_run_duration_seconds",
            "Duration of one attempt of a run, from its first step to its end.",
            ["agent_name"],
        )
        self.step_s = histogram(
            "flock_step_duration_seconds", "Duration of a step that returned a result.", ["agent_name"]
        )
        self.call_s = histogram(
            "flock_call_duration_seconds", "Duration of a call that a step made.", ["kind", "status"]
        )
        self.tokens = counter("flock_tokens", "Input and output tokens of models.", ["agent_name", "token_type"])
        self.dollars = counter(
            "flock_cost_dollars", "Cost of model calls in US dollars, for models that have a price.", ["agent_name"]
        )
        self.retries = counter("flock_retries", "Attempts of runs and of model calls after the first one.", ["of"])
        self.webhooks = counter(
            "flock_webhooks", "Tries to send webhooks, by outcome: sent, failed, given_up.", ["status"]
        )
        self.of_queue = {field: gauge(*described) for field, described in OF_QUEUE.items()}
        for of in ("run", "model_call"):
            self.retries.labels(of)  # starts at 0, so that Prometheus sees the first retry as an increase


#: A process has only one file for each metric in a shared folder, so all apps of the process share the metrics.
_shared_families = functools.cache(_Families)


class Metrics(Observer, Collector):
    """An ``Observer`` of one engine that also counts the requests of the apps on it; see ``metrics_of``.

    If ``PROMETHEUS_MULTIPROC_DIR`` was set before prometheus_client was imported, ``page`` shows the sum over all
    processes that share the folder.

    Args:
        agents: the names that may become a label's value. Agents that are added later count too.

    Attributes:
        event_streams: the gauge of open event streams. Use its ``track_inprogress()`` while a stream is open.
    """

    media_type = CONTENT_TYPE_LATEST

    def __init__(self, agents: Collection[str]) -> None:
        self._agents = agents
        self._families = _shared_families() if FOLDER in os.environ else _Families()
        self.event_streams = self._families.event_streams
        # Cached, since finding the child of a metric takes longer than counting.
        self._child: Callable[..., Any] = functools.cache(lambda family, *labels: family.labels(*labels))

    def request_ended(self, method: str, route: str, status_code: int, seconds: float) -> None:
        """Count a request. *route* is a template, such as ``/run/{run_id}``, or empty if no route matched."""
        method = method if method in METHODS else "_OTHER"
        self._child(self._families.requests, method, route, str(status_code)).observe(seconds)

    def run_started(self, run: Run) -> None:
        if run.attempt > 1:
            self._child(self._families.retries, "run").inc()

    def step_completed(self, step: Step) -> None:
        agent_name = self._known(step.agent_name)
        self._child(self._families.step_s, agent_name).observe(_seconds(step.started_at, step.completed_at))

    def call_completed(self, call: Call) -> None:
        status = RunStatus.COMPLETED if call.error is None else RunStatus.FAILED
        seconds = _seconds(call.started_at, call.completed_at)
        self._child(self._families.call_s, call.kind, status.value).observe(seconds)

    def tokens_spent(self, agent_name: str, usage: Usage) -> None:
        self._child(self._families.tokens, self._known(agent_name), "input").inc(usage.input_tokens)
        self._child(self._families.tokens, self._known(agent_name), "output").inc(usage.output_tokens)
        if usage.priced_tokens:
            self._child(self._families.dollars, self._known(agent_name)).inc(usage.picodollars / DOLLAR)

    def run_ended(self, run: Run) -> None:
        agent_name = self._known(run.agent_name)
        self._child(self._families.runs, agent_name, run.status.value).inc()
        if run.started_at is not None and run.completed_at is not None:
            self._child(self._families.run_s, agent_name).observe(_seconds(run.started_at, run.completed_at))

    def model_call_retried(self) -> None:
        self._child(self._families.retries, "model_call").inc()

    def webhook_tried(self, status: str, count: int) -> None:
        self._child(self._families.webhooks, status).inc(count)

    def page(self, queue: Queue | None) -> bytes:
        """Return all metrics in the text format of Prometheus. *queue* is None if its length is unknown."""
        for field, gauge in self._families.of_queue.items():
            value = getattr(queue, field, None)
            if field == "by_agent":
                for name in self._agents:
                    gauge.labels(name).set(math.nan if value is None else value.get(name, 0))
            elif field.endswith("_at"):
                gauge.set(0 if value is None else _seconds(value, now()))
            else:
                gauge.set(math.nan if value is None else value)
        registry = self._families.registry
        if FOLDER in os.environ:
            MultiProcessCollector(registry := CollectorRegistry())  # type: ignore[no-untyped-call]
        return generate_latest(registry)

    def collect(self) -> Iterable[Any]:
        """Return the metrics of this process, without those of the queue, for a registry of the host."""
        of_queue = {name for name, *_ in OF_QUEUE.values()}
        return [family for family in self._families.registry.collect() if family.name not in of_queue]

    def observe_with(self, api: Any) -> None:
        """Have the meter provider of OpenTelemetry read the same figures. *api* is ``opentelemetry.metrics``."""
        meter = api.get_meter("flockapi", __version__)

        def observed(name: str, end: str, options: object) -> list[Any]:
            samples = [sample for family in self.collect() if family.name == name for sample in family.samples]
            return [api.Observation(each.value, each.labels) for each in samples if each.name == name + end]

        for family in self.collect():
            kind = "gauge" if family.type == "gauge" else "counter"
            for end in ENDS[family.type]:
                callbacks = [functools.partial(observed, family.name, end)]
                make = getattr(meter, f"create_observable_{kind}")
                make(family.name + end, callbacks, description=family.documentation)

    def mark_process_dead(self, process_id: int | None) -> None:
        """Drop the gauges of a process that has ended. Its counters stay in the sum."""
        mark_process_dead(process_id)  # type: ignore[no-untyped-call]

    def _known(self, agent_name: str) -> str:
        """Return the label for *agent_name*. The store may still have runs of an agent that was removed."""
        return agent_name if agent_name in self._agents else "_OTHER"


def _seconds(start: datetime, end: datetime) -> float:
    """Return the time between both, but not less than 0, since clocks may be set back."""
    return max(0.0, (end - start).total_seconds())


_metrics: "weakref.WeakKeyDictionary[Engine, Metrics]" = weakref.WeakKeyDictionary()


def metrics_of(engine: Engine, agents: Collection[str]) -> Metrics:
    """Return the metrics of *engine*, which all apps on it share. A meter provider of the host gets them too.

    Raises: OSError if the folder is not writable.
    """
    if engine not in _metrics:
        _metrics[engine] = Metrics(agents)
        engine.observe(_metrics[engine])
        api = sys.modules.get("opentelemetry.metrics")
        # The providers of the API itself do nothing: the host has set none.
        if api is not None and not type(api.get_meter_provider()).__module__.startswith("opentelemetry.metrics"):
            _metrics[engine].observe_with(api)
    return _metrics[engine]
