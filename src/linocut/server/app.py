"""The application: routes, errors as sentences, the studio's files, start and stop."""

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse, PlainTextResponse, RedirectResponse, Response
from starlette.exceptions import HTTPException

from linocut import __version__
from linocut.errors import LinocutError
from linocut.server import schemas
from linocut.server.catalogue import NoSuchModel, TooLarge
from linocut.server.gallery import NoSuchImage, NotInTrash
from linocut.server.guard import Guard, error_body
from linocut.server.image_routes import WrongType, image_routes
from linocut.server.job_routes import NoSuchJob, job_routes
from linocut.server.jobs import QueueFull, WrongState
from linocut.server.openai_routes import JobCancelled, JobFailed, openai_routes
from linocut.server.service import SAMPLE_SECONDS, Service
from linocut.server.settings import Settings
from linocut.server.system_routes import system_routes, with_cookie

RETRY_SECONDS = 2
STATUS: dict[type[LinocutError], tuple[int, str | None]] = {
    NoSuchImage: (404, None), NoSuchJob: (404, None), NoSuchModel: (404, "model_not_found"),
    QueueFull: (429, "queue_full"), WrongState: (409, None), NotInTrash: (409, None), TooLarge: (400, "too_large"),
    WrongType: (415, None), JobFailed: (500, None), JobCancelled: (409, "cancelled")}
"""Status and code of each error; what is not here is a mistake of the request: 400."""
ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": schemas.Error, "description": description} for status, description in {
        400: "It cannot be drawn or done.", 401: "The token is missing or wrong.",
        403: "The request comes from another site.", 404: "There is no such thing.",
        409: "Not in this state.", 413: "The body is too long.", 415: "The body is of the wrong kind.",
        422: "A field is missing or malformed.", 429: "The queue is full."}.items()}
log = logging.getLogger("linocut.server")


def make_app(settings: Settings) -> tuple[Guard, Service]:
    """The ASGI application, behind its guard, and what it runs on. Workers start with the application."""
    service = Service(settings)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        sampler = asyncio.create_task(_sample_memory(service))
        try:
            yield
        finally:
            sampler.cancel()
            await asyncio.to_thread(service.stop)

    app = FastAPI(title="linocut", version=__version__, lifespan=lifespan, openapi_url="/api/openapi.json",
                  docs_url=None, redoc_url=None, responses=ERRORS, redirect_slashes=False)
    guard = Guard(app, settings)
    for router in (job_routes(service), image_routes(service), system_routes(service, guard),
                   openai_routes(service, guard.file_key)):
        app.include_router(router)
    _add_errors(app)
    _add_studio(app, guard)
    return guard, service


async def _sample_memory(service: Service) -> None:
    while True:
        service.sample_memory()
        await asyncio.sleep(SAMPLE_SECONDS)


def _add_errors(app: FastAPI) -> None:
    """Every error becomes one sentence in one shape."""

    @app.exception_handler(LinocutError)
    async def known(_: Request, error: LinocutError) -> JSONResponse:
        status, code = STATUS.get(type(error), (400, None))
        headers = {"retry-after": str(RETRY_SECONDS)} if status == 429 else None
        if isinstance(error, JobCancelled):  # OpenAI's clients try again after 409 unless they are told not to
            headers = {"x-should-retry": "false"}
        return JSONResponse(error_body(status, str(error), code=code), status, headers)

    @app.exception_handler(RequestValidationError)
    async def malformed(_: Request, error: RequestValidationError) -> JSONResponse:
        first = error.errors()[0]
        place = [str(part) for part in first["loc"] if part not in ("body", "query", "path", "header")]
        param = ".".join(place)[:80] or None
        what = "the body is not JSON" if first["type"] == "json_invalid" else first["msg"]
        return JSONResponse(error_body(422, f"{param}: {what}" if param else what, param), 422)

    @app.exception_handler(HTTPException)
    async def refused(_: Request, error: HTTPException) -> JSONResponse:
        sentences = {404: "there is nothing here; /api/openapi.json lists what there is",
                     405: "this address does not take this method; /api/openapi.json lists what it takes"}
        message = sentences.get(error.status_code, str(error.detail))
        return JSONResponse(error_body(error.status_code, message), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def bug(request: Request, error: Exception) -> JSONResponse:
        log.error("%s %s: %s", request.method, request.url.path, type(error).__name__)
        return JSONResponse(error_body(500, "a bug in linocut; the server's log says more"), 500)


def _add_studio(app: FastAPI, guard: Guard) -> None:
    """The studio's files; addresses that name no file lead to its page. They are public: they hold no secret."""
    root = guard.settings.studio.resolve()

    @app.get("/{path:path}", include_in_schema=False)
    def studio(path: str, token: str | None = None) -> Response:
        if path.startswith(("api", "v1")):
            raise HTTPException(404)
        if path == "ca.crt" and guard.settings.tls:
            return FileResponse(guard.settings.home / "tls" / "ca.crt", media_type="application/x-x509-ca-cert")
        if path == "" and token is not None:
            leave = RedirectResponse("/", 303)
            return with_cookie(leave, guard) if guard.is_token(token) else leave
        if not (root / "index.html").is_file():
            return PlainTextResponse("linocut serves its HTTP API here; /api/openapi.json describes it. The studio's "
                                     "files are not part of this installation.\n", 200 if path == "" else 404)
        file = _inside(root, path or "index.html")
        if file is None and "." in path.rpartition("/")[2]:
            raise HTTPException(404)
        cache = "public, max-age=31536000, immutable" if file and path.startswith("assets/") else "no-cache"
        return FileResponse(file or root / "index.html", headers={"cache-control": cache})


def _inside(root: Path, path: str) -> Path | None:
    """The file of this name below `root`, or None; never one outside, whatever dots or links the name holds."""
    try:
        file = (root / path).resolve()
        return file if file.is_relative_to(root) and file.is_file() else None
    except (OSError, ValueError):  # too long, or a zero byte
        return None
