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
from flock.web.routing import Auth

__all__ = ["AppOptions", "OnDisconnect", "is_host_name"]

#: What happens to a synchronous run if its client disconnects.
OnDisconnect = Literal["cancel", "continue"]


def is_host_name(value: Any) -> bool:
    """Whether *value* may stand in ``Host``, before the port."""
    return isinstance(value, str) and re.fullmatch(r"\[[\da-fA-F:.]+\]|[^\s:/\[\]]+", value) is not None


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _names_keys(value: Any) -> bool:
    return isinstance(value, Mapping) and all(map(_is_text, [*value, *value.values()]))


FLAG = of_type(bool, "True or False")
TEXT = of_type(str, "a text")
PATH = of_type(str | Path, "the path of a file or folder")
ENGINE = Option(is_valid=lambda value: hasattr(value, "submit_batch"), words="an engine, such as flock.engine()")
DISCONNECT = Option(is_valid=lambda value: value in ("cancel", "continue"), words='"cancel" or "continue"')
KEYS = Option(is_valid=_names_keys, words="a mapping of names to keys, all of them texts", is_secret=True)
AUTH = Option(
    is_valid=lambda value: callable(value) or value in ("host", "anybody"),
    words='a function of the connection that returns a Principal or None, "host" if the host lets only its users in, '
    'or "anybody" if everybody who can connect may call it',
)
HOSTS = many(is_host_name, 'a list of host names without scheme and port, such as ["agents.example"]')
ORIGINS = many(_is_text, 'a list of origins, such as ["https://agents.example"]')
ROUTES = many(lambda value: hasattr(value, "matches"), "a list of Starlette routes")
PATHS = of_type(Mapping, "a mapping of paths, as in OpenAPI")
MIDDLEWARE = many(lambda value: hasattr(value, "cls"), "a list of starlette.middleware.Middleware")
HANDLERS = of_type(Mapping, "a mapping of exception classes or status codes to functions")
LIFESPAN = Option(is_valid=callable, words="a function of the app that returns an async context manager")


