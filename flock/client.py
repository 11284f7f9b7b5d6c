"""A client of this API: ``AsyncFlockClient``, and ``FlockClient`` with the same methods for code without async.

Every request is repeated while the server cannot be
reached or is full, and a request that starts something has an ``Idempotency-Key``. So a restart of the server is a
pause, and nothing is started twice.
"""

import asyncio
import contextlib
import functools
import inspect
import os
import random
import tempfile
import threading
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine, Iterable, Iterator, Mapping
from datetime import datetime
from pathlib import Path
from typing import IO, Any, Concatenate, ParamSpec, Self, TypeVar, overload

import anyio
import httpx
import msgspec

from flock.errors import Conflict, FieldError, FlockError, RunFailed
from flock.formats import ENDINGS, FORMATS, each_row, format_of, is_gzipped
from flock.pydanticmodel import from_json
from flock.renamed import renamed
from flock.runs import Progress, RunStatus
from flock.runs.events import Event

__all__ = ["APIError", "AsyncFlockClient", "BatchState", "FlockClient", "OpenQuestion", "RunState", "StreamedOutput"]

T = TypeVar("T")
P = ParamSpec("P")

#: Where ``flockapi serve`` listens.
DEFAULT_URL = "http://127.0.0.1:8344"
#: The responses after which a request is repeated: the server or a proxy could not process it now.
REPEATED = frozenset({408, 429, 502, 503, 504})
#: Those of a server that has not processed it at all.
REFUSED = frozenset({429, 503})
#: The type of the problem while an earlier request with the same key is being accepted.
KEY_IN_USE = "urn:flockapi:problem:idempotency-key-in-use"
#: Pauses before a request is repeated, unless ``Retry-After`` says more. Each is twice the one before.
FIRST_PAUSE_S, MAX_PAUSE_S = 0.2, 5.0
#: For how long one request waits for the end of a run or a batch.
WAIT_S = 30
#: The server sends a comment every 15 seconds, so a stream that is silent for longer is broken.
SILENCE_S = 45.0
#: The events that end the stream of a run.
LAST_EVENTS = ("run.completed", "run.failed", "run.cancelled")
PIECE_BYTES = 64 * 1024


class APIError(FlockError):
    """The server has refused a request (RFC 9457).

    Attributes:
        status: that of HTTP.
        type: of the problem, such as ``urn:flockapi:problem:unknown-agent``; "" if the response is not one of
            this API.
        errors: one for each invalid value, with its JSON pointer.
        request_id: what the log of the server says about this request.
    """

    def __init__(self, response: httpx.Response) -> None:
        self.status, self.type, self.errors = response.status_code, "", list[FieldError]()
        self.request_id = response.headers.get("X-Request-ID")
        detail = response.text[:1000]
        with contextlib.suppress(msgspec.MsgspecError):
            problem = msgspec.json.decode(response.content, type=_Problem)
            self.type, detail, self.errors = problem.type, problem.detail, problem.errors
        super().__init__(f"{detail or response.reason_phrase} (HTTP {self.status})")


class _Problem(msgspec.Struct):
    type: str
    detail: str
    errors: list[FieldError] = []


class OpenQuestion(msgspec.Struct, kw_only=True):
    """A question of a run; ``Question`` of the HTTP API. Only ``questions`` gives *run_id* and *agent_name*.

    Attributes:
        schema: JSON Schema of the answer.
        arguments: what it is about.
    """

    call_id: str
    question: str
    schema: dict[str, Any]
    arguments: dict[str, Any] | None = None
    asked_at: datetime
    expires_at: datetime | None = None
    answerer: str | None = None
    kind: str | None = None
    run_id: str = ""
    agent_name: str = ""


class RunState(msgspec.Struct, kw_only=True):
    """A run as the server last said; ``FlockAPIResponse`` of the HTTP API.

    Attributes:
        waiting_for: its open questions.
        usage: its tokens.
        cost: in US dollars; None if it is unknown.
    """

    run_id: str
    agent_name: str
    status: RunStatus
    result: dict[str, Any] | None
    error: str | None
    error_type: str | None
    attempt: int
    created_at: datetime
    started_at: datetime | None
    completed_at: datetime | None
    progress: Progress | None = None
    usage: dict[str, Any] | None = None
    cost: float | None = None
    steps: list[dict[str, Any]] = []
    waiting_for: list[OpenQuestion] = []

    def value_as(self, type_: type[T]) -> T:
        """Return its result as *type_*. Raises RunFailed if it has none, and msgspec.ValidationError if it differs."""
        if self.result is None:
            raise RunFailed(self.error or f"The run is {self.status}.", self.error_type or self.status)
        return msgspec.convert(self.result, type_, dec_hook=from_json)


