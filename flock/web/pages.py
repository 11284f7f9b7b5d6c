"""The docs pages, the web page, and the specification. None of them needs a key."""

from collections.abc import Sequence
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Match
from starlette.staticfiles import StaticFiles
from starlette.types import Receive, Scope, Send

from flock.web.contract import PAGE_HEADERS, STATIC
from flock.web.requests import path_of, root_path
from flock.web.routing import AppRoute, PublicMount


async def openapi_yaml(request: Request) -> Response:
    """GET /openapi.yaml"""
    return Response(request.app.contract.as_yaml(), media_type="application/yaml")


async def openapi_json(request: Request) -> Response:
    """GET /openapi.json"""
    return Response(request.app.contract.as_json(), media_type="application/json")


async def docs(request: Request) -> Response:
    """GET /docs: Swagger UI"""
    return Response(request.app.contract.page("docs.html"), media_type="text/html", headers=PAGE_HEADERS)


async def redoc(request: Request) -> Response:
    """GET /redoc"""
    return Response(request.app.contract.page("redoc.html"), media_type="text/html", headers=PAGE_HEADERS)


async def ui(request: Request) -> Response:
    """GET /ui and /ui/{file}: the web page. It contains no data. The page requests that from the API."""
    from flock.web.ui import takes_gzip

    file = request.app.ui_files.get(request.path_params.get("file", "index.html"))
    if file is None:
        raise HTTPException(404, "The web page has no file of this name.")
    headers = {**PAGE_HEADERS, "Cache-Control": "no-cache", "ETag": file.etag, "Vary": "Accept-Encoding"}
    if file.etag in request.headers.get("if-none-match", ""):
        return Response(status_code=304, headers=headers)
    if takes_gzip(request.headers.get("accept-encoding", "")):
        return Response(file.gzipped, media_type=file.media_type, headers=headers | {"Content-Encoding": "gzip"})
    return Response(file.plain, media_type=file.media_type, headers=headers)


async def to_ui(request: Request) -> Response:
    """GET /"""
    return RedirectResponse(f"{root_path(request.scope)}/ui")


async def no_ui(scope: Scope, receive: Receive, send: Send) -> None:
    """Respond if no route matches. The 404 helps people who look for a page. Raises HTTPException 404."""
    app = scope["app"]
    bare = {**scope, "path": scope["path"].rstrip("/")}
    is_http, has_slash = scope["type"] == "http", bare["path"] != scope["path"]
    if is_http and has_slash and any(route.matches(bare)[0] is not Match.NONE for route in app.routes):
        path = root_path(scope) + path_of(bare).removeprefix(root_path(scope))
        raise HTTPException(404, f"Paths of this server do not end with a slash. Use {path}")
    if is_http and bare["path"].removeprefix(root_path(scope)) in ("", "/ui"):
        docs = f"The API documentation is at {root_path(scope)}/docs. " if app.options.docs else ""
        detail = f"This server has no web page. {docs}To get one at /ui, start it with --ui (create_ui=True in Python)."
        raise HTTPException(404, detail)
    await app.router.not_found(scope, receive, send)


class _Static(StaticFiles):
    """Static files with the content security policy of the pages that load them."""

    def file_response(self, *args: Any, **options: Any) -> Response:
        response = super().file_response(*args, **options)
        response.headers.update(PAGE_HEADERS)
        return response


SPECIFICATION: Sequence[AppRoute] = [
    AppRoute("nothing", "GET", "/openapi.yaml", openapi_yaml),
    AppRoute("nothing", "GET", "/openapi.json", openapi_json),
]
DOCS: Sequence[AppRoute | PublicMount] = [
    AppRoute("nothing", "GET", "/docs", docs, include_in_schema=False),
    AppRoute("nothing", "GET", "/redoc", redoc, include_in_schema=False),
    PublicMount("/static", _Static(directory=STATIC)),
]

#: The routes that ``create_ui`` adds.
UI: Sequence[AppRoute] = [
    AppRoute("nothing", "GET", "/", to_ui, include_in_schema=False),
    AppRoute("nothing", "GET", "/ui", ui, include_in_schema=False),
    AppRoute("nothing", "GET", "/ui/{file}", ui, include_in_schema=False),
]
