"""Everything that a running server consists of, put together once and handed to the routes."""

import time
from collections import deque
from typing import Any

from linocut.pipeline import budget, memory
from linocut.server import outgoing
from linocut.server.catalogue import Catalogue
from linocut.server.feed import Feed
from linocut.server.gallery import Gallery
from linocut.server.jobs import Queue
from linocut.server.settings import Settings
from linocut.server.worker import Worker

KEPT_EVENTS = 200
SAMPLE_SECONDS = 2.0
KEPT_SAMPLES = 900


class Service:
    """Gallery, models, queue and workers of one server. Raises what opening a model or the gallery raises."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.outgoing = outgoing.watch()  # before models are opened, which may be downloads
        # Numbers go on rising over restarts, so that a follower of the last server is told to begin anew.
        self.everyone = Feed(KEPT_EVENTS, start=time.time_ns() // 1_000_000)
        self.gallery = Gallery(settings.home / "gallery")
        self.catalogue = Catalogue(settings)
        self.queue = Queue(settings.most_queued, self.everyone)
        self.workers = [Worker(device, settings, self.queue, self.catalogue, self.gallery)
                        for device in settings.devices]
        self.samples: deque[dict[str, Any]] = deque(maxlen=KEPT_SAMPLES)

    def start(self) -> None:
        for worker in self.workers:
            worker.start()

    def stop(self) -> None:
        """Cancel what runs, let followers go, and wait for the workers to end; may be called twice."""
        self.queue.close()
        self.everyone.close()
        for worker in self.workers:
            if worker.is_alive():
                worker.join(timeout=10)
        self.gallery.close()

    @property
    def loaded(self) -> set[str]:
        """Names of the models that are warm on some device."""
        return {name for worker in self.workers for name in worker.loaded}

    def sample_memory(self) -> None:
        """Note how much memory is in use now, and tell it."""
        sample = {"time": time.time(), "rss": memory.resident_bytes(), "available": budget.available_bytes()}
        self.samples.append(sample)
        self.everyone.publish("memory", sample)
