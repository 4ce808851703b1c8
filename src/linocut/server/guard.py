"""Who may ask what: the gate in front of every route, as ASGI middleware.

A web page of somebody else runs in the browser of the same machine, so listening on 127.0.0.1 alone keeps nobody out:
the Host header tells a page that pointed its own name here, Origin and Sec-Fetch-Site one that posts across. On any
address but the loopback the token comes on top. Bodies are read here, so that none is longer than its route takes.
"""

import asyncio
import hashlib
import hmac
import http.cookies
import json
import re
import secrets
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import parse_qs

from linocut.server.settings import MOST_BODY, MOST_UPLOAD, Settings

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
Asgi = Callable[[Message, Receive, Send], Awaitable[None]]

COOKIE = "linocut_token"
BODY_SECONDS = 60.0
UPLOADS = ("/api/recipe",)
OPEN = ("/api/login",)
HEADERS = {"x-content-type-options": "nosniff", "referrer-policy": "no-referrer", "x-frame-options": "DENY",
           "cross-origin-resource-policy": "same-origin", "cross-origin-opener-policy": "same-origin",
           "content-security-policy": "default-src 'self'; img-src 'self' data: blob:; "
           "style-src 'self' 'unsafe-inline'; "
           "script-src 'self'; connect-src 'self'; worker-src 'self'; manifest-src 'self'; frame-ancestors 'none'; "
           "base-uri 'none'; form-action 'self'"}
_FILE = re.compile(r"/api/images/([\w-]+)/file")


class Refusal(Exception):
    """A request that goes no further; the response is `error_body` with this status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """The body of every error response, in the shape that OpenAI's clients read."""
    kinds = {401: "authentication_error", 403: "permission_error", 404: "not_found_error", 409: "conflict_error",
             429: "rate_limit_error"}
    kind = kinds.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


class Guard:
    """Lets a request through to `app`, or answers it with a refusal."""

    def __init__(self, app: Asgi, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self._key = secrets.token_bytes(32)

    def file_key(self, image_id: str) -> str:
        """What opens one picture's file without the token, until the server stops: for links given to clients."""
        return hmac.new(self._key, image_id.encode(), hashlib.sha256).hexdigest()[:32]

    def is_token(self, given: str) -> bool:
        token = self.settings.token
        return token is not None and hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        try:
            headers = _headers(scope)
            self._check_site(scope["path"], headers)
            self._check_token(scope, headers)
            receive = await _read_body(scope["path"], headers, receive)
        except Refusal as refusal:
            await _refuse(refusal, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                _add_headers(message, scope["path"])
            await send(message)

        await self.app(scope, receive, send_with_headers)

    def _check_site(self, path: str, headers: dict[str, str]) -> None:
        host = headers.get("host", "")
        name = host.rpartition(":")[0] if re.search(r":\d*$", host) else host
        if not self.settings.knows_host(name):
            raise Refusal(403, f"this server is not called {name[:80]!r}; use its address, or start it with "
                               "--allow-host NAME")
        origin = headers.get("origin")
        if origin is not None and origin.lower() not in (f"http://{host.lower()}", f"https://{host.lower()}"):
            raise Refusal(403, f"a page of {origin[:80]!r} may not use this server")
        if _is_api(path) and headers.get("sec-fetch-site", "none") not in ("same-origin", "none"):
            raise Refusal(403, "a page of another site may not use this server")

    def _check_token(self, scope: Message, headers: dict[str, str]) -> None:
        path = scope["path"]
        if self.settings.token is None or not _is_api(path) or path in OPEN:
            return
        kind, _, bearer = headers.get("authorization", "").partition(" ")
        if kind.lower() == "bearer" and self.is_token(bearer.strip()):
            return
        if self.is_token(_cookie(headers.get("cookie", ""))):
            return
        file = _FILE.fullmatch(path)
        keys = parse_qs(scope["query_string"].decode("latin-1")).get("key", [])
        if file and keys and hmac.compare_digest(keys[0].encode(), self.file_key(file[1]).encode()):
            return
        raise Refusal(401, "this server wants its token: 'Authorization: Bearer TOKEN', or open the link that "
                           "'linocut serve' printed")


def _is_api(path: str) -> bool:
    return path.startswith(("/api", "/v1"))


def _headers(scope: Message) -> dict[str, str]:
    headers: dict[str, str] = {}
    for name, value in scope["headers"]:
        key = name.decode("latin-1").lower()
        if key in headers and key in ("host", "origin", "content-length"):
            raise Refusal(400, f"the header {key} came twice")
        headers[key] = value.decode("latin-1")
    return headers


def _cookie(header: str) -> str:
    try:
        morsel = http.cookies.SimpleCookie(header).get(COOKIE)
    except http.cookies.CookieError:
        return ""
    return "" if morsel is None else morsel.value


async def _read_body(path: str, headers: dict[str, str], receive: Receive) -> Receive:
    """Read the body, at most as much as the route takes, and return a `receive` that gives it in one piece."""
    most = MOST_UPLOAD if path in UPLOADS else MOST_BODY
    too_large = Refusal(413, f"the body is too long (expected at most {most} bytes)")
    announced = headers.get("content-length", "0")
    if announced.isdecimal() and int(announced[:20]) > most:
        raise too_large
    parts, size = [], 0
    try:
        async with asyncio.timeout(BODY_SECONDS):
            while True:
                message = await receive()
                if message["type"] == "http.disconnect":
                    break
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > most:
                    raise too_large
                if not message.get("more_body"):
                    break
    except TimeoutError:
        raise Refusal(408, f"the body did not arrive within {BODY_SECONDS:.0f} seconds") from None
    whole: list[Message] = [{"type": "http.request", "body": b"".join(parts), "more_body": False}]

    async def replay() -> Message:
        return whole.pop() if whole else await receive()

    return replay


def _add_headers(message: Message, path: str) -> None:
    headers = message["headers"] = list(message.get("headers", []))
    there = {name.lower() for name, _ in headers}
    extra = HEADERS if not path.startswith("/api/images/") else {**HEADERS, "content-security-policy": "sandbox"}
    for name, value in {**extra, **({"cache-control": "no-store"} if _is_api(path) else {})}.items():
        if name.encode() not in there:
            headers.append((name.encode(), value.encode()))


async def _refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps(error_body(refusal.status, str(refusal))).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode()),
               (b"connection", b"close")]  # the rest of a body may still be on its way
    if refusal.status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    start: Message = {"type": "http.response.start", "status": refusal.status, "headers": headers}
    _add_headers(start, "")
    await send(start)
    await send({"type": "http.response.body", "body": body})
