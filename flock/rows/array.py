"""A streaming reader for rows in a JSON array."""

import codecs
import re
from collections.abc import AsyncGenerator, AsyncIterable, AsyncIterator

from flock.errors import InvalidData, TooLarge
from flock.fair import FairShare
from flock.rows.tables import GATHERED_CHARS, RowMapping, check_text, json_row, with_end
from flock.runs import Row

#: What an array is split at: whole strings, brackets and commas. A lone quote is a string that has not arrived whole.
TOKENS = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|["\[\]{},]', re.DOTALL)
NO_ARRAY = 'This is not a JSON array. The rows must be objects in brackets, such as [{"text": "a"}, {"text": "b"}].'

NO_REQUEST = " A request with batch_inputs has no agent_name in the query."


async def array_rows(
    chunks: AsyncIterable[bytes], row_mapping: RowMapping, *, max_row_bytes: int, max_depth: int
) -> AsyncGenerator[Row, None]:
    """Yield one row for each element of a JSON array, as it arrives.

    Raises: InvalidData if it is not an array, or its end is missing; TooLarge as in ``ndjson_rows``.
    """
    position, share = 0, FairShare()
    async for element in _elements(chunks, max_row_bytes):
        yield await json_row(element, row_mapping, max_depth, share, at=f"/{position}")
        position += 1


async def _elements(chunks: AsyncIterable[bytes], max_bytes: int) -> AsyncIterator[bytes]:
    text, scanned, depth, number, is_open, share = b"", 0, 0, 0, False, FairShare()
    new = bytearray()
    async for chunk in with_end(chunks):
        new += chunk or b""
        if chunk is not None and len(new) < max(GATHERED_CHARS, len(text)):
            continue  # a string that is incomplete is scanned again each time, so wait for enough input
        text += new
        new.clear()
        if not is_open:
            check_text(text)
            text = text.removeprefix(codecs.BOM_UTF8).lstrip()
            if not text and chunk is not None:
                continue
            if not text.startswith(b"["):
                raise InvalidData.of(NO_ARRAY + (NO_REQUEST if text.startswith(b"{") else ""))
            is_open, depth, text = True, 1, text[1:]
        start = 0
        for token in TOKENS.finditer(text, scanned):
            mark = token[0]
            if mark == b'"' or not depth:
                break
            scanned = token.end()
            if depth == 1 and mark in b",]}":
                element, start = text[start : token.start()].strip(), scanned
                if len(element) > max_bytes:
                    raise _too_long(number, max_bytes)
                if element or number or mark == b",":
                    yield element
                    await share.checkpoint()
                    number += 1
            depth += (mark in b"[{") - (mark in b"]}")
        text, scanned = text[start:], scanned - start
        if not depth and text.strip():
            raise InvalidData.of(f"There is more text after the end of the JSON array, which has {number:,} rows.")
        if len(text) > max_bytes:
            raise _too_long(number, max_bytes)
    if depth:
        raise InvalidData.of(f"The end of the JSON array is missing after {number:,} rows. It may have been cut short.")


def _too_long(number: int, max_bytes: int) -> TooLarge:
    return TooLarge(f"Row {number + 1} is longer than {max_bytes} bytes, the limit for one row.")
