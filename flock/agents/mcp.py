"""Tools of MCP servers, over streamable HTTP.

``mcp_tools("https://…")`` is an entry of ``tools=``. The server's tools are listed when the engine starts, and at each
use until that has succeeded. Requests of a server to its client, such as to ask a person ("elicitation"), are refused.

Source: Model Context Protocol 2025-11-25, "Transports", "Lifecycle", "Progress", "Tools". Newer servers accept it too.
"""

import contextlib
import itertools
import logging
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, Unpack

import anyio
import msgspec

from flock import __version__
from flock.agents.foreign import AnyArguments
from flock.agents.tools import Approval, ApprovalOptions, Tool, Toolbox, ToolSource, Unlisted
from flock.errors import CallError, DefinitionError
from flock.models import bodies, http
from flock.models.bodies import ENCODING, BadBody, read_whole
from flock.models.react import FINISH
from flock.models.sse import events_in, is_stream
from flock.runs import one_line, safe_text
from flock.scopes import start_in_empty_context

if TYPE_CHECKING:
    import httpx

logger = logging.getLogger("flock.checks")

T = TypeVar("T")

#: Receives the progress, the total if it is known, and a message.
OnProgress = Callable[[float, float | None, str], None]

PROTOCOL_VERSION = "2025-11-25"
#: The protocol's code for a request that is not supported (JSON-RPC 2.0, section 5.1).
METHOD_NOT_FOUND = -32601
#: Max pages of a list of tools that are read.
MAX_PAGES = 100