class AppOptions(Options, frozen=True, kw_only=True):
    """The options of ``create_app``, which takes each as a keyword argument.

    Raises: DefinitionError if an option is not valid.
    """

    TAKEN_BY: ClassVar[str] = "create_app"

    # What is served

    #: The title of the pages and of the served specification.
    server_name: Annotated[str, TEXT] = "Flock Server"
    #: What carries out the runs; if None, an embedded engine on *store*, shared by all apps on this flock and store.
    engine: Annotated[Engine | None, ENGINE] = None
    #: The SQLite file that keeps the runs; ``":memory:"`` keeps them as long as the app runs.
    store: Annotated[str | Path, PATH] = "flock.db"
    #: Show the text of any exception to clients; for development. No effect beside *engine*, which has the same option.
    expose_errors: Annotated[bool, FLAG] = False
    #: What happens to a synchronous run if its client disconnects before it is answered.
    on_disconnect: Annotated[OnDisconnect, DISCONNECT] = "cancel"
    #: The folder below which a client may name a CSV file as ``batch_inputs``; None allows no file at all.
    csv_dir: Annotated[str | Path | None, PATH] = None
    #: False leaves out ``/docs`` and ``/redoc``.
    docs: Annotated[bool | None, FLAG] = True
    #: Serve the web page at ``/ui``, and redirect ``/`` to it. Its files need no key; its data comes from the API, with
    #: the key that its user enters.
    create_ui: Annotated[bool, FLAG] = False
    #: Keep metrics for ``/metrics``, which needs the extra ``metrics``; None does if that is installed.
    metrics: Annotated[bool | None, FLAG] = None

    # Its limits

    #: The longest body a client may send; a longer one is answered with 413.
    max_body_bytes: Annotated[int, whole(1)] = 1024 * 1024
    #: The longest body of CSV or NDJSON, unpacked, and the longest file that a client names below *csv_dir*; a longer
    #: one is answered with 413.
    max_upload_bytes: Annotated[
        int,
        whole(
            1, "The longest body of CSV or NDJSON, unpacked, and file of --csv-dir; a longer one is refused with 413."
        ),
    ] = 1024 * 1024 * 1024
    #: How many levels of arrays and objects a body may have; a deeper one is answered with 400.
    max_json_depth: Annotated[int, whole(1)] = 100
    #: All headers of a request together; longer ones are answered with 431.
    max_header_bytes: Annotated[int, whole(1)] = 64 * 1024
    #: How long a body, or each 64 KiB of CSV or NDJSON, may take to arrive; a slower one is answered with 408.
    body_timeout_s: Annotated[float, seconds()] = 30
    #: The longest that one request may wait for a run; longer waits are capped.
    max_wait_s: Annotated[int, whole(0)] = 60
    #: Requests that each principal may send, in one process; None is no limit. More are answered with 429 and
    #: ``RateLimit``.
    max_requests_per_minute: Annotated[
        int | None,
        whole(1, "Requests that each key may send, in each process; more are answered with 429.  [default: no limit]"),
    ] = None
    #: Event streams that each principal may have open, in one process; one more is answered with 429. Without keys,
    #: each address has its own share (of IPv6, each network of 64 bits).
    max_event_streams: Annotated[int, whole(0, "Event streams that each key may have open, in each process.")] = 1000
    #: Bodies of CSV and NDJSON that each principal, or else each address, may send at the same time, in one process;
    #: one more is answered with 429.
    max_uploads_per_principal: Annotated[
        int, whole(0, "Bodies of CSV and NDJSON that each key may send at the same time, in each process.")
    ] = 8
    #: Downloads of results, and pages of runs or results over 64 KiB, that may be sent to each principal, or else each
    #: address, at the same time, in one process; one more is answered with 429.
    max_downloads_per_principal: Annotated[
        int,
        whole(
            0,
            "Downloads of results, and pages over 64 KiB, that may be sent to each key at the same time, in each "
            "process.",
        ),
    ] = 32

    # Who may use it

    #: Keys by name, which requests send as ``Authorization: Bearer`` or ``X-API-Key``; ``"ops:admin"`` sees what
    #: belongs to others, and ``/metrics``. The environment is not read.
    api_keys: Annotated[Mapping[str, str] | None, KEYS] = None
    #: In place of keys, a function of the connection, sync or async, that returns a ``Principal``, or None, which is
    #: answered with 401 before the body is read. It runs after *middleware*, and guards all routes but those that the
    #: route table declares as open. ``"host"`` states that the host lets only its own users reach the app; it
    #: identifies nobody. Without *auth* and *api_keys* everybody may call the app, and a warning says so when it
    #: starts; ``"anybody"`` states that this is intended, without a warning. In both cases a page of another origin can
    #: read only what is open.
    auth: Annotated[Auth | Literal["host", "anybody"] | None, AUTH] = None
    #: What ``Host`` may be, without the port; None allows any.
    allowed_hosts: Annotated[Collection[str] | None, HOSTS] = None
    #: Pages of these origins may call the app from a browser. Others may not change anything.
    cors_origins: Annotated[Sequence[str], ORIGINS] = ()

    # What the host adds

    #: Starlette routes that come before the app's own. ``await engine_of(request)`` is the engine in them, and
    #: ``request.app.flock`` the flock.
    routes: Annotated[Sequence[BaseRoute], ROUTES] = ()
    #: Describes *routes* in the served specification.
    openapi_paths: Annotated[Mapping[str, Any] | None, PATHS] = None
    #: As Starlette has it.
    middleware: Annotated[Sequence[Middleware], MIDDLEWARE] = ()
    #: As Starlette has them; they come before the app's own.
    exception_handlers: Annotated[Mapping[Any, Any] | None, HANDLERS] = None
    #: Entered with the app after the engine has started, and left before it stops.
    lifespan: Annotated[Callable[[Any], AbstractAsyncContextManager[Any]] | None, LIFESPAN] = None
