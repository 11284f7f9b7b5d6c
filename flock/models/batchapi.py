"""OpenAI's batch endpoint, ``/files`` and ``/batches``, which other providers have too: half the price, within a day.

A file of calls, one a line, is uploaded, and a job is created for it. When that has ended, there is a file with the
replies, and one with the calls that failed, in any order. A line is identified by its ``custom_id``.
"""

import contextlib
import json
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator, Mapping
from typing import Any

import msgspec

from flock.errors import ModelError
from flock.models import http, replies
from flock.models.bodies import BadBody, pieces_of, read_whole
from flock.models.completions import Completion
from flock.models.llm import ModelClient
from flock.models.providers import Endpoint
from flock.models.requests import Request

#: The most that OpenAI accepts in one file. A file is a bit longer than its lines.
MAX_CALLS, MAX_BYTES = 50_000, 199_000_000
#: The key of a job's metadata that has our id.
METADATA_KEY = "flockapi_job"
#: How long a provider may take for a job, in seconds. A day is the only window that OpenAI offers.
WINDOW_S = 24 * 3600
#: Longer lines of a result are dropped.
MAX_LINE_BYTES = 32 * 1024 * 1024
#: The statuses of jobs that have ended.
FINAL = ("completed", "failed", "expired", "cancelled")


class RemoteJob(msgspec.Struct, frozen=True):
    """A job as its provider has it. Members that are missing or invalid count as empty."""

    id: str
    status: str = ""
    created_at: float = 0
    metadata: dict[str, Any] | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    errors: Any = None

    @property
    def is_final(self) -> bool:
        return self.status in FINAL

    @property
    def problem(self) -> str:
        """What the provider says about a job that failed, for the log and for the next decision."""
        return "" if self.errors is None else json.dumps(self.errors)[: replies.MAX_LOGGED_CHARS]


class Result(msgspec.Struct, frozen=True):
    """The result of one line: a completion, or why there is none. ``is_own`` errors are those of the call itself."""

    custom_id: str
    completion: Completion | None = None
    error: ModelError | None = None
    is_own: bool = False


