"""Files of clients: ``POST /files``, ``GET /files/{file_id}``, and forms that have files as inputs of a run."""

import contextlib
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import anyio.to_thread
import msgspec
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from flock.agents.handoff import agent_of
from flock.agents.signature import text_as_json
from flock.errors import FlockError, InvalidData, StoreError
from flock.extras import pip_install
from flock.jsontype import check_depth, escape_pointer, explain
from flock.web.body import Body
from flock.web.orders import download_slot, engine_of, serving
from flock.web.requests import request_id_of, root_path
from flock.web.responses import PIECE_BYTES, JSONResponse, LimitedStream
from flock.web.routing import caller_of
from flock.web.wire import RUN_REQUEST

logger = logging.getLogger("flock.api")

#: Max parts of a form that are files, and max parts that are not.
MAX_PARTS = 100


class _Form(MultiPartParser):
    has_ended, text_bytes = False, 0

    def on_part_end(self) -> None:
        super().on_part_end()
        self.text_bytes += len(text.encode()) if isinstance(text := self.items[-1][1], str) else 0
        if self.text_bytes > self.max_part_size:
            raise MultiPartException(f"its texts have more than {self.max_part_size} bytes (max_body_bytes).")

    def on_end(self) -> None:
        self.has_ended = True


@contextlib.asynccontextmanager
async def _upload(request: Request) -> AsyncIterator[Body]:
    """Take a slot of the caller in the block. If it fails, read the rest, so that the client gets the error."""
    app = serving(request)
    body = Body(request, app.options.max_upload_bytes, app.options.body_timeout_s)
    try:
        with app.uploads.take(caller_of(request)):
            yield body
    except (FlockError, HTTPException):
        await body.drain()
        raise


async def form_as_json(request: Request) -> bytes:
    """Store the files of a form, and return the JSON body of ``POST /run/flock`` that says the same.

    A part is an input, unless it has the name of a member of that body. One that is repeated is a list.

    Raises: AgentNotFound; InvalidData if it is not a whole form; MalformedJSON; HTTPException; TooLarge;
        TooManyRequests; StoreError.
    """
    if find_spec("python_multipart") is None:
        raise HTTPException(415, f"This server takes no forms. To enable them: {pip_install('python-multipart')}")
    from python_multipart.multipart import parse_options_header

    app, sent, inputs = serving(request), dict[str, Any](), dict[str, Any]()
    limits = {"max_files": MAX_PARTS, "max_fields": MAX_PARTS, "max_part_size": app.options.max_body_bytes}
    members = {field.name: field.type for field in RUN_REQUEST.fields if field.name != "inputs"}
    # Some codecs take quadratic time, and some return characters that are not valid in text.
    charset = parse_options_header(request.headers["content-type"])[1].get(b"charset", b"utf-8")
    if charset.lower() not in (b"utf-8", b"utf8"):
        raise InvalidData.of("A form must be in UTF-8. Send it without a charset.")
    async with _upload(request) as body, contextlib.AsyncExitStack() as stack:
        parser = _Form(request.headers, body.upload(), **limits)
        try:
            form = await parser.parse()
            stack.push_async_callback(form.close)
            if not parser.has_ended:
                raise MultiPartException("its last boundary is missing.")
        except MultiPartException as exc:
            raise InvalidData.of(f"The form is not valid: {exc.message}") from exc
        except OSError as exc:  # its files are temporary files until they are stored
            logger.error("request %s: the files of a form cannot be written: %s", request_id_of(request), exc)
            raise StoreError("The form cannot be read now. The server's log has the reason.") from exc
        agent = agent_of(app.flock.agents, str(form.get("agent_name", "")))
        types = {field.name: field.type for field in agent.input.fields} | members
        for name in dict.fromkeys(form):
            type_ = types.get(name, Any)
            values = [await _value(request, type_, name, part) for part in form.getlist(name)]
            one = bytes(values[0])
            takes_list = not (explain(type_, b"[]", "") and explain(type_, b"[%b]" % one, ""))
            is_list = len(values) > 1 or (takes_list and explain(type_, one, ""))
            (sent if name in members else inputs)[name] = values if is_list else values[0]
    return msgspec.json.encode({**sent, "inputs": inputs})


async def _value(request: Request, type_: Any, name: str, part: UploadFile | str) -> msgspec.Raw:
    if isinstance(part, str):
        raw = text_as_json(type_, part)
        check_depth(bytes(raw), serving(request).options.max_json_depth)
        return raw

    async def chunks() -> AsyncGenerator[bytes, None]:
        while chunk := await part.read(PIECE_BYTES):
            yield chunk

    files, at = (await engine_of(request)).files(), f"/inputs/{escape_pointer(name)}"
    file = await files.keep(chunks(), part.filename or "", part.content_type or "", at)
    return msgspec.Raw(msgspec.json.encode(file))


async def _not_empty(chunks: AsyncIterator[bytes]) -> AsyncGenerator[bytes, None]:
    is_empty = True
    async for chunk in chunks:
        is_empty = is_empty and not chunk
        yield chunk
    if is_empty:
        raise InvalidData.of("The file is empty. Send it as the body: curl --data-binary @a.png.")


async def post_file(request: Request) -> Response:
    """POST /files: the body is the file."""
    # curl sends the other type by default.
    declared = request.headers.get("content-type", "").replace("application/x-www-form-urlencoded", "")
    async with _upload(request) as body:
        file = await (await engine_of(request)).files().keep(_not_empty(body.upload()), declared=declared)
    return JSONResponse(file, 201, {"Location": f"{root_path(request.scope)}/files/{file.file_id}"})


async def _pieces(path: Path) -> AsyncGenerator[bytes, None]:
    with await anyio.to_thread.run_sync(open, path, "rb") as file:  # it is closed even if no thread can be started
        while piece := await anyio.to_thread.run_sync(file.read, PIECE_BYTES):
            yield piece


async def get_file(request: Request) -> Response:
    """GET /files/{file_id}: a browser shows only images."""
    files = (await engine_of(request)).files()
    found = files.find(request.path_params["file_id"])
    place = "inline" if found.media_type.startswith("image/") else "attachment"
    headers = {"Content-Security-Policy": "default-src 'none'; sandbox", "Content-Disposition": place}
    headers["Content-Length"] = str(found.size)
    if request.method == "HEAD":
        return Response(headers=headers, media_type=found.media_type)
    return LimitedStream(_pieces(files.path(found.file_id)), download_slot(request), headers, found.media_type)