class MCPTools(ToolSource):
    """The tools of one server; see ``mcp_tools``."""

    def __init__(
        self,
        url: str,
        headers: Mapping[str, str],
        timeout_s: float,
        prefix: str,
        only: Collection[str] | None = None,
        approval: Approval = ToolSource.approval,
    ) -> None:
        parsed = http.library().URL(url)
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise DefinitionError(f"{url!r} is not the URL of an MCP server. Write https://host/path.")
        #: without credentials and the query, which may be secret
        self.name = str(parsed.copy_with(userinfo=b"", query=None, fragment=None))
        self._url = url
        self._headers = {
            **headers,
            "Accept": "application/json, text/event-stream",
            "Accept-Encoding": ENCODING,
            "Content-Type": "application/json",
        }
        self._timeout_s = timeout_s
        self.prefix = prefix
        self.approval = approval
        self._only = only
        self._ids = itertools.count(1)
        #: headers of the session; None if there is none
        self._session: Mapping[str, str] | None = None
        self._tools: Sequence[Tool] | None = None
        self._opening, self._listing = anyio.Lock(), anyio.Lock()

    def __repr__(self) -> str:
        return f"<MCPTools {self.name!r}>"

    @property
    def known_names(self) -> Sequence[str]:
        return [tool.name for tool in self._tools or ()]

    async def tools(self) -> Sequence[Tool]:
        async with self._listing:
            if self._tools is None:
                listed = await self._list()
                names = [tool.name for tool in listed]
                if missing := [name for name in self._only or () if name not in names]:
                    raise self._error(f"has no tool {missing[0]!r} (only=). Its tools: {', '.join(names)}")
                self._tools = [MCPTool(self, tool) for tool in listed if self._only is None or tool.name in self._only]
            return self._tools

    async def _list(self) -> list["ListedTool"]:
        found: list[ListedTool] = []
        cursor: str | None = None
        size = 0
        for _ in range(MAX_PAGES):
            sent = await self.request("tools/list", {} if cursor is None else {"cursor": cursor}, msgspec.Raw)
            size += len(sent)
            if size > bodies.MAX_MESSAGE_BYTES:
                raise self._error(f"sent {BadBody.too_long()}")
            page = self._decoded(sent, _Page, "returned an invalid result of tools/list")
            found += page.tools
            cursor = page.next_cursor
            if not cursor:
                return found
        raise self._error(f"has more than {MAX_PAGES} pages of tools")

    async def request(
        self, method: str, params: Mapping[str, Any], result_type: type[T], on_progress: OnProgress | None = None
    ) -> T:
        """Send a request, in a new session if there is none or if it has expired, and return the result.

        Raises: CallError if the server responds with an error; Unlisted if it cannot be reached.
        """
        try:
            with anyio.fail_after(self._timeout_s):
                result = await self._send_in_session(method, params, on_progress)
                return self._decoded(result, result_type, f"returned an invalid result of {method}")
        except (TimeoutError, http.library().TimeoutException) as exc:
            raise self._error(f"did not answer within {self._timeout_s:g} s (timeout_s)", Unlisted) from exc
        except BadBody as exc:
            raise self._error(f"sent {exc}") from exc
        except http.library().HTTPError as exc:
            raise self._error(f"could not be reached ({type(exc).__name__})", Unlisted) from exc

    def _decoded(self, sent: str | bytes | msgspec.Raw, type_: type[T], problem: str) -> T:
        try:
            return msgspec.json.decode(sent, type=type_)
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as exc:
            raise self._error(f"{problem}: {exc}") from exc

    async def _send_in_session(
        self, method: str, params: Mapping[str, Any], on_progress: OnProgress | None
    ) -> msgspec.Raw:
        used: Mapping[str, str] | None = None
        for _ in range(2):
            # Each request has its own client, because a program may have several event loops, one after the other.
            async with http.library().AsyncClient(timeout=self._timeout_s, headers=self._headers) as client:
                async with self._opening:
                    if self._session is used:  # there is none, or it has expired
                        self._session = await self._open_session(client)
                    used = self._session
                client.headers.update(used)
                result, _ = await self._send(client, method, params, on_progress)
            if result is not None:
                return result
        raise self._error("returned status 404")

    async def _open_session(self, client: "httpx.AsyncClient") -> Mapping[str, str]:
        params = {
            "protocolVersion": PROTOCOL_VERSION,
            "capabilities": {},
            "clientInfo": {"name": "flockapi", "version": __version__},
        }
        result, headers = await self._send(client, "initialize", params)
        if result is None:
            raise self._error("returned status 404")
        version = self._decoded(result, _Initialized, "returned an invalid result of initialize").protocol_version
        session = {"MCP-Protocol-Version": version}
        if "mcp-session-id" in headers:
            session["Mcp-Session-Id"] = headers["mcp-session-id"]
        if not all(map(str.isascii, session.values())):
            raise self._error("sent a session ID or a protocol version that is not ASCII")
        client.headers.update(session)
        await self._notify(client, {"method": "notifications/initialized"})
        return session

    async def _notify(self, client: "httpx.AsyncClient", message: Mapping[str, Any]) -> None:
        async with self._posted(client, message) as response:
            await read_whole(response)  # so that the connection can be used again

    def _posted(
        self, client: "httpx.AsyncClient", message: Mapping[str, Any]
    ) -> contextlib.AbstractAsyncContextManager["httpx.Response"]:
        content, meta = msgspec.json.encode({"jsonrpc": "2.0", **message}), message.get("params", {}).get("_meta", {})
        headers = {name: meta[name] for name in ("traceparent",) if name in meta}  # for what is between both
        return client.stream("POST", self._url, content=content, headers=headers)

    async def _send(
        self, client: "httpx.AsyncClient", method: str, params: Mapping[str, Any], on_progress: OnProgress | None = None
    ) -> "tuple[msgspec.Raw | None, httpx.Headers]":
        """Send a request. Return its result, or None if the server does not know the session or the path."""
        number = next(self._ids)
        if on_progress is not None:
            params = {**params, "_meta": {**params.get("_meta", {}), "progressToken": number}}
        async with self._posted(client, {"id": number, "method": method, "params": params}) as response:
            if response.status_code == 404:
                return None, response.headers
            if (status := response.status_code) >= 300:
                raise self._error(f"returned status {status}", Unlisted if status >= 500 else CallError)
            async with contextlib.aclosing(_texts_in(response)) as texts:
                async for text in texts:
                    received = self._decoded(text, _Message, "sent an invalid message")
                    if received.method is not None:
                        await self._take(received, number, client, on_progress)
                    elif received.id == number and received.error is not None:
                        raise self._error(f"reports an error: {one_line(received.error.message)}")
                    elif received.id == number:
                        return received.result, response.headers
        raise self._error(f"closed the connection without a response to {method}")

    async def _take(
        self, received: "_Message", number: int, client: "httpx.AsyncClient", on_progress: OnProgress | None
    ) -> None:
        """Answer a request of the server, or report the progress of request *number*. Ignore other notifications."""
        if received.id is not None:
            error = {"code": METHOD_NOT_FOUND, "message": f"This client does not support {received.method}."}
            answer = {"result": {}} if received.method == "ping" else {"error": error}
            await self._notify(client, {"id": received.id, **answer})
        elif received.method == "notifications/progress" and on_progress is not None:
            with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):  # it is not worth an error
                reported = msgspec.json.decode(received.params, type=_Progress)
                if reported.progress_token == number:
                    on_progress(reported.progress, reported.total, reported.message)

    def _error(self, reason: str, type_: type[CallError] = CallError) -> CallError:
        return type_(f"The MCP server {self.name} {reason}.")


async def _texts_in(response: "httpx.Response") -> AsyncGenerator[bytes, None]:
    """Yield each message of a response: that of its body, or of each event."""
    if is_stream(response):
        async with contextlib.aclosing(events_in(response)) as events:
            async for event in events:
                yield event.data
    else:
        yield (await read_whole(response)).content


