"""The options of ``create_app``."""

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from starlette.middleware import Middleware
from starlette.routing import BaseRoute

from flock.options import Option, Options, many, of_type, seconds, whole
from flock.runs import Engine
from flock.web.auth import webhook_key
from flock.web.routing import Auth

#: What happens to a synchronous run if its client disconnects.
OnDisconnect = Literal["cancel", "continue"]


def is_host_name(value: Any) -> bool:
    """Whether *value* is valid in ``Host``, before the port."""
    return isinstance(value, str) and re.fullmatch(r"\[[\da-fA-F:.]+\]|[^\s:/\[\]]+", value) is not None


def _names_keys(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(TEXT.is_valid, [*value, *value.values()]))


FLAG = of_type(bool, "True or False")
TEXT = of_type(str, "a string")
URL = Option(
    is_valid=lambda value: isinstance(value, str) and bool(re.fullmatch(r"https?://[^\s/?#@]+(/[!-~]*)?", value)),
    words='an address such as "https://agents.example/ai"',
)
PATH = of_type(str | Path, "the path of a file or folder")
ENGINE = Option(
    is_valid=lambda value: hasattr(value, "send_webhooks"), words="an engine of flock, as flock.engine() returns it"
)
DISCONNECT = Option(is_valid=lambda value: value in ("cancel", "continue"), words='"cancel" or "continue"')
KEYS = Option(is_valid=_names_keys, words="a mapping of names to keys, all strings", is_secret=True)
AUTH = Option(
    is_valid=lambda value: callable(value) or value in ("host", "anybody"),
    words='a function of the connection that returns a Principal or None, "host" if the host lets only its own users '
    'reach the app, or "anybody" if every client that can connect may call it',
)
HOSTS = many(is_host_name, 'a list of host names without scheme and port, such as ["agents.example"]')
ORIGINS = many(TEXT.is_valid, 'a list of origins, such as ["https://agents.example"]')
SECRETS = many(webhook_key, "a list of secrets, as 'flockapi webhook secret' prints them", is_secret=True)
PARAMETERS = many(TEXT.is_valid, 'a list of names of query parameters, such as ["token"]')
ROUTES = many(lambda value: hasattr(value, "matches"), "a list of Starlette routes")
#: The module of each protocol that an app can serve beside the REST API. It is imported if the app does.
PROTOCOL_MODULES = {name: f"flock.protocols.{name}" for name in ("openai", "mcp", "vercel")} | {
    "ag-ui": "flock.protocols.agui",
    "a2a": "flock.protocols.a2a",
}
#: The protocols in which each agent has its own URL: the name of the protocol, and that of the agent.
AGENT_PROTOCOLS = ("a2a", "ag-ui", "vercel")
PROTOCOLS = many(lambda value: value in list(PROTOCOL_MODULES), f"a list of {', '.join(map(repr, PROTOCOL_MODULES))}")
PATHS = of_type(Mapping, "a mapping of paths, as in OpenAPI")
MIDDLEWARE = many(lambda value: hasattr(value, "cls"), "a list of starlette.middleware.Middleware")
HANDLERS = of_type(Mapping, "a mapping of exception classes or status codes to functions")
LIFESPAN = Option(is_valid=callable, words="a function of the app that returns an async context manager")


