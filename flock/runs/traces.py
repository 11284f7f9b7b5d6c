"""Spans of requests, runs, steps and calls, and the trace context that is sent on.

OpenTelemetry is not imported here: a program that wants spans has imported it, and has set a tracer provider. Without
one, each function returns at once. No exception of a tracer reaches a run.

Source: W3C Trace Context; OpenTelemetry semantic conventions for generative AI, 0.1.0.
"""

import contextlib
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextvars import ContextVar
from typing import Any, Self

import msgspec

from flock import __version__
from flock.runs.records import Batch, CallKind, Run, RunStatus
from flock.runs.text import valid_traceparent
from flock.runs.usage import Usage, added

logger = logging.getLogger("flock.runs")

#: The variable that asks for content in spans, and its values.
CONTENT_VARIABLE = "OTEL_INSTRUMENTATION_GENAI_CAPTURE_MESSAGE_CONTENT"
WITH_CONTENT = ("true", "span_only", "span_and_event")
#: The variable that leaves principals out of spans and of the log, if it is "false".
PRINCIPAL_VARIABLE = "FLOCK_TELEMETRY_PRINCIPAL"
#: The first rows of a batch have spans, and after them each row whose position is a multiple of the second number.
SPANNED_ROWS, SPANNED_STRIDE = 100, 1000
#: The names of counts of tokens, below ``gen_ai.usage``.
TOKENS = ("input_tokens", "output_tokens", "cache_read.input_tokens", "reasoning.output_tokens")


def _api(name: str = "opentelemetry.trace") -> Any:
    """Return a module of OpenTelemetry, or None if the program has not imported it."""
    return sys.modules.get(name)


def _tracer() -> Any:
    return None if (api := _api()) is None else _safely(lambda: _tracer_of(api, api.get_tracer_provider()))


@functools.lru_cache(maxsize=4)
def _tracer_of(api: Any, provider: Any) -> Any:
    """Return a tracer, or None if no provider is set, or it makes no spans."""
    tracer = None if isinstance(provider, api.ProxyTracerProvider) else provider.get_tracer("flockapi", __version__)
    return None if isinstance(tracer, api.NoOpTracer) else tracer


def _safely(call: Callable[[], Any]) -> Any:
    """Return what a call of OpenTelemetry returns, or None if it raises."""
    try:
        return call()
    except Exception as exc:
        _warn(type(exc).__name__)


@functools.cache
def _warn(name: str) -> None:
    """Log an exception of a tracer, but only the first one of its type: there may be one for each span."""
    logger.warning("Spans are missing, because the tracer raised %s.", name, exc_info=True)


class Span:
    """A span that ends with its block. An exception that leaves the block makes it an error, without its text.

    Args:
        span: of OpenTelemetry; None does nothing.
        pauses: exceptions that end the block because it waits, which is an event of the span.

    Attributes:
        usage: the tokens that were spent in the block.
    """

    usage: Usage | None = None

    def __init__(self, span: Any, pauses: tuple[type[BaseException], ...] = ()) -> None:
        self._span, self._pauses, self._token = span, pauses, None

    def __enter__(self) -> Self:
        if self._span is not None:
            self._token = _safely(lambda: _api("opentelemetry.context").attach(_api().set_span_in_context(self._span)))
        return self

    def __exit__(self, type_: object, exc: BaseException | None, traceback: object) -> None:
        if self._span is None:
            return
        if self._token is not None and not isinstance(exc, GeneratorExit):  # that may come in another context
            _safely(lambda: _api("opentelemetry.context").detach(self._token))
        if isinstance(exc, self._pauses):
            kinds = sorted({wait.kind or "question" for wait in getattr(exc, "questions", ())})
            self._do("add_event", "flock.waiting", {"flock.waits": kinds})
        elif isinstance(exc, Exception):
            _safely(lambda: self.fail(getattr(exc, "error_type", None) or type(exc).__name__))
        if (spent := self.usage) is not None:
            counts = spent.input_tokens, spent.output_tokens, spent.cached_tokens, spent.reasoning_tokens
            tokens = {f"gen_ai.usage.{name}": count or None for name, count in zip(TOKENS, counts, strict=True)}
            self.note({**tokens, "flock.cost": spent.cost})
        self._do("end")

    def _do(self, method: str, *args: Any) -> None:
        _safely(lambda: getattr(self._span, method)(*args))

    def note(self, attributes: Mapping[str, Any]) -> None:
        """Set the attributes that are not None."""
        if self._span is not None:
            self._do("set_attributes", _known(attributes))

    def fail(self, error_type: str) -> None:
        if self._span is not None:
            self.note({"error.type": error_type})
            _safely(lambda: self._span.set_status(_api().StatusCode.ERROR))

    def responded(self, method: str, route: str, status_code: int) -> None:
        """Note the response of a request."""
        if self._span is None:
            return
        self._do("update_name", f"{method} {route}".strip())
        self.note({"http.route": route or None, "http.response.status_code": status_code or None})
        if status_code >= 500:
            self.fail(str(status_code))

    def ended(self, run: Run) -> None:
        """Note how a run has ended, or that it waits."""
        if self._span is not None:
            self.note({"flock.run.status": run.status.value, "flock.cost": run.usage and run.usage.cost})
            if run.status is RunStatus.FAILED:
                self.fail(run.error_type or "failed")

    def content(self, attributes: Callable[[], Mapping[str, Any]]) -> None:
        """Set attributes with content as JSON, if the operator has asked for that."""
        if self._span is not None and os.environ.get(CONTENT_VARIABLE, "").lower() in WITH_CONTENT:
            _safely(lambda: self.note({name: _as_text(value) for name, value in attributes().items()}))


