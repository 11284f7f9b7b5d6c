"""Clients that do not read a long answer, at the doors that send it as a text: few of them hold it at a time."""

import json

import anyio
import httpx
import pytest

from flock.core import Flock
from flock.errors import TooManyRequests
from flockapi import create_app
from tests.support import PATIENCE_S
from tests.support.engines import until
from tests.support.servers import Served
from tests.support.sockets import little_memory

pytestmark = pytest.mark.anyio

MB = 15  # the buffers of a connection hold up to 10
SLOTS = 2
UNREAD = 8

ASKED = [{"role": "user", "content": str(MB)}]
PART = {"id": "m", "role": "user", "parts": [{"type": "text", "text": str(MB)}]}

#: A request that makes a run, and one that streams its answer again: its method and path, its body and its headers.
DOORS = {
    "responses": ("/v1/responses", {"model": "write", "input": str(MB)}, "GET /v1/responses/{id}?stream=true", None),
    "chat": ("/v1/chat/completions", {"model": "write", "messages": ASKED, "stream": True}, None, None),
    "vercel": ("/vercel/write", {"id": "c", "messages": [PART]}, "GET /vercel/write/c/stream", None),
}


@pytest.mark.parametrize("door", DOORS)
async def test_clients_that_read_nothing_hold_a_long_answer_in_their_slots_only(
    door: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    flock, waits = Flock("long"), list[object]()

    @flock.agent
    async def write(text: str) -> str:
        return "x" * int(text) * 1_000_000

    class Waiting(TooManyRequests):
        def __init__(self, *args: object) -> None:
            super().__init__(str(args[0]))
            waits.append(self)

    monkeypatch.setattr("flock.web.auth.TooManyRequests", Waiting)
    path, made, again, body = DOORS[door]
    app = create_app(
        flock, store=":memory:", auth="host", protocols=["openai", "vercel"], max_downloads_per_principal=SLOTS
    )
    async with Served(app) as server, httpx.AsyncClient(base_url=server.url, timeout=PATIENCE_S) as client:
        key = {"Idempotency-Key": "k"}
        headers = {**key, "Content-Type": "application/json"}
        first = await client.post(path, content=json.dumps(made), headers=headers)
        assert first.status_code == 200, first.text
        id_ = first.json()["id"] if door == "responses" else ""
        request, body = (f"POST {path}", made) if again is None else (again.format(id=id_), None)
        unread = list[anyio.abc.SocketStream]()
        try:
            with little_memory(SLOTS * 11 * MB * 1_000_000):
                for _ in range(UNREAD):
                    unread.append(await server.send(body, request, **key))
                with anyio.fail_after(PATIENCE_S):
                    for stream in unread:
                        await stream.receive(15)
                    await until(lambda: len(waits) >= 2 * (UNREAD - SLOTS))
        finally:
            for stream in unread:
                await stream.aclose()
        await until(lambda: server.requests_in_flight == 0)
        method, _, target = request.partition(" ")
        whole = await client.request(method, target, content=json.dumps(body) if body else None, headers=headers)
    events = [json.loads(line[6:]) for line in whole.text.splitlines() if line.startswith("data: {")]
    texts = [event.get("delta") or event.get("choices", [{}])[0].get("delta", {}).get("content") for event in events]
    assert sum(len(text) for text in texts if text) == MB * 1_000_000
