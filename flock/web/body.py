"""The body of a request as it arrives: how long it may be, how slow, and how it may be packed."""

import contextlib
import hashlib
import zlib
from collections.abc import AsyncIterator, Iterator

import anyio
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request

from flock.errors import FieldError, InvalidData, MalformedJSON, TooLarge
from flock.fair import FairShare
from flock.jsontype import depth_steps, malformed

__all__ = ["Body", "media_type_of"]

#: So much of an upload has to come within the time in which a short body has to come as a whole.
PACE_BYTES = 64 * 1024
#: How much of an upload is given at once, and how much of gzip is looked at in one step.
PIECE_BYTES = 64 * 1024
PACKED_BYTES = 16 * 1024
#: How many times as long as what was received an upload may become when it is unpacked, and what it may have anyway.
MAX_UNPACKED_RATIO = 100
MIN_UNPACKED_BYTES = 16 * 1024 * 1024
#: How much of a body that is refused is read all the same, and for how many seconds, since many clients read no answer
#: before they have sent it.
DRAINED_BYTES = 8 * 1024 * 1024
DRAIN_TIMEOUT_S = 5


def media_type_of(request: Request, *accepted: str) -> str:
    """What the body is said to be, without parameters. Raises HTTPException 415 where that is none of *accepted*."""
    content_type = request.headers.get("content-type", "")
    media_type = content_type.partition(";")[0].strip().lower()
    if media_type in accepted:
        return media_type
    sent = f"{content_type!r} was sent" if content_type else "none was sent"
    options = " or ".join(f"-H 'Content-Type: {each}'" for each in accepted)
    detail = f"The body must be {' or '.join(accepted)}, and say so ({sent}). With curl: {options}"
    raise HTTPException(415, detail, headers={"Accept": ", ".join(accepted)})


