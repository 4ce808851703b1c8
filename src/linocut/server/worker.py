"""The thread that draws on one device: takes jobs, reports steps and pictures, keeps models warm while they are used.

Torch lives here alone. The event loop goes on meanwhile, since kernels and torch let go of Python's lock.
"""

import base64
import contextlib
import io
import logging
import threading
import time
from typing import TYPE_CHECKING, Any

from linocut.errors import Cancelled, LinocutError
from linocut.pipeline import budget, memory
from linocut.pipeline.png import encode_png
from linocut.server.catalogue import Catalogue
from linocut.server.gallery import Gallery
from linocut.server.jobs import Job, Queue
from linocut.server.pace import Pace, Seconds, seconds_of
from linocut.server.settings import Settings

if TYPE_CHECKING:
    from PIL.Image import Image

    from linocut.pipeline.generate import Pipeline
    from linocut.pipeline.run import Picture, Progress, StepState

PROGRESS_SECONDS = 0.05
PREVIEW_SIDE = 256
"""Longest side of a preview in pixels; those of very large pictures are made smaller."""
WAIT_SECONDS = 5.0
KEEP_SHARE = 0.5
"""Networks of a model stay in memory between its pictures if drawing then takes at most this share of what is free."""
log = logging.getLogger("linocut.server")


