"""The part of OpenAI's API that clients of image models speak."""

import asyncio
import base64
import binascii
import io
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool

from linocut.errors import LinocutError, UsageError
from linocut.server import schemas, sse
from linocut.server.guard import error_body
from linocut.server.jobs import Job
from linocut.server.service import Service

STARTED = int(time.time())


class JobFailed(LinocutError):
    """A job ended without pictures; the message says why."""


class JobCancelled(LinocutError):
    """Somebody cancelled the job, in the studio or by its route."""


def openai_routes(service: Service, file_key: Callable[[str], str]) -> APIRouter:
    """The routes below /v1. `file_key` makes the part of a link that opens one file without the token."""
    router, queue = APIRouter(prefix="/v1", tags=["OpenAI"]), service.queue

    def describe(name: str) -> dict[str, Any]:
        return {"id": name, "object": "model", "created": STARTED, "owned_by": "linocut"}

    @router.get("/models", response_model=schemas.OpenAIModels)
    async def list_models() -> dict[str, Any]:
        return {"object": "list", "data": [describe(name) for name in service.catalogue.folders]}

    @router.get("/models/{model}", response_model=schemas.OpenAIModel)
    async def get_model(model: str) -> dict[str, Any]:
        return describe(service.catalogue.find(model).name)

    @router.post("/images/generations", response_model=schemas.OpenAIImages, response_model_exclude_none=True,
                 responses={200: {"content": {"text/event-stream": {}}}})
    async def generate(asked: schemas.OpenAIRequest, request: Request) -> Any:
        """Draw and answer with the pictures; with `stream` as events, previews among them. Hanging up cancels."""
        if asked.stream and asked.n not in (None, 1):
            raise UsageError(f"stream takes a single picture (expected n 1, found {asked.n})")
        width, height = _size(asked.size)
        model, checked = await run_in_threadpool(
            service.catalogue.request, asked.model, asked.prompt, width=width, height=height, steps=asked.steps,
            seed=asked.seed, num_images=asked.n or 1, guidance=None)
        job = queue.add(model, checked)
        answer = Answer(service, asked, job)
        if asked.stream:
            return sse.response(answer.stream())
        await _until_over(service, job, request)
        if asked.response_format == "url":
            base = str(request.base_url).rstrip("/")
            data = [{"url": f"{base}{image['url']}?key={file_key(image['id'])}"} for image in job.images]
        else:
            data = [{"b64_json": await run_in_threadpool(answer.final, image)} for image in job.images]
        return {"created": int(job.created), "data": data, **answer.facts}

    return router


class Answer:
    """Pictures of one job in the form that was asked for."""

    def __init__(self, service: Service, asked: schemas.OpenAIRequest, job: Job) -> None:
        self.service, self.job = service, job
        self.format = asked.output_format or "png"
        self.quality = 90 if asked.output_compression is None else asked.output_compression
        steps, wanted = job.request.steps, asked.partial_images or 0
        self.partial_steps = [round((i + 1) * steps / (wanted + 1)) or 1 for i in range(wanted)]
        self.facts = {"output_format": self.format, "size": f"{job.request.width}x{job.request.height}"}

    async def stream(self) -> AsyncIterator[str]:
        """Partial pictures, then the whole one, as OpenAI's events; an error event if there is none."""
        sent, over = 0, False
        try:
            async for event in self.job.feed.follow():
                if event is None:
                    yield ": still here\n\n"
                elif event.kind == "preview" and event.data["step"] in self.partial_steps:
                    picture = await run_in_threadpool(self._enlarged, event.data["image"])
                    yield self._event("partial_image", picture, partial_image_index=sent)
                    sent += 1
                elif event.kind == "image":
                    picture = await run_in_threadpool(self.final, event.data["image"])
                    usage = {"input_tokens": 0, "output_tokens": 0, "total_tokens": 0,
                             "input_tokens_details": {"text_tokens": 0, "image_tokens": 0}}
                    yield self._event("completed", picture, usage=usage)
                elif event.kind == "end":
                    over = True
                    if self.job.state != "done":
                        status = 409 if self.job.state == "cancelled" else 500
                        yield sse.encode("error", {"type": "error", **error_body(status, why_no_picture(self.job))})
        finally:
            if not over:  # the client hung up
                self.service.queue.cancel(self.job)

    def _event(self, name: str, picture: str, **facts: Any) -> str:
        kind = f"image_generation.{name}"
        return sse.encode(kind, {"type": kind, "b64_json": picture, "created_at": int(time.time()),
                                 "background": "opaque", "quality": "auto", **self.facts, **facts})

    def final(self, image: dict[str, Any]) -> str:
        """A picture of the gallery in base64: the PNG as it is, or converted."""
        png = self.service.gallery.read(image["id"])
        return base64.b64encode(png if self.format == "png" else self._convert(png)).decode()

    def _enlarged(self, preview: str) -> str:
        png = binascii.a2b_base64(preview.partition(",")[2])
        size = (self.job.request.width, self.job.request.height)
        return base64.b64encode(self._convert(png, size)).decode()

    def _convert(self, png: bytes, size: tuple[int, int] | None = None) -> bytes:
        from PIL import Image

        with Image.open(io.BytesIO(png), formats=["PNG"]) as opened:
            image = opened.convert("RGB")
        buffer = io.BytesIO()
        (image if size is None else image.resize(size)).save(buffer, self.format.upper(), quality=self.quality)
        return buffer.getvalue()


async def _until_over(service: Service, job: Job, request: Request) -> None:
    """Wait for the job's end; cancel it when the client hangs up. Raises JobFailed, JobCancelled."""

    async def follow() -> None:
        async for _ in job.feed.follow():
            pass

    async def hang_up() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(follow()), asyncio.create_task(hang_up())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        service.queue.cancel(job)
    if job.state == "cancelled":
        raise JobCancelled(why_no_picture(job))
    if job.state != "done":
        raise JobFailed(why_no_picture(job))


def why_no_picture(job: Job) -> str:
    return job.error or "the job was cancelled"


def _size(size: str | None) -> tuple[int | None, int | None]:
    if size in (None, "auto"):
        return None, None
    width, _, height = str(size).partition("x")
    return int(width), int(height)
