"""The body of a request, with limits on its size, its speed and its compression."""

import contextlib
import functools
import hashlib
import re
import zlib
from collections.abc import AsyncGenerator, Iterator

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import Request

from flock.errors import InvalidData, MalformedJSON, TooLarge
from flock.fair import FairShare
from flock.jsontype import depth_steps, malformed

#: The timeout of a body applies to a JSON body as a whole, and to each of these pieces of an upload.
PACE_BYTES = 64 * 1024
#: Max size of a piece of an upload that is yielded, and of a piece of gzip that is decompressed in one step.
PIECE_BYTES = 64 * 1024
GZIP_PIECE_BYTES = 16 * 1024
#: Max ratio of decompressed to received bytes. It applies only above MIN_DECOMPRESSED_BYTES.
MAX_DECOMPRESSION_RATIO = 100
MIN_DECOMPRESSED_BYTES = 16 * 1024 * 1024
#: Max bytes of a rejected body that are still read, and max seconds. Many clients, and nginx, read no response
#: before they have sent the whole body. If the server closes the connection earlier, they lose the response.
DRAIN_BYTES = 8 * 1024 * 1024
DRAIN_TIMEOUT_S = 5


def media_type_of(request: Request, *accepted: str) -> str:
    """Return the media type of the body, without parameters. Raises HTTPException 415 if it is not in *accepted*."""
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in accepted:
        return media_type
    problem = f"is {content_type!r}" if content_type else "is missing"
    options = " or ".join(f"-H 'Content-Type: {type_}'" for type_ in accepted)
    detail = f"The Content-Type {problem}. It must be {' or '.join(accepted)}. With curl: {options}"
    if "text/csv" in accepted:
        detail += ". For a file, use --data-binary: -d joins its lines."
    raise HTTPException(415, detail, headers={"Accept": ", ".join(accepted)})