OFF = Span(None)
#: The span of the model call that the current task makes.
CHAT: ContextVar[Span | None] = ContextVar("flock_chat", default=None)


def _as_text(value: Any) -> str:
    return value if isinstance(value, str) else msgspec.json.encode(value, enc_hook=str).decode()


def _known(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in attributes.items() if value is not None}


def _start(
    name: str,
    attributes: Mapping[str, Any],
    kind: str = "INTERNAL",
    *,
    context: Any = None,
    first: str | None = None,
    pauses: tuple[type[BaseException], ...] = (),
) -> Span:
    """Start a span below the current one, or in *context*, with a link to that of the ``traceparent`` *first*."""

    def start() -> Any:
        links = [] if first is None else [_api().Link(_span_context(first))]
        return _tracer().start_span(name, context, _api().SpanKind[kind], _known(attributes), links)

    return Span(span, pauses) if (span := _safely(start)) is not None else OFF


def _span_context(traceparent: str) -> Any:
    _, trace_id, span_id, flags = traceparent.split("-")
    return _api().SpanContext(int(trace_id, 16), int(span_id, 16), True, _api().TraceFlags(int(flags, 16)))


def _below(traceparent: str | None) -> Any:
    """Return the context of a ``traceparent``, or one in which a new trace begins."""
    sent = valid_traceparent(traceparent)
    parent = _api().INVALID_SPAN if sent is None else _api().NonRecordingSpan(_span_context(sent))
    return _api().set_span_in_context(parent)


def current(default: str | None = None) -> str | None:
    """Return the ``traceparent`` of the current span, or *default* if there is none."""
    api = _api()
    found = None if api is None else _safely(lambda: api.get_current_span().get_span_context())
    if found is None or not found.is_valid:
        return default
    return f"00-{found.trace_id:032x}-{found.span_id:016x}-{found.trace_flags:02x}"


def of_request(method: str, path: str, traceparent: Callable[[], str | None]) -> Span:
    """Start the span of a request that may change something, unless the host has one."""
    if _tracer() is None or method in ("GET", "HEAD", "OPTIONS") or current() is not None:
        return OFF
    attributes = {"http.request.method": method, "url.path": path}
    return _start(method, attributes, "SERVER", context=_safely(lambda: _below(traceparent())))


def principal_of(run: Run | Batch) -> str | None:
    """Return the principal of a run or a batch, unless the operator leaves it out."""
    return None if os.environ.get(PRINCIPAL_VARIABLE, "").lower() == "false" else run.principal


def of_run(run: Run) -> Span:
    """Start the span of a run, from where it is admitted in this process until it ends or waits.

    It belongs to the trace of its request, wherever it is executed, and links to the first execution.
    """
    if _tracer() is None:
        return OFF
    attributes: dict[str, Any] = {"gen_ai.agent.name": run.agent_name, "gen_ai.conversation.id": run.session_id}
    attributes |= {"flock.run.id": run.run_id, "flock.batch.id": run.batch_id, "flock.run.attempt": run.attempt}
    attributes["enduser.id"] = principal_of(run)
    parent, row = run.traceparent or run.first_span, run.position or 0
    if row >= SPANNED_ROWS and row % SPANNED_STRIDE:  # spans below a parent that is not sampled are not recorded
        trace_id = run.run_id.replace("-", "")
        parent = (parent or f"00-{trace_id}-{1:016x}-01")[:-2] + "00"
    context = _safely(lambda: _below(parent))
    return _start(f"run {run.agent_name}", attributes, context=context, first=run.first_span)


def of_step(run: Run, agent_name: str, *pauses: type[BaseException]) -> Span:
    """Start the span of an execution of a step, which ends when the step waits with one of *pauses*."""
    if _tracer() is None:
        return OFF
    attributes = {"gen_ai.conversation.id": run.session_id, "flock.step.position": len(run.steps)}
    return _start_operation("invoke_agent", "agent", agent_name, attributes, pauses)


def of_call(kind: CallKind, label: str, call_id: str) -> Span:
    """Start the span of a call of a function, a tool or an agent. Other calls have none, or that of ``of_chat``."""
    if kind not in ("function", "tool", "agent") or _tracer() is None:
        return OFF
    attributes = {"flock.call.id": call_id}
    if kind == "function":
        return _start(f"call {label}", attributes)
    return _start_operation("execute_tool" if kind == "tool" else "invoke_agent", kind, label, attributes)


def _start_operation(operation: str, of: str, name: str, attributes: Mapping[str, Any], pauses: Any = ()) -> Span:
    attributes = {"gen_ai.operation.name": operation, f"gen_ai.{of}.name": name, **attributes}
    return _start(f"{operation} {name}", attributes, pauses=pauses)


@contextlib.contextmanager
def of_chat(model: str, max_tokens: int | None, temperature: float | None) -> Iterator[Span]:
    """Start the span of a model call, with all its attempts and the models that are asked instead."""
    if _tracer() is None:
        yield OFF
        return
    provider, _, name = model.partition("/")
    attributes = {"gen_ai.operation.name": "chat", "gen_ai.provider.name": provider, "gen_ai.request.model": name}
    options = {"gen_ai.request.max_tokens": max_tokens, "gen_ai.request.temperature": temperature}
    with _start(f"chat {name}", {**attributes, **options}, "CLIENT") as span:
        before = CHAT.set(span if span is not OFF else None)  # all share that one
        try:
            yield span
        finally:
            with contextlib.suppress(ValueError):  # it may be closed in another context
                CHAT.reset(before)


def spent(usage: Usage) -> None:
    """Add the tokens of an answer to the span of the current model call."""
    if (span := CHAT.get()) is not None:
        span.usage = added(span.usage, usage)