class BatchEndpoint:
    """The batch endpoint of one model.

    All methods raise ModelError. Cancellation: the request is aborted; the provider may have received it.
    """

    def __init__(self, client: ModelClient, endpoint: Endpoint) -> None:
        self._client, self._endpoint = client, endpoint
        self._base = endpoint.url.removesuffix("/chat/completions")
        self._headers = {name: value for name, value in endpoint.headers.items() if name != "Content-Type"}

    async def upload(self, name: str, size: int, lines: AsyncIterable[bytes]) -> str:
        """Upload a file of *size* bytes, and return its id. Of *lines*, only one piece is in memory."""
        mark = "flockapi-7d1f0c"
        head = (
            f'--{mark}\r\nContent-Disposition: form-data; name="purpose"\r\n\r\nbatch\r\n'
            f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{name}.jsonl"\r\n'
            "Content-Type: application/jsonl\r\n\r\n"
        ).encode()
        tail = f"\r\n--{mark}--\r\n".encode()

        async def pieces() -> AsyncIterator[bytes]:
            yield head
            async for piece in lines:
                yield piece
            yield tail

        sent = {"content-type": f"multipart/form-data; boundary={mark}"}
        sent["content-length"] = str(len(head) + size + len(tail))
        return (await self._job("POST", "/files", content=pieces(), headers=sent)).id

    async def create(self, file_id: str, job_id: str) -> RemoteJob:
        """If the answer cannot be used, the job may exist: the error is ``model_unavailable``."""
        body = {"input_file_id": file_id, "endpoint": "/v1/chat/completions", "completion_window": "24h"}
        try:
            return await self._job("POST", "/batches", json=body | {"metadata": {METADATA_KEY: job_id}})
        except ModelError as exc:
            if exc.error_type == "model_bad_response":
                exc.error_type = "model_unavailable"
            raise

    async def find(self, job_id: str, since: float) -> RemoteJob | None:
        """Return the job with our id, if one was created since a time. The provider lists the newest first."""
        after, last = "", ""
        while True:
            page = await self._sent("GET", f"/batches?limit=100{after}")
            if not isinstance(listed := page.get("data"), list):
                raise replies.bad_response(self._endpoint.name, "answered GET /batches without a list of jobs")
            jobs = [_job_from(each, self._endpoint.name) for each in listed]
            if found := [job for job in jobs if (job.metadata or {}).get(METADATA_KEY) == job_id]:
                return found[0]
            # A server may ignore ``after``, or not say when a job was created.
            if not jobs or not page.get("has_more") or jobs[-1].id == last or 0 < jobs[-1].created_at < since:
                return None
            last = jobs[-1].id
            after = f"&after={last}"

    async def get(self, provider_id: str) -> RemoteJob:
        return await self._job("GET", f"/batches/{provider_id}")

    async def cancel(self, provider_id: str) -> None:
        await self._sent("POST", f"/batches/{provider_id}/cancel")

    async def results(self, file_id: str) -> AsyncGenerator[Result | None, None]:
        """Yield the result of each line of a file while it is read, and None for a line that cannot be read."""
        parts, size = list[bytes](), 0
        async with self._response("GET", f"/files/{file_id}/content") as response:
            async for piece in pieces_of(response):
                *lines, rest = piece.split(b"\n")
                for line in lines:
                    if whole := b"".join((*parts, line)).strip():
                        yield self._result(whole)
                    parts, size = [], 0
                size += len(rest)
                parts = [*parts, rest] if size <= MAX_LINE_BYTES else [b"-"]  # a longer line cannot be read
        if whole := b"".join(parts).strip():
            yield self._result(whole)

    def _result(self, line: bytes) -> Result | None:
        """Return the result of one line. An error that other calls would not have is that of the call itself."""
        name = self._endpoint.name
        try:
            read = replies.decoded(line)
            custom_id, response, error = read["custom_id"], read.get("response") or {}, read.get("error")
            status, body = response.get("status_code"), response.get("body")
            if not isinstance(custom_id, str):
                return None
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError):
            return None
        if status == 200 and not error:
            try:
                return Result(custom_id, replies.completion_of(body, Request((), {}, name=name)))
            except ModelError as exc:
                return Result(custom_id, None, exc, exc.error_type != "model_bad_response" or exc.usage is not None)
        text = json.dumps(error or body)
        failed = http.library().Response(status if isinstance(status, int) and status >= 400 else 500, text=text)
        problem = replies.status_error(name, failed, self._endpoint.key_variable)
        return Result(custom_id, None, problem, failed.status_code in (400, 413, 422) and not problem.is_lasting)

    async def _job(self, method: str, path: str, **more: Any) -> RemoteJob:
        return _job_from(await self._sent(method, path, **more), self._endpoint.name)

    async def _sent(self, method: str, path: str, **more: Any) -> Any:
        async with self._response(method, path, **more) as response:
            whole = await read_whole(response)
        try:
            answer = replies.decoded(whole.content)
        except (ValueError, RecursionError):
            answer = None
        if not isinstance(answer, dict):
            raise replies.bad_response(self._endpoint.name, f"answered {method} {path} without a JSON object")
        return answer

    @contextlib.asynccontextmanager
    async def _response(
        self, method: str, path: str, headers: Mapping[str, str] = {}, **more: Any
    ) -> AsyncGenerator[Any, None]:
        """Yield a response while it is read. Whatever is wrong with it, or with the connection, is a ModelError."""
        name, url = self._endpoint.name, f"{self._base}{path}"
        try:
            more["headers"] = {**self._headers, **headers}
            async with self._client.http() as client, client.stream(method, url, **more) as response:
                if not response.is_success:
                    raise replies.status_error(name, await read_whole(response), self._endpoint.key_variable)
                yield response
        except (BadBody, *http.errors("RequestError")) as exc:  # type: ignore[misc]
            reason = "has a batch endpoint that could not be reached, or closed the connection"
            raise replies.model_error(name, "model_unavailable", reason, repr(exc)) from exc


def _job_from(answer: Any, name: str = "") -> RemoteJob:
    """Raises ModelError if it has no id."""
    known = {}
    for field in msgspec.structs.fields(RemoteJob):
        try:
            known[field.name] = msgspec.convert(answer[field.name], field.type)
        except (msgspec.ValidationError, LookupError, TypeError):
            pass
    if not known.get("id"):
        raise replies.bad_response(name, "sent a file or a job of its batch endpoint without an id", str(answer)[:500])
    return RemoteJob(**known)
