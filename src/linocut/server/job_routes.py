"""Jobs over HTTP: create, list, follow, move, cancel."""

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.responses import StreamingResponse

from linocut import __version__
from linocut.errors import LinocutError
from linocut.server import schemas, sse
from linocut.server.jobs import Job
from linocut.server.service import Service


class NoSuchJob(LinocutError):
    """No job of this id waits, runs, or was finished lately."""


def job_routes(service: Service) -> APIRouter:
    """The routes below /api/jobs, and /api/events."""
    router, queue = APIRouter(prefix="/api", tags=["jobs"]), service.queue

    def find(job_id: str) -> Job:
        job = queue.find(job_id)
        if job is None:
            raise NoSuchJob(f"there is no job {job_id[:40]!r}; finished ones are forgotten after a while")
        return job

    @router.post("/jobs", status_code=201, response_model=schemas.Job)
    async def create_job(asked: schemas.NewJob) -> dict[str, Any]:
        # Reading a model's headers for the memory plan takes milliseconds, too long for the event loop.
        model, request = await run_in_threadpool(service.catalogue.request, **asked.model_dump())
        return queue.describe(queue.add(model, request))

    @router.get("/jobs", response_model=schemas.Jobs)
    async def list_jobs() -> dict[str, Any]:
        return queue.describe_all()

    @router.get("/jobs/{job_id}", response_model=schemas.Job)
    async def get_job(job_id: str) -> dict[str, Any]:
        return queue.describe(find(job_id))

    @router.delete("/jobs/{job_id}", response_model=schemas.Job)
    async def cancel_job(job_id: str) -> dict[str, Any]:
        job = find(job_id)
        queue.cancel(job)
        return queue.describe(job)

    @router.patch("/jobs/{job_id}", response_model=schemas.Job)
    async def move_job(job_id: str, move: schemas.Move) -> dict[str, Any]:
        job = find(job_id)
        queue.move(job, move.position)
        return queue.describe(job)

    @router.get("/jobs/{job_id}/events", responses=sse.SSE, response_class=StreamingResponse)
    async def follow_job(job_id: str, request: Request) -> StreamingResponse:
        """What happened to the job and what happens to it until it ends; `Last-Event-ID` skips what was seen."""
        return sse.response(sse.encode_all(find(job_id).feed.follow(sse.last_event_id(request) or 0)))

    @router.get("/events", responses=sse.SSE, response_class=StreamingResponse)
    async def follow_everything(request: Request) -> StreamingResponse:
        """What happens to all jobs, to the queue, to the gallery and to memory from now on."""
        seen = sse.last_event_id(request)
        resumes = seen is not None and service.everyone.holds_after(seen)
        start = seen if resumes and seen is not None else service.everyone.last

        async def lines() -> AsyncIterator[str]:
            if not resumes:
                yield sse.encode("hello", {"version": __version__}, start)
            async for line in sse.encode_all(service.everyone.follow(start)):
                yield line

        return sse.response(lines())

    return router