class Body:
    """The body of *request*.

    Args:
        max_bytes: max size, decompressed.
        timeout_s: max seconds for a JSON body to arrive, or for each 64 KiB of an upload.

    Attributes:
        total_bytes: the bytes that have arrived, decompressed.
        received_bytes: the bytes that have arrived, as they were sent.
    """

    def __init__(self, request: Request, max_bytes: int, timeout_s: float) -> None:
        self.total_bytes = 0
        self.received_bytes = 0
        self._share = FairShare()
        self._request = request
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        request.scope["flock.is_unread"] = True  # a response before the body's end must close the connection
        declared = request.headers.get("content-length", "")
        self._declared_bytes = int(declared) if re.fullmatch(r"[0-9]{1,18}", declared) else 0

    @functools.cached_property
    def _hash(self) -> "hashlib._Hash":  # JSON needs none
        return hashlib.sha256()

    async def json(self, max_depth: int, default: bytes | None = None) -> bytes:
        """Return the whole JSON body, or *default* if it is empty.

        Raises:
            HTTPException: 415 if it is compressed; 408 if it does not arrive in time.
            TooLarge: it is too long.
            MalformedJSON: it is empty and there is no default, not UTF-8, or nested deeper than *max_depth*.
        """
        if (encoding := self._encoding()) != "identity":
            detail = f"A JSON body with Content-Encoding {encoding!r} is not supported. Send it uncompressed."
            raise _wrong_encoding(detail, "identity")
        parts = bytearray()
        # Our server sets this. A deadline for each request would take as long as the rest of this function.
        has_arrived = self._request.scope.get("flock.body_has_arrived", False)
        try:
            self._check_size(self._declared_bytes)
            with contextlib.nullcontext() if has_arrived else self._arriving(self._timeout_s):
                while chunk := await self._next():
                    parts += self._counted(chunk)
                    await self._share.checkpoint()
        except TooLarge:
            await self.drain()
            raise
        body = bytes(parts)
        if not body.strip():
            if default is not None:
                return default
            raise MalformedJSON("the body is empty", 1, 1)
        try:
            body.decode()  # msgspec does not check raw members, such as the inputs
        except UnicodeDecodeError as exc:
            raise malformed(body, exc) from exc
        for _ in depth_steps(body, max_depth):
            await self._share.checkpoint()
        await self._share.checkpoint()
        return body

    async def upload(self) -> AsyncGenerator[bytes, None]:
        """Yield the body in pieces, decompressed if it is gzip.

        Raises: HTTPException and TooLarge as ``json`` does; InvalidData if it is not valid gzip. After an
            error, the rest of the body is unread; see ``drain``.
        """
        encoding = self._encoding()
        if encoding not in ("identity", "gzip"):
            detail = f"Content-Encoding {encoding!r} is not supported. Use gzip, or send the body uncompressed."
            raise _wrong_encoding(detail, "gzip, identity")
        self._check_size(self._declared_bytes)
        gunzip = _Gunzip() if encoding == "gzip" else None
        left_s, paced = self._timeout_s, 0
        while True:
            started_at = anyio.current_time()
            with self._arriving(left_s):
                chunk = await self._next()
            left_s -= anyio.current_time() - started_at  # counts only the wait for the sender, not the processing
            if not chunk:
                break
            paced += len(chunk)
            if paced >= PACE_BYTES:
                left_s, paced = self._timeout_s, 0
            for piece in _cut(chunk, PIECE_BYTES) if gunzip is None else gunzip.pieces(chunk):
                await self._share.checkpoint()
                if piece:
                    self._hash.update(piece)
                    yield self._counted(piece)
        if gunzip is not None and self.received_bytes:
            gunzip.check_end()

    def digest(self) -> bytes:
        """Return the SHA-256 of the part of the upload that has arrived."""
        return self._hash.digest()

    async def drain(self) -> None:
        """Read and drop the rest of the body for up to DRAIN_TIMEOUT_S, unless it is longer than DRAIN_BYTES.

        A client that waits for ``100 Continue`` has not sent its body, and need not.
        """
        waits = self.received_bytes == 0 and self._request.headers.get("expect", "").lower() == "100-continue"
        if waits or self._declared_bytes - self.received_bytes > DRAIN_BYTES:
            return
        last_byte = self.received_bytes + DRAIN_BYTES
        with contextlib.suppress(HTTPException), anyio.move_on_after(DRAIN_TIMEOUT_S):
            while self.received_bytes <= last_byte and await self._next():
                pass

    async def _next(self) -> bytes:
        """Return the next part of the body, or b"" at its end. Raises HTTPException 400 if the client disconnects."""
        while self._request.scope["flock.is_unread"]:
            message = await self._request.receive()
            if message["type"] == "http.disconnect":  # the response only ends the handler; no client receives it
                raise HTTPException(400, "The client disconnected before the whole body had arrived.")
            self._request.scope["flock.is_unread"] = message.get("more_body", False)
            chunk: bytes = message.get("body", b"")
            if chunk:
                self.received_bytes += len(chunk)
                return chunk
        return b""

    def _encoding(self) -> str:
        return ", ".join(self._request.headers.getlist("content-encoding")).strip().lower()[:100] or "identity"

    @contextlib.contextmanager
    def _arriving(self, timeout_s: float) -> Iterator[None]:
        with anyio.CancelScope(deadline=anyio.current_time() + timeout_s) as scope:
            yield
        if scope.cancelled_caught:  # otherwise a slow sender would hold its slot forever
            raise HTTPException(408, f"The body did not arrive within {self._timeout_s:g} s.")

    def _check_size(self, size: int) -> None:
        if size > self._max_bytes:
            raise TooLarge(
                f"The body is longer than {self._max_bytes} bytes, the limit of this server. Send less at once."
            )

    def _counted(self, piece: bytes) -> bytes:
        self.total_bytes += len(piece)
        self._check_size(self.total_bytes)
        if self.total_bytes > max(MIN_DECOMPRESSED_BYTES, MAX_DECOMPRESSION_RATIO * self.received_bytes):
            raise TooLarge(
                f"The decompressed body is longer than {MIN_DECOMPRESSED_BYTES} bytes and more than "
                f"{MAX_DECOMPRESSION_RATIO} times as long as the compressed one. Send it without Content-Encoding."
            )
        return piece


def _wrong_encoding(detail: str, accepted: str) -> HTTPException:
    return HTTPException(415, detail, headers={"Accept-Encoding": accepted})  # RFC 9110, section 12.5.3


def _cut(data: bytes, length: int) -> Iterator[bytes]:
    for start in range(0, len(data), length):
        yield data[start : start + length]


class _Gunzip:
    """A decompressor for gzip with any number of members (RFC 1952, section 2.2), in pieces of a bounded size."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)

    def pieces(self, compressed: bytes) -> Iterator[bytes]:
        """Yield the output of each step, which may be empty. Raises InvalidData."""
        for data in _cut(compressed, GZIP_PIECE_BYTES):  # small, since each member copies the bytes after its end
            while data:
                if self._member.eof:
                    self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)
                try:
                    piece = self._member.decompress(data, PIECE_BYTES)
                except zlib.error as exc:
                    raise InvalidData.of("The body is not valid gzip: it cannot be decompressed.") from exc
                yield piece
                data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail

    def check_end(self) -> None:
        """Raise InvalidData if the end is missing."""
        if not self._member.eof:
            raise InvalidData.of("The body is not valid gzip: its end is missing.")