class Worker(threading.Thread):
    """Draws the queue's jobs on one device until the queue is closed.

    Attributes for others to read: `state` is "starting", "idle" or "busy"; `kernels` says for each component of each
    model that was opened what it runs on and why; `threads` and `decoder` are facts of the same kind.
    """

    def __init__(self, device: str, settings: Settings, queue: Queue, catalogue: Catalogue, gallery: Gallery) -> None:
        super().__init__(name=f"linocut-{device}", daemon=True)
        self.device, self.settings = device, settings
        self.queue, self.catalogue, self.gallery = queue, catalogue, gallery
        self.state = "starting"
        self.kernels: list[dict[str, Any]] = []
        self.threads: dict[str, Any] | None = None
        self._pipes: dict[str, Pipeline] = {}
        self._seconds: dict[tuple[Any, ...], Seconds] = {}

    @property
    def loaded(self) -> list[str]:
        """Names of the models that are warm."""
        return list(self._pipes)

    def run(self) -> None:
        try:
            self._warm_up()
        except Exception:  # a job will say what is wrong; a server that is up can at least show its gallery
            log.exception("the model could not be made ready")
        self.state, used = "idle", time.monotonic()
        while not self.queue.closed:
            job = self.queue.take(min(WAIT_SECONDS, self.settings.idle_seconds))
            if job is not None:
                self.state = "busy"
                self._serve(job)
                self.state, used = "idle", time.monotonic()
            elif self._pipes and time.monotonic() - used >= self.settings.idle_seconds:
                self._unload(list(self._pipes))

    def _warm_up(self) -> None:
        """Open the default model and, unless somebody waits already, draw the smallest picture with it once."""
        pipe = self._pipe(self.catalogue.default)
        with contextlib.suppress(Cancelled):
            if pipe.components.keep:
                for _ in pipe.draw("warm", width=64, height=64, num_inference_steps=1, seed=0,
                                   callback_on_step_end=lambda *step: step[3]["preview"],
                                   cancel=lambda: self.queue.busy or self.queue.closed):
                    pass

    def _serve(self, job: Job) -> None:
        """Draw a job and end it, whatever happens."""
        try:
            self._draw(job)
        except Cancelled:
            self.queue.finish(job, "cancelled")
        except (LinocutError, OSError, MemoryError) as error:
            self.queue.finish(job, "failed", str(error) or "out of memory; choose a smaller size")
        except Exception as error:
            log.exception("job %s failed", job.id)
            self.queue.finish(job, "failed", f"a bug in linocut ({type(error).__name__}); the server's log says more")
        else:
            self.queue.finish(job, "done")

    def _draw(self, job: Job) -> None:

        request = job.request
        if job.model not in self._pipes:
            job.progress = {"phase": "loading", "done": 0, "total": 1, "picture": 0, "pictures": len(request.jobs),
                            "step": 0, "steps": 0, "fraction": 0.0, "seconds_left": None}
            job.publish("progress", {**job.progress, "job": job.id})
        pipe = self._pipe(job.model)
        size = (job.model, request.width, request.height, request.steps, request.guided)
        together = not pipe.components.keep and len(request.jobs) <= memory.PICTURES_AT_ONCE
        reports = Reports(job, Pace(self._seconds.get(size), len(request.jobs), together))
        for picture in pipe.draw_request(request, callback_on_step_end=reports.on_step, cancel=job.cancel,
                                         on_progress=reports.on_progress):
            self._keep(job, picture)
        job.timings = dict(pipe.timings)
        self._seconds[size] = seconds_of(pipe.timings, len(request.jobs))

    def _keep(self, job: Job, picture: "Picture") -> None:
        """Put a picture into the gallery, and only then say that it is there."""
        for note in picture.warnings:
            if note not in job.warnings:
                job.warnings.append(note)
        entry = self.gallery.add(encode_png(picture.image, picture.recipe), picture.recipe)
        job.images.append(entry)
        job.publish("image", {"job": job.id, "picture": picture.index, "image": entry})

    # ---- warm models ---------------------------------------------------------------------------------------------

    def _pipe(self, name: str) -> "Pipeline":
        pipe = self._pipes.get(name)
        if pipe is None:
            from linocut.kernels.problem import thread_count
            from linocut.pipeline.generate import Pipeline

            folder = self.catalogue.find(name)
            # Small models stay beside each other; a large one has the memory for itself.
            self._unload([other for other, open_pipe in self._pipes.items()
                          if not memory.should_keep(memory.weight_bytes(open_pipe.folder))])
            keep = False  # more than a pipeline does by itself
            if not self.device.startswith("cuda"):
                plan = memory.plan(folder, *folder.settings["default_size"], dtype=self.settings.dtype,
                                   keep_loaded=True)
                free = budget.available_bytes()
                keep = free is not None and plan.peak <= KEEP_SHARE * (free + memory.resident_bytes())
            pipe = Pipeline(folder, dtype=self.settings.dtype, threads=self.settings.threads, device=self.device,
                            keep_loaded=keep or None)
            count, reason = thread_count()
            self.threads = {"count": count, "reason": reason}
            self._note_kernels(pipe)
            self._pipes[name] = pipe
        return pipe

    def _note_kernels(self, pipe: "Pipeline") -> None:
        from linocut.kernels.dispatch import candidate

        width, height = pipe.folder.settings["default_size"]
        text = int(pipe.folder.settings["text_length"])
        for component, tokens in (("transformer", width * height // 256 + text), ("text_encoder", text)):
            kernel, why_not = pipe.kernel(tokens, component), pipe.why_not_fused(component)
            whole = "whole steps run on the GPU" if self.device.startswith("cuda") else "whole blocks run in C++"
            layers = whole if why_not is None else f"layer by layer: {why_not}"
            summary = "" if kernel == "torch" else f"{candidate(kernel.split()[0]).summary}; "
            facts = {"model": pipe.folder.name, "component": component, "kernel": kernel, "reason": summary + layers}
            if facts not in self.kernels:
                self.kernels.append(facts)

    def _unload(self, names: list[str]) -> None:
        for name in names:
            self._pipes.pop(name).close()


class Reports:
    """What a job tells while it is drawn: progress at a bearable rate, and every step's preview."""

    def __init__(self, job: Job, pace: Pace) -> None:
        self.job, self.pace = job, pace
        self._told = 0.0
        self._steps = 0

    def on_progress(self, progress: "Progress") -> None:
        now = time.monotonic()
        if now - self._told >= PROGRESS_SECONDS or progress.done == progress.total:
            self._told = now
            self.job.progress = self.pace.describe(progress)
            self.job.publish("progress", {**self.job.progress, "job": self.job.id})

    def on_step(self, pipe: "Pipeline", step: int, sigma: float, state: "StepState") -> None:
        steps = self.job.request.steps
        picture, self._steps = self._steps // steps, self._steps + 1
        self.job.publish("preview", {"job": self.job.id, "picture": picture, "step": step + 1, "steps": steps,
                                     "seed": self.job.request.jobs[picture].seed,
                                     "image": data_url(state["preview"])})


def data_url(image: "Image") -> str:
    """A preview as a data: URL that holds a PNG."""
    if max(image.size) > PREVIEW_SIDE:
        image = image.copy()
        image.thumbnail((PREVIEW_SIDE, PREVIEW_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
