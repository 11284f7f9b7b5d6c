"""A receiver of webhooks, which checks their signatures as Standard Webhooks says."""

import base64
import hashlib
import hmac
import json
import time
from collections.abc import Awaitable, Callable, Mapping
from contextlib import AbstractAsyncContextManager
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route

from tests.support import PATIENCE_S
from tests.support.servers import Served

SECRET = "whsec_" + base64.b64encode(b"0123456789abcdef" * 2).decode()


def is_signed(body: bytes, headers: Mapping[str, str], secret: str = SECRET) -> bool:
    key = base64.b64decode(secret.removeprefix("whsec_"))
    content = f"{headers['webhook-id']}.{headers['webhook-timestamp']}.".encode() + body
    wanted = base64.b64encode(hmac.digest(key, content, hashlib.sha256)).decode()
    is_recent = abs(time.time() - int(headers["webhook-timestamp"])) < 300
    return is_recent and f"v1,{wanted}" in headers["webhook-signature"].split(" ")


class Inbox:
    """What a receiver has got.

    Args:
        respond: returns the response to a request; it may wait.

    Attributes:
        accepted: the bodies of the requests that were answered with 200, in order.
        ids: their ids.
        body: the last one, as it came.
        unsigned: how many requests had no valid signature.
        requests: of all requests, the id, the time, and the headers.
    """

    def __init__(self, respond: Callable[[int, Any], Awaitable[Response] | Response] | None = None) -> None:
        self._respond = respond
        self.accepted: list[Any] = []
        self.ids: list[str] = []
        self.unsigned, self.body = 0, b""
        self.requests: list[tuple[str, float, Mapping[str, str]]] = []

    async def _receive(self, request: Request) -> Response:
        try:
            body = await request.body()
        except ClientDisconnect:  # the sender was killed
            return Response(status_code=400)
        if not is_signed(body, request.headers):
            self.unsigned += 1
            return Response(status_code=400)
        event, self.body = json.loads(body), body
        self.requests.append((request.headers["webhook-id"], time.monotonic(), dict(request.headers)))
        response = Response() if self._respond is None else self._respond(len(self.requests), event)
        if isinstance(response, Awaitable):
            response = await response
        if response.status_code == 200:
            self.accepted.append(event)
            self.ids.append(request.headers["webhook-id"])
        return response

    def serve(self, port: int = 0) -> AbstractAsyncContextManager[Served]:
        return Served(Starlette(routes=[Route("/{path:path}", self._receive, methods=["POST"])]), port)

    @property
    def types(self) -> list[str]:
        return [event["type"] for event in self.accepted]

    async def until(self, count: int) -> list[Any]:
        """Wait until *count* webhooks are accepted, and return them."""
        with anyio.fail_after(PATIENCE_S):
            while len(self.accepted) < count:  # noqa: ASYNC110 - the receiver is like a process of its own
                await anyio.sleep(0.01)
        return self.accepted