class AppOptions(Options, frozen=True, kw_only=True):
    """The options of ``create_app``, which takes each as a keyword argument.

    Raises: DefinitionError if an option is not valid.
    """

    TAKEN_BY: ClassVar[str] = "create_app"

    # Content

    #: The title of the pages and of the served specification.
    server_name: Annotated[str, TEXT] = "Flock Server"
    #: The engine that executes the runs, as ``flock.engine(…)`` returns it. None creates an embedded engine on *store*,
    #: shared by all apps on this flock and store.
    engine: Annotated[Engine | None, ENGINE] = None
    #: The SQLite file that stores the runs. With ``":memory:"`` they are lost when the app stops.
    store: Annotated[str | Path, PATH] = "flock.db"
    #: Send the text of every exception to clients; for development. Ignored with *engine*, which has the same option.
    expose_errors: Annotated[bool, FLAG] = False
    #: What happens to a synchronous run if its client disconnects before the response.
    on_disconnect: Annotated[OnDisconnect, DISCONNECT] = "cancel"
    #: The folder whose CSV files a client may name as ``batch_inputs``, including subfolders. With None, no file can be
    #: read.
    csv_dir: Annotated[str | Path | None, PATH] = None
    #: Serve ``/docs`` and ``/redoc``.
    docs: Annotated[bool | None, FLAG] = True
    #: Serve the web page at ``/ui``, and redirect ``/`` to it. Its files need no key. Its data comes from the API, with
    #: the key that the user enters.
    create_ui: Annotated[bool, FLAG] = False
    #: The protocols of other clients to serve: ``"openai"``, ``"mcp"``, ``"vercel"``, ``"ag-ui"``,
    #: ``"a2a"``. See ``docs/openai.md``, ``docs/mcp-server.md``, ``docs/front-ends.md``, ``docs/a2a.md``.
    protocols: Annotated[Collection[str], PROTOCOLS] = ()
    #: The address at which clients reach the app, for cards of A2A and the URLs of agents. None takes the ``Host`` of
    #: each request.
    public_url: Annotated[str | None, URL] = None
    #: Collect metrics for ``/metrics``, which needs the extra ``metrics``. None means: if the extra is installed.
    metrics: Annotated[bool | None, FLAG] = None

    # Limits

    #: Max size of a JSON body. A longer one is rejected with 413.
    max_body_bytes: Annotated[int, whole(1)] = 1024 * 1024
    #: Max size of a CSV or NDJSON body after decompression, and of a file in *csv_dir*. A longer one is rejected
    #: with 413.
    max_upload_bytes: Annotated[
        int,
        whole(
            1,
            "Max size of a CSV or NDJSON body after decompression, and of a file in --csv-dir. A longer one is "
            "rejected with 413.",
        ),
    ] = 1024 * 1024 * 1024
    #: Max nesting of arrays and objects in a body. A deeper one is rejected with 400.
    max_json_depth: Annotated[int, whole(1)] = 100
    #: Max total size of the headers of a request. Longer ones are rejected with 431.
    max_header_bytes: Annotated[int, whole(1)] = 64 * 1024
    #: Max time for a JSON body, or for each 64 KiB of CSV or NDJSON, to arrive. A slower one is rejected with 408.
    body_timeout_s: Annotated[float, seconds()] = 30
    #: Max time that a request may wait for a run. Longer waits are capped.
    max_wait_s: Annotated[int, whole(0)] = 60
    #: Max requests per minute of each principal, per process. More are rejected with 429 and ``RateLimit`` headers.
    #: Requests without a principal, or with wrong credentials, count for their address (for IPv6, each 64-bit network).
    #: None means no limit.
    max_requests_per_minute: Annotated[
        int | None,
        whole(1, "Max requests per minute of each key, per process. More are rejected with 429.  [default: no limit]"),
    ] = None
    #: Max open event streams of each principal, per process. More are rejected with 429. Without keys, the limit is for
    #: each address (for IPv6, each 64-bit network).
    max_event_streams: Annotated[
        int, whole(0, "Max open event streams of each key, per process. More are rejected with 429.")
    ] = 1000
    #: Max concurrent CSV and NDJSON uploads of each principal, per process. More are rejected with 429. Without keys,
    #: the limit is for each address.
    max_uploads_per_principal: Annotated[
        int, whole(0, "Max concurrent CSV and NDJSON uploads of each key, per process. More are rejected with 429.")
    ] = 8
    #: Max concurrent downloads of results, and of pages over 64 KiB, of each principal, per process. More are rejected
    #: with 429. Without keys, the limit is for each address.
    max_downloads_per_principal: Annotated[
        int,
        whole(
            0,
            "Max concurrent downloads of results, and of pages over 64 KiB, of each key, per process. More are "
            "rejected with 429.",
        ),
    ] = 32

    # Access

    #: API keys by name. Requests send one as ``Authorization: Bearer`` or ``X-API-Key``. An admin, such as
    #: ``"ops:admin"``, sees the runs of all principals, and ``/metrics``. The environment is not read.
    api_keys: Annotated[Mapping[str, str] | None, KEYS] = None
    #: In place of keys: a function of the connection that returns a ``Principal``, or None to reject the request with
    #: 401 before its body is read. A plain function is called in a thread, an ``async`` one is not. It runs after
    #: *middleware*, and protects all routes except those that the route table declares as public. ``"host"`` means that
    #: the host lets only its own users reach the app. It identifies no principals. Without *auth* and *api_keys*, every
    #: client may call the app, and a warning is logged at the start. ``"anybody"`` means that this is intended, and
    #: turns the warning off. In both cases a page of another origin can read only public routes.
    auth: Annotated[Auth | Literal["host", "anybody"] | None, AUTH] = None
    #: Allowed values of ``Host``, without the port. None allows any.
    allowed_hosts: Annotated[Collection[str] | None, HOSTS] = None
    #: Names of query parameters that *auth* or the host's own middleware reads, such as ``["token"]``. Other unknown
    #: parameters are rejected with 422.
    ignore_query: Annotated[Collection[str], PARAMETERS] = ()
    #: Origins whose pages may call the app from a browser, in addition to those in the ``CORSMiddleware`` of
    #: *middleware* or of a Starlette host. Pages of other origins cannot change anything.
    cors_origins: Annotated[Sequence[str], ORIGINS] = ()

    #: The secrets that sign webhooks; see ``docs/webhooks.md``. While one replaces another, both: each webhook has a
    #: signature for each. Needed if the flock or an agent has a ``webhook_url``.
    webhook_secrets: Annotated[Sequence[str], SECRETS] = ()

    # Extensions by the host

    #: Starlette routes that come before the app's own. Their handlers get the engine with ``await engine_of(request)``,
    #: and the flock as ``request.app.flock``.
    routes: Annotated[Sequence[BaseRoute], ROUTES] = ()
    #: Path items that describe *routes* in the served specification.
    openapi_paths: Annotated[Mapping[str, Any] | None, PATHS] = None
    #: As in Starlette.
    middleware: Annotated[Sequence[Middleware], MIDDLEWARE] = ()
    #: As in Starlette. They come before the app's own.
    exception_handlers: Annotated[Mapping[Any, Any] | None, HANDLERS] = None
    #: A lifespan that is entered after the engine has started, and exited before it stops.
    lifespan: Annotated[Callable[[Any], AbstractAsyncContextManager[Any]] | None, LIFESPAN] = None
