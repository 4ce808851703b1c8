"""Models, machine and the way in: what the server has, what it runs on, how a phone reaches it."""

from importlib.metadata import PackageNotFoundError, version
from typing import Annotated, Any

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from linocut import __version__
from linocut.pipeline import budget, machine, memory
from linocut.pipeline.decoding import decoder_dtype
from linocut.server import outgoing, schemas
from linocut.server.guard import COOKIE, Guard, error_body
from linocut.server.link import link, qr_svg
from linocut.server.service import Service
from linocut.server.settings import MOST_IMAGES, MOST_PROMPT, MOST_STEPS, MOST_UPLOAD

LIBRARIES = ("torch", "numpy", "pillow", "tokenizers", "fastapi", "uvicorn")
COOKIE_SECONDS = 90 * 86400
QuerySide = Annotated[int | None, Query(ge=32, le=16384, multiple_of=32)]


def system_routes(service: Service, guard: Guard) -> APIRouter:
    """/api/models, /api/system, /api/link and /api/login."""
    router, settings = APIRouter(prefix="/api", tags=["system"]), service.settings
    facts = {key: value for key, value in machine.facts().items() if key != "executable"}

    @router.get("/models", response_model=schemas.Models)
    def list_models(width: QuerySide = None, height: QuerySide = None) -> dict[str, Any]:
        return {"models": service.catalogue.describe(width, height, service.loaded)}

    @router.get("/system")
    def describe_system() -> dict[str, Any]:
        """What this machine does: kernels with reasons, memory over time, and that nothing leaves it."""
        images, size = service.gallery.size()
        starting = any(worker.state == "starting" for worker in service.workers)
        decoder, why = decoder_dtype()
        calls = service.outgoing.calls()
        return {
            "version": __version__, "state": "starting" if starting else "ready", "machine": facts,
            "devices": [{"device": worker.device, "state": worker.state, "loaded": worker.loaded}
                        for worker in service.workers],
            "libraries": {name: _version(name) for name in LIBRARIES},
            "threads": next((worker.threads for worker in service.workers if worker.threads), None),
            "decoder": {"dtype": decoder, "reason": why},
            "kernels": [kernel for worker in service.workers for kernel in worker.kernels],
            "memory": {"rss": memory.resident_bytes(), "available": budget.available_bytes(),
                       "total": facts["memory_bytes"], "history": list(service.samples)},
            "network": {"calls": calls, "statement": outgoing.statement(calls)},
            "gallery": {"folder": str(service.gallery.root), "images": images, "bytes": size},
            "idle_unload_seconds": settings.idle_seconds,
            "limits": {"prompt": MOST_PROMPT, "num_images": MOST_IMAGES, "steps": MOST_STEPS,
                       "side": settings.largest_side, "queue": settings.most_queued, "upload": MOST_UPLOAD}}

    @router.get("/link", response_model=schemas.Link)
    def link_for_phones() -> dict[str, Any]:
        """The address for another device on the LAN, token included, and its QR code as SVG."""
        if settings.local:
            return {"lan": False, "url": None, "qr": None,
                    "hint": "this server listens on this machine only; to reach it from a phone start it with: "
                            "linocut serve --host 0.0.0.0"}
        url = link(settings)
        return {"lan": True, "url": url, "qr": qr_svg(url), "hint": None}

    @router.post("/login", status_code=204, response_class=Response)
    def log_in(asked: schemas.Login) -> Response:
        if settings.token is not None and not guard.is_token(asked.token):
            return JSONResponse(error_body(401, "this is not the token that 'linocut serve' printed"), 401)
        return with_cookie(Response(status_code=204), guard)

    return router


def with_cookie(response: Response, guard: Guard) -> Response:
    """Let the browser that gets this response in from now on."""
    settings = guard.settings
    if settings.token is not None:
        response.set_cookie(COOKIE, settings.token, max_age=COOKIE_SECONDS, httponly=True, samesite="strict",
                            secure=settings.tls)
    return response


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