class Body:
    """The body of *request*.

    Args:
        max_bytes: how long it may be, unpacked.
        timeout_s: how long it may take to arrive; of an upload, each 64 KiB.

    Attributes:
        total_bytes: how much of it has arrived, unpacked.
        received_bytes: how much of it has arrived, as it was sent.
    """

    def __init__(self, request: Request, max_bytes: int, timeout_s: float) -> None:
        self.total_bytes = 0
        self.received_bytes = 0
        self._share = FairShare()
        self._request = request
        self._max_bytes = max_bytes
        self._timeout_s = timeout_s
        self._stream = self._read_on()
        self._hash = hashlib.sha256()
        request.scope["flock.is_unread"] = True  # until its end: the connection must end with an answer before that
        announced = request.headers.get("content-length", "")
        if announced.isdecimal() and int(announced) > max_bytes:
            raise self._too_long()

    async def json(self, max_depth: int, default: bytes | None = None) -> bytes:
        """All of a JSON body, or *default* where it is empty.

        Raises:
            HTTPException: 415 where it is compressed; 408 where it does not arrive in time.
            TooLarge: it is too long.
            MalformedJSON: it is empty and there is no default, not UTF-8, or nested deeper than *max_depth*.
        """
        if (encoding := self._encoding()) != "identity":
            detail = (
                f"Send the body as it is, uncompressed: a JSON body with Content-Encoding {encoding!r} is not read."
            )
            raise _wrong_encoding(detail, "identity")
        parts = bytearray()
        with self._arriving(self._timeout_s):
            async for chunk in self._stream:
                parts += self._counted(chunk)
                await self._share.checkpoint()
        body = bytes(parts)
        if not body.strip():
            if default is not None:
                return default
            raise MalformedJSON("the body is empty", 1, 1)
        try:
            body.decode()  # a decoder skips over what it does not look into, such as the inputs
        except UnicodeDecodeError as exc:
            raise malformed(body, exc) from exc
        for _ in depth_steps(body, max_depth):
            await self._share.checkpoint()
        await self._share.checkpoint()
        return body

    async def upload(self) -> AsyncIterator[bytes]:
        """A body of any length, piece by piece, unpacked where it is gzip.

        Raises: HTTPException and TooLarge as ``json``; InvalidData where it is no gzip. It is not read to its end then;
            see ``drain``.
        """
        encoding = self._encoding()
        if encoding not in ("identity", "gzip"):
            raise _wrong_encoding(f"Content-Encoding {encoding!r} is not known here; gzip is.", "gzip, identity")
        unpacked = _Gunzip() if encoding == "gzip" else None
        left_s, paced = self._timeout_s, 0
        while True:
            began = anyio.current_time()
            with self._arriving(left_s):
                chunk = await anext(self._stream, b"")
            left_s -= anyio.current_time() - began  # what others do with it is not its sender's time
            if not chunk:
                break
            paced += len(chunk)
            if paced >= PACE_BYTES:
                left_s, paced = self._timeout_s, 0
            for piece in _cut(chunk, PIECE_BYTES) if unpacked is None else unpacked.pieces(chunk):
                await self._share.checkpoint()
                if piece:
                    self._hash.update(piece)
                    yield self._counted(piece)
        if unpacked is not None:
            unpacked.check_end()

    def digest(self) -> bytes:
        """A hash of what has arrived of an upload by now."""
        return self._hash.digest()

    async def drain(self) -> None:
        """Read on for a while, for nothing."""
        drained = 0
        with contextlib.suppress(ClientDisconnect), anyio.move_on_after(DRAIN_TIMEOUT_S):
            async for chunk in self._stream:
                drained += len(chunk)
                if drained > DRAINED_BYTES:
                    return

    async def _read_on(self) -> AsyncIterator[bytes]:
        async for chunk in self._request.stream():
            self.received_bytes += len(chunk)
            yield chunk
        self._request.scope["flock.is_unread"] = False

    def _encoding(self) -> str:
        return ", ".join(self._request.headers.getlist("content-encoding")).strip().lower()[:100] or "identity"

    @contextlib.contextmanager
    def _arriving(self, timeout_s: float) -> Iterator[None]:
        try:
            with anyio.fail_after(timeout_s):
                yield
        except TimeoutError as exc:  # a sender that trickles would hold its place for ever
            raise HTTPException(408, f"The body did not arrive within {self._timeout_s:g} s.") from exc
        except ClientDisconnect as exc:  # nobody will read the answer
            raise HTTPException(400, "The connection was closed before the whole body had arrived.") from exc

    def _counted(self, piece: bytes) -> bytes:
        self.total_bytes += len(piece)
        if self.total_bytes > self._max_bytes:
            raise self._too_long()
        if self.total_bytes > max(MIN_UNPACKED_BYTES, MAX_UNPACKED_RATIO * self.received_bytes):
            raise TooLarge(
                f"The body is more than {MAX_UNPACKED_RATIO} times as long when it is unpacked, which only "
                f"{MIN_UNPACKED_BYTES} bytes may be. Send it without Content-Encoding."
            )
        return piece

    def _too_long(self) -> TooLarge:
        return TooLarge(f"The body is longer than {self._max_bytes} bytes, all that this server takes at once.")


def _wrong_encoding(detail: str, accepted: str) -> HTTPException:
    return HTTPException(415, detail, headers={"Accept-Encoding": accepted})  # RFC 9110, section 12.5.3


def _cut(data: bytes, length: int) -> Iterator[bytes]:
    for start in range(0, len(data), length):
        yield data[start : start + length]


class _Gunzip:
    """Members of gzip one after the other (RFC 1952, section 2.2), in pieces of a bounded size."""

    def __init__(self) -> None:
        self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)
        self._is_empty = True

    def pieces(self, packed: bytes) -> Iterator[bytes]:
        """What each step unpacks, which may be nothing. Raises InvalidData."""
        for data in _cut(packed, PACKED_BYTES):  # each member copies what follows it
            while data:
                if self._member.eof:
                    self._member = zlib.decompressobj(zlib.MAX_WBITS | 16)
                self._is_empty = False
                try:
                    piece = self._member.decompress(data, PIECE_BYTES)
                except zlib.error as exc:
                    raise _not_gzip("it cannot be unpacked") from exc
                yield piece
                data = self._member.unused_data if self._member.eof else self._member.unconsumed_tail

    def check_end(self) -> None:
        """Raise InvalidData where the end is missing."""
        if not self._is_empty and not self._member.eof:
            raise _not_gzip("its end is missing")


def _not_gzip(reason: str) -> InvalidData:
    return InvalidData([FieldError(detail=f"The body is no gzip, as its Content-Encoding says: {reason}.", pointer="")])