class BatchState(msgspec.Struct, kw_only=True):
    """A batch as the server last said, without its results; ``FlockBatchResponse`` of the HTTP API."""

    batch_id: str
    agent_name: str
    status: RunStatus
    total_items: int
    completed_items: int
    failed_items: int
    cancelled_items: int
    waiting_items: int
    progress_percentage: float
    eta_s: float | None
    error: str | None
    attempt: int
    cost: float | None = None
    estimated_cost: float | None = None
    skipped_rows: int = 0


class _QuestionPage(msgspec.Struct):
    questions: list[OpenQuestion]
    next: str | None


class StreamedOutput:
    """The output of the current step of a run, put together from the events of ``events``.

    Attributes:
        fields: what has been written so far, by field. At ``step.completed`` it is the result.
    """

    def __init__(self) -> None:
        self.fields: dict[str, Any] = {}

    def add(self, event: Event) -> None:
        """Apply *event*. Events of other agents, which the step has called, change nothing."""
        data = event.data
        if "call_id" in data:
            return
        match event.name:
            case "output.delta":
                self.fields[data["field"]] = self.fields.get(data["field"], "") + data["text"]
            case "output.value":
                self.fields[data["field"]] = data["value"]
            case "output.snapshot":
                self.fields = dict(data["output"])
            case "output.reset" | "step.started":
                self.fields = {}
            case "step.completed":
                self.fields = dict(data["result"])


