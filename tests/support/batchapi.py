"""A fake provider with OpenAI's batch endpoint, over real HTTP, and with its failures."""

import contextlib
import json
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import anyio.to_thread

from flock.testing import Failure, FakeModel, ModelRequest, Reply, _response_of

Line = dict[str, Any]


class BatchProvider(FakeModel):
    """Answers normal calls, and jobs of its batch endpoint, with the same replies.

    Args:
        reply: called with the request of each call.

    Attributes:
        files: the contents of files, by id.
        jobs: by id, as the API shows them.
        paid: how often each call was paid, by its idempotency key: ``custom_id`` in a job.
        asked: the method and path of each request.
        is_held: jobs do not end.
        held: the ids of jobs that do not end.
        max_enqueued: how many lines may be in jobs that have not ended. Jobs with more fail.
        edit: called with a job and the lines of its output and error files before they are published.
        fault: called with the method and path of each request. It may return a Failure, or "lost": the request is done,
            and the connection closed without an answer; or "half": it is closed in the middle of the answer; or bytes,
            which are sent instead of the answer.
        done_before_cancel: how many lines of a job are done when it is cancelled.
    """

    def __init__(self, reply: Callable[[ModelRequest], Reply | Failure]) -> None:
        super().__init__(self._normal)
        self._reply = reply
        self.files: dict[str, bytes] = {}
        self.jobs: dict[str, dict[str, Any]] = {}
        self.paid = Counter[str]()
        self.normal = Counter[str]()
        self.asked: list[tuple[str, str]] = []
        self.is_held = False
        self.held = set[str]()
        self.max_enqueued: int | None = None
        self.done_before_cancel = 0
        self.edit: Callable[[dict[str, Any], list[Line], list[Line]], None] = lambda job, output, errors: None
        self.fault: Callable[[str, str], Failure | str | bytes | None] = lambda method, path: None

    def _normal(self, request: ModelRequest) -> Reply | Failure:
        key = request.headers["idempotency-key"].removesuffix("/json_object").removesuffix("/text")
        self.requests.clear()
        reply = self._reply(request)
        if isinstance(reply, Reply):
            self.paid[key] += 1
            self.normal[key] += 1
        return reply

    async def __call__(self, scope: Any, receive: Callable[[], Any], send: Callable[[Any], Any]) -> None:
        from starlette.requests import Request

        path = scope["path"].removeprefix("/v1")
        if path.startswith("/chat/"):
            await super().__call__(scope, receive, send)
            return
        request = Request(scope, receive)
        method, query = scope["method"], dict(request.query_params)
        self.asked.append((method, path))
        fault = self.fault(method, path)
        if isinstance(fault, Failure):
            failed = _response_of(fault, ModelRequest({}, {}))
            await request.body()
            await self._send(send, failed.status_code, failed.content, dict(failed.headers))
            return
        status, body = self._answer(method, path, query, await request.body())
        if fault == "lost":
            await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"9")]})
            return
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        content = fault if isinstance(fault, bytes) else content
        if fault == "half":
            headers = [(b"content-length", str(len(content)).encode())]
            await send({"type": "http.response.start", "status": status, "headers": headers})
            await send({"type": "http.response.body", "body": content[: len(content) // 2], "more_body": True})
            await anyio.to_thread.run_sync(self.half_sent)
            return
        await self._send(send, status, content)

    def half_sent(self) -> None:
        """Called before the connection is closed."""

    async def _send(self, send: Any, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        sent = [(name.encode(), value.encode()) for name, value in (headers or {}).items() if name != "content-length"]
        await send({"type": "http.response.start", "status": status, "headers": sent})
        with contextlib.suppress(Exception):
            for start in range(0, len(content), 65536):
                piece = content[start : start + 65536]
                await send({"type": "http.response.body", "body": piece, "more_body": True})
            await send({"type": "http.response.body"})

    def _answer(self, method: str, path: str, query: dict[str, str], body: bytes) -> tuple[int, Any]:
        match method, path.strip("/").split("/"):
            case "POST", ["files"]:
                content = body.partition(b"application/jsonl\r\n\r\n")[2]
                file_id = self._store(content.rpartition(b"\r\n--")[0])
                assert b'name="purpose"\r\n\r\nbatch\r\n' in body
                return 200, {"id": file_id, "object": "file", "purpose": "batch"}
            case "GET", ["files", file_id, "content"] if file_id in self.files:
                return 200, self.files[file_id]
            case "POST", ["batches"]:
                asked = json.loads(body)
                assert (asked["endpoint"], asked["completion_window"]) == ("/v1/chat/completions", "24h")
                job = {"id": f"batch_{len(self.jobs) + 1}", "object": "batch", "status": "validating", **asked}
                enqueued = [each for each in self.jobs.values() if each["status"] == "validating"]
                self.jobs[job["id"]] = job | {"created_at": int(time.time()), "errors": None}
                count = sum(len(self.lines(each)) for each in (*enqueued, job))
                if self.max_enqueued is not None and count > self.max_enqueued:
                    problem = {"data": [{"code": "token_limit_exceeded"}]}
                    self.jobs[job["id"]] |= {"status": "failed", "errors": problem}
                return 200, self.jobs[job["id"]]
            case "GET", ["batches"]:
                newest = list(reversed(self.jobs.values()))
                after = [number for number, job in enumerate(newest, 1) if job["id"] == query.get("after")]
                page = newest[after[0] if after else 0 :][: int(query["limit"])]
                return 200, {"data": page, "has_more": bool(page) and page[-1] is not newest[-1]}
            case "GET", ["batches", id_] if id_ in self.jobs:
                if self.jobs[id_]["status"] == "validating" and not (self.is_held or id_ in self.held):
                    self._run(self.jobs[id_], None, "completed")
                return 200, self.jobs[id_]
            case "POST", ["batches", id_, "cancel"] if id_ in self.jobs:
                if self.jobs[id_]["status"] == "validating":
                    self._run(self.jobs[id_], self.done_before_cancel, "cancelled")
                return 200, self.jobs[id_]
        return 404, {"error": {"message": "Not found.", "code": "not_found"}}

    def _store(self, content: bytes) -> str:
        file_id = f"file-{len(self.files) + 1}"
        self.files[file_id] = content
        return file_id

    def lines(self, job: dict[str, Any]) -> list[Line]:
        return [json.loads(line) for line in self.files[job["input_file_id"]].splitlines()]

    def _run(self, job: dict[str, Any], limit: int | None, status: str) -> None:
        output, errors = list[Line](), list[Line]()
        for line in self.lines(job)[:limit]:
            reply, shown = self._reply(ModelRequest(line["body"], {})), {"id": "batch_req_1", "error": None}
            shown["custom_id"] = line["custom_id"]
            if isinstance(reply, Reply):
                self.paid[line["custom_id"]] += 1
                output.append(shown | {"response": {"status_code": 200, "body": reply.completion()}})
            else:
                error = {"error": {"message": reply.message, "code": reply.code}}
                errors.append(shown | {"response": {"status_code": reply.status, "body": error}})
        job["status"] = status
        self.edit(job, output, errors)
        for name, lines in (("output_file_id", output), ("error_file_id", errors)):
            if lines:
                whole = (line if isinstance(line, str) else json.dumps(line) for line in lines)
                job[name] = self._store("\n".join(whole).encode())