def mcp_tools(
    url: str,
    *,
    headers: Mapping[str, str] | None = None,
    timeout_s: float = 30,
    prefix: str = "",
    only: Collection[str] | None = None,
    **approval: Unpack[ApprovalOptions],
) -> MCPTools:
    """Return the tools of an MCP server, as an entry of ``tools=``.

    Args:
        url: of its endpoint for streamable HTTP.
        headers: are sent with each request, such as ``{"Authorization": "Bearer …"}``.
        timeout_s: wall-clock seconds for each request. ``tool_timeout_s`` of the agent applies too.
        prefix: is added to the names, such as ``"github_"``, if another tool of the agent has the same name.
        only: the names of the tools to use, as the server lists them; None means all.
        needs_approval, approver, four_eyes, may_edit, expires_s, on_expiry: of each of these tools; see ``Tool``.

    Raises: DefinitionError if *url* is not an HTTP URL, *only* is a text, or an option of the approval is invalid.
    """
    if isinstance(only, str):
        raise DefinitionError(f"only= must be a list of names, such as [{only!r}], not {only!r}.")
    return MCPTools(url, headers or {}, timeout_s, prefix, only, Approval(**approval))


class MCPTool(Tool):
    """One tool of an MCP server. The server validates the arguments."""

    may_be_strict = False

    def __init__(self, server: MCPTools, listed: "ListedTool") -> None:
        # Providers accept fewer names than MCP.
        name = re.sub(r"[^A-Za-z0-9_-]", "_", server.prefix + listed.name)[:64]
        self.name = f"{FINISH}_" if name == FINISH else name
        self.description = listed.description
        try:
            self.parameters = AnyArguments(listed.schema)
        except (ValueError, RecursionError) as exc:
            raise server._error(f"lists the tool {listed.name!r} with an invalid inputSchema: {exc}") from exc
        self.approval = server.approval
        self._server = server
        self._listed_name = listed.name

    async def call(self, arguments: Any, toolbox: Toolbox) -> Any:
        params = {"name": self._listed_name, "arguments": arguments}
        if (traceparent := toolbox.context.traceparent) is not None:
            params["_meta"] = {"traceparent": traceparent}
        called = await self._server.request("tools/call", params, _Called, toolbox.context.progress)
        text = "\n".join(map(_text_of, called.content)) or bytes(called.structured).decode()
        if called.is_error:
            raise CallError(text)
        return text


@contextlib.asynccontextmanager
async def listing_tools(sources: Iterable[ToolSource]) -> AsyncIterator[None]:
    """List the tools of *sources* in the background, and log a WARNING for each that cannot be listed."""

    async def list_tools(source: ToolSource) -> None:
        try:
            await source.tools()
        except Exception as exc:  # whatever a server sends, it must not end the engine
            reason = (
                exc if isinstance(exc, CallError) else f"{source!r} failed ({type(exc).__name__}: {safe_text(exc)})."
            )
            logger.warning("%s Its tools are listed again when an agent needs them.", safe_text(reason))

    error: Exception | None = None
    async with anyio.create_task_group() as tasks:
        for source in sources:
            start_in_empty_context(tasks, list_tools, source)
        try:
            yield
        except Exception as exc:  # the task group would wrap it
            error = exc
        tasks.cancel_scope.cancel()
    if error is not None:
        raise error


# Messages of the protocol


class ListedTool(msgspec.Struct, rename={"schema": "inputSchema"}):
    """A tool as a server lists it."""

    name: str
    description: str = ""
    schema: dict[str, Any] | tuple[()] = {}


class _Page(msgspec.Struct, rename="camel"):
    tools: list[ListedTool]
    next_cursor: str | None = None


class _Initialized(msgspec.Struct, rename="camel"):
    protocol_version: str


class _Block(msgspec.Struct, rename="camel"):
    """A part of a result, or the resource in one."""

    type: str = "resource"
    text: str | None = None
    uri: str | None = None
    name: str | None = None
    mime_type: str | None = None
    #: in base64
    data: str | None = None
    blob: str | None = None
    size: int | None = None
    resource: "_Block | None" = None


class _Called(msgspec.Struct, rename={"structured": "structuredContent", "is_error": "isError"}):
    content: list[_Block] = []
    structured: msgspec.Raw = msgspec.Raw(b"null")
    is_error: bool = False


class _RPCError(msgspec.Struct):
    message: str = ""


class _Progress(msgspec.Struct, rename="camel"):
    progress_token: int | str
    progress: float
    total: float | None = None
    message: str = ""


class _Message(msgspec.Struct):
    id: Any = None
    method: str | None = None
    params: msgspec.Raw = msgspec.Raw(b"{}")
    result: msgspec.Raw = msgspec.Raw(b"{}")
    error: _RPCError | None = None


def _text_of(block: _Block) -> str:
    """Return a part of a result as a model can read it: its text, or ``[image image/png, 3,210 bytes]``."""
    content = block.resource or block
    if content.text is not None:
        return content.text
    size, encoded = content.size, content.data or content.blob
    if encoded is not None:
        size = len(encoded.rstrip("=")) * 3 // 4
    words = [text for text in (block.type, content.uri, content.name, content.mime_type) if text]
    return f"[{' '.join(words)}{'' if size is None else f', {size:,} bytes'}]"