class AsyncFlockClient:
    """A client of this API. Use it with ``async with``, or call ``aclose``.

    Args:
        url: where the API is, with the path under which it is mounted; by default ``FLOCK_URL`` of the environment.
        api_key: by default ``FLOCK_API_KEY`` of the environment.
        timeout_s: for how long a request may be silent, in seconds.
        retry_for_s: for how long a request is repeated while the server cannot be reached or is full, in seconds.
        transport: how requests are sent, such as ``httpx.ASGITransport(app)`` in tests.

    Methods raise ``APIError`` if the server refuses a request, and ``httpx.TransportError`` if it cannot be reached for
    ``retry_for_s``. Cancellation: the method stops waiting, and the run or batch continues.
    """

    def __init__(
        self,
        url: str | None = None,
        *,
        api_key: str | None = None,
        timeout_s: float = 30.0,
        retry_for_s: float = 60.0,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        url = url or os.environ.get("FLOCK_URL", DEFAULT_URL)
        api_key = api_key or os.environ.get("FLOCK_API_KEY")
        headers = {} if api_key is None else {"Authorization": f"Bearer {api_key}"}
        self._timeout_s, self._retry_for_s = timeout_s, retry_for_s
        self._http = httpx.AsyncClient(
            base_url=url.rstrip("/"), headers=headers, timeout=timeout_s, transport=transport, follow_redirects=False
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        """Close its connections."""
        await self._http.aclose()

    # Runs

    @overload
    async def run(
        self,
        agent_name: str,
        inputs: Mapping[str, Any] | None = ...,
        *,
        result_type: type[T],
        on_question: Callable[[OpenQuestion], Any] | None = ...,
        **options: Any,
    ) -> T: ...
    @overload
    async def run(
        self,
        agent_name: str,
        inputs: Mapping[str, Any] | None = ...,
        *,
        on_question: Callable[[OpenQuestion], Any] | None = ...,
        **options: Any,
    ) -> dict[str, Any]: ...
    @renamed(answer="on_question")
    async def run(
        self,
        agent_name: str,
        inputs: Mapping[str, Any] | None = None,
        *,
        result_type: Any = dict[str, Any],
        on_question: Callable[[OpenQuestion], Any] | None = None,
        **options: Any,
    ) -> Any:
        """Run an agent, wait for its end, and return its result.

        Args:
            result_type: what the result is read as: a struct, a dataclass, a TypedDict, a pydantic model.
            on_question: answers the questions of the run; it may be async.
            options: see ``submit``.

        Raises:
            RunFailed: the run has failed or was cancelled.
            Conflict: it waits for an answer, and there is no *on_question*.
            msgspec.ValidationError: the result is not a *result_type*.
        """
        run = await self.submit(agent_name, inputs, **options)
        while True:
            run = await self.wait(run.run_id)
            if run.status is not RunStatus.WAITING:
                return run.value_as(result_type)
            if on_question is None:
                texts = ", ".join(repr(question.question) for question in run.waiting_for)
                waits = f"The run {run.run_id} waits for an answer: {texts}."
                raise Conflict(f"{waits} Pass on_question=, or use answer().")
            for question in run.waiting_for:
                output = on_question(question)
                await self.answer(run.run_id, question.call_id, await output if inspect.isawaitable(output) else output)

    async def submit(
        self,
        /,
        agent_name: str,
        inputs: Mapping[str, Any] | None = None,
        *,
        idempotency_key: str | None = None,
        **options: Any,
    ) -> RunState:
        """Start a run, and return it at once.

        Args:
            idempotency_key: the same key and request return the same run, also from another process.
            options: ``timeout_s``, ``session_id`` and ``max_cost``; see ``FlockAPIRequest``.
        """
        body = {"agent_name": agent_name, "inputs": inputs or {}, "async_run": True, **options}
        return await self._ask("POST", "/run/flock", RunState, body, key=idempotency_key)

    async def get(self, run_id: str, *, wait_s: int = 0) -> RunState:
        """Return a run, after its end, its question, or *wait_s* seconds, whatever is first."""
        params = {"wait": wait_s}
        return await self._ask("GET", f"/run/{run_id}", RunState, params=params, wait_s=wait_s)

    async def wait(self, run_id: str) -> RunState:
        """Wait until a run has ended, or waits for an answer and does nothing else."""
        while True:
            run = await self.get(run_id, wait_s=WAIT_S)
            if run.status.is_final or (run.status is RunStatus.WAITING and run.waiting_for):
                return run
            await anyio.sleep(FIRST_PAUSE_S)  # a server may allow no wait

    async def cancel(self, run_id: str) -> RunState:
        """Cancel a run. It has stopped when its status is ``cancelled``; see ``wait``."""
        return await self._ask("POST", f"/run/{run_id}/cancel", RunState)

    async def retry(self, /, run_id: str, **options: Any) -> RunState:
        """Start the next attempt of a failed run; see ``FlockRunRetry`` for the options.

        It is not sent again if its response is lost, since that could start another attempt.
        """
        return await self._ask("POST", f"/run/{run_id}/retry", RunState, options or None, may_repeat=False)

    async def send(self, run_id: str, name: str, message: Any) -> None:
        """Send a message to a run, which awaits it with ``context.receive``."""
        await self._ask("POST", f"/run/{run_id}/messages/{name}", Any, {"message": message})

    async def events(self, run_id: str, *, after: int = 0, reasoning: bool = False) -> AsyncGenerator[Event, None]:
        """Yield the events of a run until its end. ``StreamedOutput`` puts its text together.

        If the connection breaks, the stream resumes after the last event.

        Args:
            after: the id of the last event that is known already.
        """
        params = {"reasoning": "true"} if reasoning else {}
        until = time.monotonic() + self._retry_for_s
        while True:
            headers = {"Last-Event-ID": str(after)}
            response = await self._send(
                "GET", f"/run/{run_id}/events", params=params, headers=headers, silence_s=SILENCE_S, streams=True
            )
            async with contextlib.aclosing(response):
                try:
                    async for event in _events_of(response):
                        yield event
                        after, until = event.id or after, time.monotonic() + self._retry_for_s
                        if event.name in LAST_EVENTS:
                            return
                except httpx.TransportError:
                    if time.monotonic() > until:
                        raise
            if response.status_code == 204:  # the run has ended, and all its events are known
                return
            await anyio.sleep(FIRST_PAUSE_S)

    # Questions

    async def questions(self, /, **filters: Any) -> AsyncGenerator[OpenQuestion, None]:
        """Yield the open questions that this principal may answer, the newest run first.

        Args:
            filters: ``role``, ``agent_name``, ``principal`` and ``session_id``.
        """
        page = await self._ask("GET", "/questions", _QuestionPage, params=filters)
        while True:
            for question in page.questions:
                yield question
            if page.next is None:
                return
            page = await self._ask("GET", self._http.base_url.join(page.next), _QuestionPage)

    async def answer(self, run_id: str, call_id: str, output: Any) -> None:
        """Answer a question of a run; see ``waiting_for`` of the run. The same answer may be sent again."""
        await self._ask("POST", f"/run/{run_id}/calls/{call_id}", Any, {"output": output})

    # Tables

    async def run_batch(
        self,
        /,
        agent_name: str,
        rows: str | os.PathLike[str] | Iterable[Mapping[str, Any]],
        *,
        idempotency_key: str | None = None,
        on_progress: Callable[[int, int], object] | None = None,
        **options: Any,
    ) -> BatchState:
        """Upload rows and run an agent on each. The response has no results; see ``wait_batch`` and ``download``.

        Args:
            rows: a file whose name ends in that of a format, such as ``.csv``, optionally followed by ``.gz``; or
                mappings, or a frame of pandas or polars, which are written to a temporary file first, so that the
                upload can be repeated.
            on_progress: called with the bytes that were sent, and all bytes.
            options: ``max_workers``, ``on_invalid``, ``input_mapping``, …; see ``UploadQuery``.
        """
        with contextlib.ExitStack() as stack:
            if isinstance(rows, (str, os.PathLike)):
                path = Path(rows)
                is_gzip, format_ = is_gzipped(path), format_of(path)
                if format_ is None:
                    raise ValueError(f"{path.name!r} must end in {ENDINGS}, optionally followed by .gz.")
                file: IO[bytes] = stack.enter_context(open(path, "rb"))  # noqa: ASYNC230 - it is local
            else:
                file, is_gzip = stack.enter_context(tempfile.TemporaryFile()), False
                format_ = FORMATS["ndjson"]
                file.writelines(msgspec.json.encode(row) + b"\n" for row in each_row(rows))
            params = _query(agent_name=agent_name, **options)
            headers = {"Content-Type": format_.media_type, **({"Content-Encoding": "gzip"} if is_gzip else {})}
            body = functools.partial(_pieces, file, on_progress)
            return await self._ask(
                "POST", "/run/batch", BatchState, body, key=idempotency_key, params=params, headers=headers
            )

    async def get_batch(self, batch_id: str, *, wait_s: int = 0) -> BatchState:
        """Return a batch without its results, after its end or *wait_s* seconds."""
        params = {"wait": wait_s, "results": "false"}
        return await self._ask("GET", f"/batch/{batch_id}", BatchState, params=params, wait_s=wait_s)

    async def wait_batch(
        self, batch_id: str, *, on_progress: Callable[[BatchState], object] | None = None
    ) -> BatchState:
        """Wait until a batch has ended. *on_progress* is called about every second with its state."""
        while True:
            batch = await self.get_batch(batch_id, wait_s=WAIT_S if on_progress is None else 1)
            if on_progress is not None:
                on_progress(batch)
            if batch.status.is_final:
                return batch
            await anyio.sleep(FIRST_PAUSE_S)  # a server may allow no wait

    async def download(
        self,
        /,
        batch_id: str,
        path: str | os.PathLike[str],
        *,
        on_progress: Callable[[int], object] | None = None,
        **query: Any,
    ) -> None:
        """Write the results of a batch to a file whose name ends in that of a format, such as ``.csv``.

        The file appears when it is complete.

        Args:
            on_progress: called with the bytes that were received.
            query: ``status``, ``usage``, ``escape_formulas``, …; see ``ResultsQuery``.
        """
        target = Path(path)
        format_ = format_of(target)
        if format_ is None or is_gzipped(target):
            raise ValueError(f"{target.name!r} must end in {ENDINGS}.")
        part, params = target.with_name(f"{target.name}.part"), _query(format=format_.name, **query)
        until, most_bytes = time.monotonic() + self._retry_for_s, 0
        try:
            while True:
                response = await self._send("GET", f"/batch/{batch_id}/results", params=params, streams=True)
                received_bytes = 0
                async with contextlib.aclosing(response), await anyio.open_file(part, "wb") as file:
                    try:
                        async for piece in response.aiter_bytes(PIECE_BYTES):
                            received_bytes += await file.write(piece)
                            if received_bytes > most_bytes:
                                most_bytes, until = received_bytes, time.monotonic() + self._retry_for_s
                            if on_progress is not None:
                                on_progress(received_bytes)
                        break
                    except httpx.TransportError:
                        if time.monotonic() > until:
                            raise
                await anyio.sleep(FIRST_PAUSE_S)
            part.replace(target)
        finally:
            part.unlink(missing_ok=True)

    async def cancel_batch(self, batch_id: str) -> BatchState:
        """Cancel a batch. Its items have stopped when its status is ``cancelled``; see ``wait_batch``."""
        return await self._ask("POST", f"/batch/{batch_id}/cancel", BatchState)

    async def retry_batch(self, /, batch_id: str, **options: Any) -> BatchState:
        """Retry the items that failed or were cancelled; see ``FlockBatchRetry`` for the options, and ``retry``."""
        return await self._ask("POST", f"/batch/{batch_id}/retry", BatchState, options or None, may_repeat=False)

    async def agents(self) -> list[dict[str, Any]]:
        """Return the names and signatures of the agents."""
        return (await self._ask("GET", "/agents", dict[str, list[dict[str, Any]]]))["agents"]

    # Requests

    async def _ask(
        self, method: str, path: str | httpx.URL, type_: type[T], body: Any = None, *, wait_s: int = 0, **options: Any
    ) -> T:
        response = await self._send(method, path, body, silence_s=self._timeout_s + wait_s, **options)
        return msgspec.json.decode(response.content, type=type_)

    async def _send(
        self,
        method: str,
        path: str | httpx.URL,
        body: Any = None,
        *,
        key: str | None = None,
        params: Mapping[str, Any] | None = None,
        headers: Mapping[str, str] | None = None,
        silence_s: float | None = None,
        streams: bool = False,
        may_repeat: bool = True,
    ) -> httpx.Response:
        """Send a request until it is answered.

        Args:
            body: a function that returns the pieces of the body, or what is sent as JSON.
            streams: the caller reads the response and closes it.
            may_repeat: it is repeated even if the server may have processed it.
        """
        all_headers = dict(headers or {})
        if method == "POST":
            all_headers["Idempotency-Key"] = key or uuid.uuid4().hex
        if body is not None:
            all_headers.setdefault("Content-Type", "application/json")
        timeout = httpx.Timeout(self._timeout_s, read=silence_s or self._timeout_s)
        until, pause_s = time.monotonic() + self._retry_for_s, FIRST_PAUSE_S
        while True:
            content = body() if callable(body) else None if body is None else msgspec.json.encode(body)
            request = self._http.build_request(
                method, path, params=params, headers=all_headers, content=content, timeout=timeout
            )
            is_late = time.monotonic() > until
            after_s = 0.0
            try:
                response = await self._http.send(request, stream=streams)
            except httpx.UnsupportedProtocol:  # the URL is wrong
                raise
            except httpx.TransportError as exc:
                was_sent = not isinstance(exc, (httpx.ConnectError, httpx.ConnectTimeout))
                if is_late or (was_sent and not may_repeat):
                    raise
            else:
                if response.is_success:
                    return response
                async with contextlib.aclosing(response):
                    with contextlib.suppress(httpx.TransportError):
                        await response.aread()
                error = APIError(response)
                statuses = REPEATED if may_repeat else REFUSED
                if is_late or (response.status_code not in statuses and error.type != KEY_IN_USE):
                    raise error
                with contextlib.suppress(ValueError):
                    after_s = float(response.headers.get("Retry-After", 0))
                if time.monotonic() + after_s > until:
                    raise error
            await anyio.sleep(max(after_s, pause_s * random.uniform(0.5, 1)))
            pause_s = min(2 * pause_s, MAX_PAUSE_S)


def _query(**options: Any) -> dict[str, str]:
    return {
        name: value if isinstance(value, str) else msgspec.json.encode(value).decode()
        for name, value in options.items()
    }


async def _pieces(file: IO[bytes], on_progress: Callable[[int, int], object] | None) -> AsyncIterator[bytes]:
    total_bytes = file.seek(0, os.SEEK_END)
    file.seek(0)
    while piece := file.read(PIECE_BYTES):
        yield piece
        if on_progress is not None:
            on_progress(file.tell(), total_bytes)


async def _events_of(response: httpx.Response) -> AsyncIterator[Event]:
    received = [b""]
    async for piece in response.aiter_bytes():
        has_end = b"\n\n" in received[-1][-1:] + piece
        received.append(piece)
        if not has_end:  # an event of megabytes is joined once
            continue
        *blocks, rest = b"".join(received).split(b"\n\n")
        received = [rest]
        for block in blocks:
            fields = dict(line.partition(b": ")[::2] for line in block.split(b"\n"))
            if data := fields.get(b"data"):  # and not a comment
                id_ = int(fields[b"id"]) if b"id" in fields else None
                yield Event(id=id_, name=fields[b"event"].decode(), data=msgspec.json.decode(data))


def _blocking(
    method: Callable[Concatenate[AsyncFlockClient, P], Coroutine[Any, Any, T]],
) -> Callable[Concatenate["FlockClient", P], T]:
    def call(self: "FlockClient", /, *args: P.args, **kwargs: P.kwargs) -> T:
        return self._wait_for(method(self._client, *args, **kwargs))

    call.__name__, call.__doc__ = method.__name__, method.__doc__
    return call


def _iterating(
    method: Callable[Concatenate[AsyncFlockClient, P], AsyncGenerator[T, None]],
) -> Callable[Concatenate["FlockClient", P], Iterator[T]]:
    def iterate(self: "FlockClient", /, *args: P.args, **kwargs: P.kwargs) -> Iterator[T]:
        items, turn = method(self._client, *args, **kwargs), asyncio.Lock()  # Ctrl+C closes them in their last turn

        async def next_items() -> list[T]:
            async with turn:
                return [item] if (item := await anext(items, None)) is not None else []

        async def close() -> None:
            async with turn:
                await items.aclose()

        try:
            while found := self._wait_for(next_items()):
                yield from found
        finally:
            self._wait_for(close())

    iterate.__name__, iterate.__doc__ = method.__name__, method.__doc__
    return iterate


class FlockClient:
    """``AsyncFlockClient`` for code without async. Use it with ``with``, or call ``close``.

    Its arguments are those of ``AsyncFlockClient``. Several threads may use it. Its own thread sends the
    requests.
    """

    def __init__(self, url: str | None = None, **options: Any) -> None:
        self._client = AsyncFlockClient(url, **options)
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="flock-client", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc_info: object) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections, and end its thread."""
        self._wait_for(self._client.aclose())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _wait_for(self, work: Coroutine[Any, Any, T]) -> T:
        if threading.current_thread() is self._thread:  # it would wait for itself
            work.close()
            raise RuntimeError("A callback of a FlockClient cannot use the same client. Use another one.")
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl+C
            future.cancel()
            raise

    @overload
    def run(
        self, agent_name: str, inputs: Mapping[str, Any] | None = ..., *, result_type: type[T], **options: Any
    ) -> T: ...
    @overload
    def run(self, agent_name: str, inputs: Mapping[str, Any] | None = ..., **options: Any) -> dict[str, Any]: ...
    @renamed(answer="on_question")
    @functools.wraps(AsyncFlockClient.run)
    def run(self, agent_name: str, inputs: Mapping[str, Any] | None = None, **options: Any) -> Any:
        return self._wait_for(self._client.run(agent_name, inputs, **options))

    submit = _blocking(AsyncFlockClient.submit)
    get = _blocking(AsyncFlockClient.get)
    wait = _blocking(AsyncFlockClient.wait)
    cancel = _blocking(AsyncFlockClient.cancel)
    retry = _blocking(AsyncFlockClient.retry)
    send = _blocking(AsyncFlockClient.send)
    events = _iterating(AsyncFlockClient.events)
    questions = _iterating(AsyncFlockClient.questions)
    answer = _blocking(AsyncFlockClient.answer)
    run_batch = _blocking(AsyncFlockClient.run_batch)
    get_batch = _blocking(AsyncFlockClient.get_batch)
    wait_batch = _blocking(AsyncFlockClient.wait_batch)
    download = _blocking(AsyncFlockClient.download)
    cancel_batch = _blocking(AsyncFlockClient.cancel_batch)
    retry_batch = _blocking(AsyncFlockClient.retry_batch)
    agents = _blocking(AsyncFlockClient.agents)
