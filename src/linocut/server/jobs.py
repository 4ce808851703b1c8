"""Jobs and their bounded queue. Knows nothing of HTTP, models or pictures' bytes.

A job goes queued -> running -> done | failed | cancelled, or straight from queued to cancelled. Every change is
published to the job's own feed and to the feed of all.
"""

import secrets
import threading
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from linocut.errors import LinocutError
from linocut.pipeline.request import Request
from linocut.server.feed import Feed

KEPT_JOBS = 100
"""Finished jobs that can still be asked about."""
KEPT_PREVIEWS = 10
"""Finished jobs whose previews are still there."""


class QueueFull(LinocutError):
    """The queue has no room for another job."""


class WrongState(LinocutError):
    """A job is not in the state that this takes."""


@dataclass(eq=False)
class Job:
    """One checked request to one model and what became of it. Times in Unix seconds."""

    model: str
    request: Request
    everyone: Feed
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    state: str = "queued"
    created: float = field(default_factory=time.time)
    started: float | None = None
    finished: float | None = None
    progress: dict[str, Any] | None = None
    images: list[dict[str, Any]] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    error: str | None = None
    timings: dict[str, Any] = field(default_factory=dict)
    cancel: threading.Event = field(default_factory=threading.Event)
    feed: Feed = field(default_factory=Feed)

    @property
    def over(self) -> bool:
        return self.state in ("done", "failed", "cancelled")

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        self.feed.publish(kind, data)
        self.everyone.publish(kind, data)

    def to_dict(self, position: int | None = None) -> dict[str, Any]:
        """The job as JSON-ready values; `position` is its place in the queue if it waits there."""
        request = self.request
        return {"id": self.id, "state": self.state, "cancelling": self.cancel.is_set() and not self.over,
                "position": position, "created": self.created, "started": self.started, "finished": self.finished,
                "model": self.model, "prompt": request.jobs[0].prompt, "width": request.width,
                "height": request.height, "steps": request.steps, "seeds": [job.seed for job in request.jobs],
                "guidance": request.guidance, "progress": self.progress, "images": list(self.images),
                "warnings": list(self.warnings), "error": self.error, "timings": self.timings}


class Queue:
    """Jobs that wait, run and ran. Safe for use from any thread."""

    def __init__(self, most: int, everyone: Feed) -> None:
        self.most, self.everyone = most, everyone
        self._changed = threading.Condition(threading.RLock())
        self._waiting: list[Job] = []
        self._running: list[Job] = []
        self._finished: deque[Job] = deque(maxlen=KEPT_JOBS)
        self._closed = False

    def add(self, model: str, request: Request) -> Job:
        """Queue a request. Raises QueueFull."""
        with self._changed:
            if len(self._waiting) >= self.most:
                raise QueueFull(f"the queue is full ({self.most} jobs wait); try again when some are done")
            job = Job(model, request, self.everyone)
            self._waiting.append(job)
            job.publish("job", self._describe(job))
            self._publish_order()
            self._changed.notify()
            return job

    def take(self, seconds: float) -> Job | None:
        """Wait for the next job and mark it running; None when there is none for so long, or after `close`."""
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, seconds)
            if self._closed or not self._waiting:
                return None
            job = self._waiting.pop(0)
            self._running.append(job)
            job.state, job.started = "running", time.time()
            job.publish("job", job.to_dict())
            self._publish_order()
            return job

    def finish(self, job: Job, state: str, error: str | None = None) -> None:
        """End a job that was taken, as "done", "failed" (say why in `error`) or "cancelled"."""
        with self._changed:
            self._running.remove(job)
            self._end(job, state, error)

    def _end(self, job: Job, state: str, error: str | None = None) -> None:
        job.error, job.finished, job.progress, job.state = error, time.time(), None, state
        self._finished.append(job)
        if len(self._finished) > KEPT_PREVIEWS:
            self._finished[-KEPT_PREVIEWS - 1].feed.forget_previews()
        job.publish("end", job.to_dict())
        job.feed.close()

    def cancel(self, job: Job) -> None:
        """Stop a job wherever it stands; one that is over stays as it is."""
        with self._changed:
            if job.over:
                return
            job.cancel.set()
            if job in self._waiting:
                self._waiting.remove(job)
                self._end(job, "cancelled")
                self._publish_order()
            else:
                job.publish("job", job.to_dict())

    def move(self, job: Job, position: int) -> None:
        """Put a waiting job at this place in the queue, 0 being next. Raises WrongState."""
        with self._changed:
            if job not in self._waiting:
                raise WrongState(f"the job is {job.state}; only a queued job has a place in the queue")
            self._waiting.remove(job)
            self._waiting.insert(position, job)
            self._publish_order()

    def find(self, job_id: str) -> Job | None:
        with self._changed:
            return next((job for job in self._all() if job.id == job_id), None)

    def describe(self, job: Job) -> dict[str, Any]:
        """The job as JSON-ready values, with its place in the queue."""
        with self._changed:
            return self._describe(job)

    def describe_all(self) -> dict[str, Any]:
        """Every job there is: running, then queued in order, then finished ones from the newest on."""
        with self._changed:
            jobs = [self._describe(job) for job in self._all()]
            return {"jobs": jobs, "queued": len(self._waiting), "limit": self.most}

    @property
    def busy(self) -> bool:
        """Whether a job waits."""
        return bool(self._waiting)

    def close(self) -> None:
        """Cancel everything and give out no more jobs."""
        with self._changed:
            self._closed = True
            for job in [*self._waiting, *self._running]:
                self.cancel(job)
            self._changed.notify_all()

    @property
    def closed(self) -> bool:
        return self._closed

    def _all(self) -> Sequence[Job]:
        return [*self._running, *self._waiting, *reversed(self._finished)]

    def _describe(self, job: Job) -> dict[str, Any]:
        return job.to_dict(self._waiting.index(job) if job in self._waiting else None)

    def _publish_order(self) -> None:
        self.everyone.publish("queue", {"order": [job.id for job in self._waiting]})
