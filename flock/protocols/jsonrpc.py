"""JSON-RPC 2.0: messages and errors, for the protocols that use it."""

from typing import Annotated, Any, Literal

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from flock.errors import FlockError
from flock.web.problems import on_error
from flock.web.responses import JSONResponse

# Codes of errors
PARSE_ERROR, INVALID_REQUEST, METHOD_NOT_FOUND, INVALID_PARAMS, INTERNAL_ERROR = -32700, -32600, -32601, -32602, -32603
#: For all errors that a protocol does not know.
OTHER_ERROR = -32000

ID = Annotated[int, msgspec.Meta(ge=-(2**53), le=2**53)] | Annotated[str, msgspec.Meta(max_length=256)]


class RPCError(FlockError):
    """A request that a protocol has an error for, with the status of the response."""

    def __init__(self, code: int, message: str, status: int = 400, **data: Any) -> None:
        super().__init__(message)
        self.shown = {"code": code, "message": message, **({"data": data} if data else {})}
        self.status = status


class Message(msgspec.Struct, frozen=True):
    """A request, or a notification if its id is missing. Without a method it is a response, which is ignored."""

    jsonrpc: Literal["2.0"]
    method: str = ""
    sent_id: ID | msgspec.UnsetType = msgspec.field(default=msgspec.UNSET, name="id")
    params: msgspec.Raw = msgspec.Raw(b"{}")

    @property
    def id(self) -> ID | None:
        return None if isinstance(self.sent_id, msgspec.UnsetType) else self.sent_id


def decoded(raw: bytes | msgspec.Raw, type_: Any, code: int) -> Any:
    """Return *raw* as a *type_*. Raises RPCError with *code* if it is not one."""
    try:
        return msgspec.json.decode(raw, type=type_)
    except (msgspec.DecodeError, RecursionError) as exc:
        what = "value of 'params'" if code == INVALID_PARAMS else "message of JSON-RPC 2.0"
        code = code if isinstance(exc, msgspec.ValidationError) else PARSE_ERROR
        raise RPCError(code, f"This is not a valid {what}: {exc}".replace("`", "'")) from exc


def reply(message: Message | None, **content: Any) -> dict[str, Any]:
    """Return the response to *message*; None if its id is not known."""
    return {"jsonrpc": "2.0", "id": None if message is None else message.id, **content}


async def failed(request: Request, message: Message | None, exc: FlockError) -> Response:
    """Return the response to a message that an error of the engine has ended, in the shape of the protocol."""
    response = await on_error(request, exc)
    error = msgspec.json.decode(response.body)["error"]
    del response.headers["content-length"]
    return JSONResponse(reply(message, error=error), response.status_code, response.headers)
