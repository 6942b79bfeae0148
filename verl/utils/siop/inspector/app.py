"""The page over HTTP: what it loads, and the JSON that it asks for."""

from __future__ import annotations

import base64
import hashlib
import hmac
import sqlite3
from collections.abc import Sequence
from http.cookies import CookieError, SimpleCookie
from typing import Annotated, Any
from urllib.parse import parse_qs

from fastapi import FastAPI, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse
from starlette.datastructures import Headers
from starlette.middleware.gzip import GZipMiddleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from verl.utils.siop.errors import SiopError
from verl.utils.siop.http.json_body import answer_invalid
from verl.utils.siop.inspector.index import Search, Whole
from verl.utils.siop.inspector.page import STYLE, html, import_map, modules
from verl.utils.siop.inspector.runs import Runs
from verl.utils.siop.inspector.schema import NotThere

COOKIE = "siop_inspector"
MEDIA_TYPES = {".js": "text/javascript", ".css": "text/css"}
# What a browser on this machine, or at the other end of an ssh tunnel, calls it.
LOCAL_NAMES = ("127.0.0.1", "localhost", "[::1]", "::1")


def create_app(runs: Runs, token: str | None = None, hosts: Sequence[str] = LOCAL_NAMES) -> FastAPI:
    """The service over these runs.

    Args:
        runs: to be shown; somebody keeps them up to date.
        token: bearer token of every request but ``/health``, None for no check. A browser brings it once, as
            ``/?token=…``, and has a cookie from then on.
        hosts: names by which the service may be called; others get 400, so that no foreign page can read it through a
            name of its own that leads here. ``*`` allows all.
    """
    app = FastAPI(title="SIOP inspector", docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(GZipMiddleware, minimum_size=2000, compresslevel=4)
    app.add_middleware(_Guard, token=token, policy=_policy())
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts), www_redirect=False)
    app.exception_handler(RequestValidationError)(answer_invalid)
    app.exception_handler(NotThere)(_not_found)
    app.exception_handler(SiopError)(_failed)
    app.exception_handler(OSError)(_failed)
    app.exception_handler(sqlite3.Error)(_failed)
    files = {path.name: path for path in [*modules(), STYLE]}

    @app.get("/page/{name}")
    def file(name: str) -> Response:
        if name not in files:
            raise NotThere(f"the page has no file {name}")
        return Response(files[name].read_bytes(), media_type=MEDIA_TYPES[files[name].suffix])

    @app.get("/health")
    async def health() -> dict[str, str]:
        return {"status": "healthy"}

    @app.get("/")
    async def page() -> HTMLResponse:
        return HTMLResponse(html())

    @app.get("/api/runs")
    def overview() -> dict[str, Any]:
        return runs.overview()

    @app.get("/api/curves")
    def curves(run: str) -> dict[str, Any]:
        return runs.curves(run)

    @app.get("/api/questions")
    def questions(search: Annotated[_RunSearch, Query()]) -> Any:
        try:
            return runs.index(search.run).search(search)
        except ValueError as error:
            return JSONResponse({"detail": str(error)}, 422)

    @app.get("/api/question")
    def question(run: str, step: Whole, group: str) -> dict[str, Any]:
        return runs.question(run, step, group)

    @app.get("/api/lines")
    def lines(run: str, step: Whole, group: str) -> dict[str, Any]:
        return runs.lines(run, step, group)

    return app


class _RunSearch(Search):
    run: str


async def _not_found(_: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 404)


async def _failed(_: Request, error: Exception) -> Response:
    return JSONResponse({"detail": str(error)}, 500)


def _policy() -> str:
    """What the page may load and run: its own files alone."""
    digest = base64.b64encode(hashlib.sha256(import_map().encode()).digest()).decode()
    return (
        f"default-src 'none'; script-src 'self' 'sha256-{digest}'; style-src 'self'; connect-src 'self'; "
        "img-src 'self' data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


class _Guard:
    """ASGI middleware: bearer token, and the headers that keep a page to itself."""

    def __init__(self, app: ASGIApp, token: str | None, policy: str) -> None:
        self._app, self._token = app, token
        # What a cookie may hold, whatever the characters of the token.
        self._cookie = hashlib.sha256(f"{COOKIE} {token}".encode()).hexdigest()
        self._headers = [
            (b"content-security-policy", policy.encode()),
            (b"x-content-type-options", b"nosniff"),
            (b"referrer-policy", b"no-referrer"),
            (b"cache-control", b"no-store"),
        ]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message["headers"], *self._headers]}
            await send(message)

        await self._answerer(scope)(scope, receive, with_headers)

    def _answerer(self, scope: Scope) -> ASGIApp:
        if self._token is None or scope["path"] == "/health":
            return self._app
        headers = Headers(scope=scope)
        given = parse_qs(scope["query_string"].decode("latin-1")).get("token", [""])[0]
        if scope["path"] == "/" and given and self._is(given):
            # Out of the address, so that it is in no history and no link.
            answer = RedirectResponse("/", 303)
            answer.set_cookie(COOKIE, self._cookie, httponly=True, samesite="strict")
            return answer
        bearer = headers.get("authorization", "").encode("latin-1").decode("utf-8", "replace")
        if self._is(bearer.removeprefix("Bearer ")) and bearer.startswith("Bearer "):
            return self._app
        try:
            cookie = SimpleCookie(headers.get("cookie", "")).get(COOKIE)
        except CookieError:
            cookie = None
        if cookie is not None and hmac.compare_digest(cookie.value.encode("utf-8", "replace"), self._cookie.encode()):
            return self._app
        detail = "missing or wrong bearer token; a browser opens the page with /?token=…"
        return JSONResponse({"detail": detail}, 401, {"WWW-Authenticate": "Bearer"})

    def _is(self, given: str) -> bool:
        return hmac.compare_digest(given.encode("utf-8", "replace"), (self._token or "").encode())
