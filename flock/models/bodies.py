"""The bodies of responses of other servers, of models and MCP: decompressed, and read up to a limit."""

import contextlib
import zlib
from collections.abc import AsyncGenerator, Mapping
from typing import TYPE_CHECKING, NamedTuple

import anyio.lowlevel

from flock.models import http

if TYPE_CHECKING:
    import httpx

#: What is accepted as a ``Content-Encoding``: httpx would decompress others too, but without a bound.
ENCODING = "gzip"
#: Encodings that servers send anyway, and zlib decompresses with a bound.
WINDOW_BITS = {"gzip": zlib.MAX_WBITS | 16, "x-gzip": zlib.MAX_WBITS | 16, "deflate": zlib.MAX_WBITS}
#: Max size of one JSON message: a body, or an event of a stream.
MAX_MESSAGE_BYTES = 16 * 1024 * 1024
#: Max bytes of the body of an error that are read.
MAX_ERROR_BYTES = 64 * 1024
#: Max size of a piece that is decompressed in one step.
PIECE_BYTES = 64 * 1024


class BadBody(Exception):
    """A body that was not read to its end. Its text follows "sent" in a message."""

    @classmethod
    def too_long(cls) -> "BadBody":
        return cls(f"an answer that is too long (more than {MAX_MESSAGE_BYTES} bytes)")


class Whole(NamedTuple):
    """A response that was read, and its decompressed body. To make another response takes as long as to read one."""

    response: "httpx.Response"
    content: bytes

    @property
    def status_code(self) -> int:
        return self.response.status_code

    @property
    def headers(self) -> Mapping[str, str]:
        return self.response.headers

    @property
    def text(self) -> str:
        """The body as text, in the encoding that its headers name."""
        headers = self.response.headers.copy()
        headers.pop("content-encoding", None)
        return type(self.response)(self.status_code, headers=headers, content=self.content).text


async def pieces_of(response: "httpx.Response | Whole") -> AsyncGenerator[bytes, None]:
    """Yield the decompressed body in small pieces. Raises BadBody; httpx.HTTPError."""
    if isinstance(response, Whole) or response.is_stream_consumed:  # a transport without a network, as in tests
        yield response.content
        return
    encoding = response.headers.get("content-encoding", "identity").strip().lower()
    if "," in encoding or encoding in ("br", "zstd", "compress"):
        raise BadBody(f"an answer with the Content-Encoding {encoding[:100]!r}, although only {ENCODING!r} is accepted")
    window_bits = WINDOW_BITS.get(encoding)  # like httpx, ignore values that are not encodings, such as "utf-8"
    gunzip = None if window_bits is None else zlib.decompressobj(window_bits)
    async with contextlib.aclosing(response.aiter_raw()) as chunks:  # type: ignore[type-var]
        async for chunk in chunks:
            if gunzip is None:
                yield chunk
                continue
            if gunzip.eof:  # zlib would keep what follows
                return
            piece, rest = b"", chunk
            while rest or len(piece) == PIECE_BYTES:  # zlib may have consumed the chunk, but not written all of it
                try:
                    piece = gunzip.decompress(rest, PIECE_BYTES)
                except zlib.error as exc:
                    raise http.errors("DecodingError")[0](str(exc)) from exc
                rest = gunzip.unconsumed_tail
                yield piece
                await anyio.lowlevel.checkpoint()  # a chunk may expand a thousandfold


async def read_whole(response: "httpx.Response") -> Whole:
    """Return *response* as a whole. The body of an error is cut at MAX_ERROR_BYTES.

    Raises: BadBody if the body is too long, or compressed in another way; httpx.HTTPError.
    """
    body, limit = bytearray(), MAX_MESSAGE_BYTES if response.is_success else MAX_ERROR_BYTES
    try:
        async with contextlib.aclosing(pieces_of(response)) as pieces:
            async for piece in pieces:
                body += piece
                if len(body) > limit:
                    raise BadBody.too_long()
    except BadBody:
        if response.is_success:
            raise
    return Whole(response, bytes(body[:limit]))
