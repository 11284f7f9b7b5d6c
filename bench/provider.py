"""A model provider that answers each request at once, with the same answer: python -m bench.provider"""

import asyncio
import json
import re
from typing import cast

import uvloop

ANSWER = {
    "id": "chatcmpl-1",
    "object": "chat.completion",
    "model": "fake",
    "choices": [
        {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": '{"is_good": true}'}}
    ],
    "usage": {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15},
}
BODY = json.dumps(ANSWER).encode()
RESPONSE = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(BODY) + BODY
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")


class Provider(asyncio.Protocol):
    """One connection of a client. It reads requests to their end, and sends the same response to each."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._received = cast(asyncio.Transport, transport), b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        found = LENGTH.search(self._received, 0, head + 2) if head >= 0 else None
        if found and len(self._received) >= head + 4 + int(found[1]):
            self._received = b""
            self._transport.write(RESPONSE)


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Provider, "127.0.0.1", 0)
    print(f"Running on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
