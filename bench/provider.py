"""A model provider that answers each request at once, with the same answer: python -m bench.provider

A request for two fields, one of them ``summary``, gets them, and in 100 pieces if it asks for a stream.
"""

import asyncio
import json
import re
from typing import cast

import uvloop

PIECES = 100
#: The answer in pieces: the summary word by word between what is around it.
REVIEW = ['{"summary": "', *["word "] * (PIECES - 2), '", "is_good": true}']
USAGE = {"prompt_tokens": 10, "completion_tokens": 5, "total_tokens": 15}


def whole(content: str) -> bytes:
    message = {"role": "assistant", "content": content}
    answer = {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "fake",
        "choices": [{"index": 0, "finish_reason": "stop", "message": message}],
        "usage": USAGE,
    }
    body = json.dumps(answer).encode()
    return b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body


def in_pieces(pieces: list[str]) -> bytes:
    """Return a stream that has arrived at once."""

    def event(choices: list[object], **more: object) -> bytes:
        head = {"id": "chatcmpl-1", "object": "chat.completion.chunk", "created": 1, "model": "fake"}
        data = b"data: " + json.dumps({**head, "choices": choices, **more}).encode() + b"\n\n"
        return b"%x\r\n%b\r\n" % (len(data), data)

    deltas = [{"role": "assistant", "content": ""}, *({"content": text} for text in pieces)]
    texts = [event([{"index": 0, "delta": delta, "finish_reason": None}]) for delta in deltas]
    end = event([{"index": 0, "delta": {}, "finish_reason": "stop"}]) + event([], usage=USAGE)
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    return head + b"".join(texts) + end + b"e\r\ndata: [DONE]\n\n\r\n0\r\n\r\n"


JUDGED, REVIEWED, STREAMED = whole('{"is_good": true}'), whole("".join(REVIEW)), in_pieces(REVIEW)
LENGTH = re.compile(rb"(?i)\r\ncontent-length: *(\d+)")
IS_STREAM = re.compile(rb'"stream": ?true')


class Provider(asyncio.Protocol):
    """One connection of a client. It reads requests to their end, and sends the same response to each."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport, self._received = cast(asyncio.Transport, transport), b""

    def data_received(self, data: bytes) -> None:
        self._received += data
        head = self._received.find(b"\r\n\r\n")
        found = LENGTH.search(self._received, 0, head + 2) if head >= 0 else None
        if found and len(self._received) >= head + 4 + int(found[1]):
            request, self._received = self._received, b""
            self._transport.write(answer_to(request))


def answer_to(request: bytes) -> bytes:
    if b"summary" not in request:
        return JUDGED
    return STREAMED if IS_STREAM.search(request) else REVIEWED


async def main() -> None:
    server = await asyncio.get_running_loop().create_server(Provider, "127.0.0.1", 0)
    print(f"Running on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(main())
