"""Files of clients: ``POST /files``, ``GET /files/{file_id}``, and forms that have files as inputs of a run."""

from collections.abc import AsyncGenerator
from importlib.util import find_spec
from typing import Any

import anyio
import msgspec
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request
from starlette.responses import Response

from flock.agents.signature import text_as_json
from flock.declared import agent_of
from flock.errors import FlockError, InvalidData
from flock.extras import pip_install
from flock.jsontype import escape_pointer, explain
from flock.web.body import Body
from flock.web.orders import download_slot, engine_of, serving
from flock.web.requests import query_of, root_path
from flock.web.responses import PIECE_BYTES, JSONResponse, LimitedStream, head_of_stream
from flock.web.routing import caller_of
from flock.web.wire import RUN_REQUEST, FilesQuery

#: Max parts of a form that are files, and max parts that are not.
MAX_PARTS = 100
#: A browser must neither run scripts of a file, nor take it for a page of ours.
SANDBOX = "default-src 'none'; sandbox"


class _Form(MultiPartParser):
    has_ended = False

    def on_end(self) -> None:
        self.has_ended = True


async def form_as_json(request: Request) -> bytes:
    """Store the files of a form, and return the JSON body of ``POST /run/flock`` that says the same.

    A part is an input, unless it has the name of a member of that body. One that is repeated is a list.

    Raises: AgentNotFound; InvalidData if it is not a whole form; HTTPException; TooLarge; TooManyRequests; StoreError.
    """
    if find_spec("python_multipart") is None:
        raise HTTPException(415, f"This server takes no forms. To enable them: {pip_install('python-multipart')}")
    app = serving(request)
    body = Body(request, app.options.max_upload_bytes, app.options.body_timeout_s)
    limits = {"max_files": MAX_PARTS, "max_fields": MAX_PARTS, "max_part_size": app.options.max_body_bytes}
    parser = _Form(request.headers, body.upload(), **limits)
    members = {field.name: field.type for field in RUN_REQUEST.fields if field.name != "inputs"}
    sent, inputs = dict[str, Any](), dict[str, Any]()
    try:
        with app.uploads.take(caller_of(request)):
            form = await parser.parse()
            try:
                if not parser.has_ended:
                    raise MultiPartException("its last boundary is missing.")
                agent = agent_of(app.flock.agents, str(form.get("agent_name", "")))
                types = {field.name: field.type for field in agent.input.fields} | members
                for name in dict.fromkeys(form):
                    type_ = types.get(name, Any)
                    values = [await _value(request, type_, name, part) for part in form.getlist(name)]
                    one = bytes(values[0])
                    is_list = len(values) > 1 or (explain(type_, one, "") and not explain(type_, b"[%b]" % one, ""))
                    (sent if name in members else inputs)[name] = values if is_list else values[0]
            finally:
                await form.close()
    except MultiPartException as exc:
        await body.drain()
        raise InvalidData.of(f"The form is not valid: {exc.message}") from exc
    except (FlockError, HTTPException):
        await body.drain()
        raise
    return msgspec.json.encode({**sent, "inputs": inputs})


async def _value(request: Request, type_: Any, name: str, part: UploadFile | str) -> msgspec.Raw:
    if isinstance(part, str):
        return text_as_json(type_, part)

    async def chunks() -> AsyncGenerator[bytes, None]:
        while chunk := await part.read(PIECE_BYTES):
            yield chunk

    files, at = (await engine_of(request)).files(), f"/inputs/{escape_pointer(name)}"
    return msgspec.Raw(
        msgspec.json.encode(await files.keep(chunks(), part.filename or "", part.content_type or "", at))
    )


async def post_file(request: Request) -> Response:
    """POST /files: the body is the file."""
    app, name, declared = serving(request), query_of(request, FilesQuery).name, request.headers.get("content-type", "")
    if declared == "application/x-www-form-urlencoded":  # what curl says of any file
        declared = ""
    body = Body(request, app.options.max_upload_bytes, app.options.body_timeout_s)
    try:
        with app.uploads.take(caller_of(request)):
            file = await (await engine_of(request)).files().keep(body.upload(), name, declared)
    except FlockError:
        await body.drain()
        raise
    return JSONResponse(file, 201, {"Location": f"{root_path(request.scope)}/files/{file.file_id}"})


async def get_file(request: Request) -> Response:
    """GET /files/{file_id}: a browser shows only images."""
    files = (await engine_of(request)).files()
    found = files.find(request.path_params["file_id"])
    place = "inline" if found.media_type.startswith("image/") else "attachment"
    headers = {"Content-Security-Policy": SANDBOX, "Content-Disposition": place, "Content-Length": str(found.size)}
    if request.method == "HEAD":
        return head_of_stream(found.media_type, headers)

    async def pieces() -> AsyncGenerator[bytes, None]:
        async with await anyio.open_file(files.path(found.file_id), "rb") as file:
            while piece := await file.read(PIECE_BYTES):
                yield piece

    return LimitedStream(pieces(), download_slot(request), headers, found.media_type)
