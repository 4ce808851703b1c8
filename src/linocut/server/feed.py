"""Events from worker threads to any number of followers in the event loop.

A feed keeps its recent events, so a follower that comes late or lost its connection takes up where it was, and one that
is slow holds nothing up: it has a number, not a queue. Progress that was superseded is dropped, and all but the newest
previews.
"""

import asyncio
import threading
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

QUIET_SECONDS = 15.0
SUPERSEDED = ("progress", "memory", "queue")
MOST_PREVIEWS = 100
"""Previews that a feed keeps: a job of many pictures makes thousands, and each is a picture."""


@dataclass(frozen=True)
class Event:
    """`number` rises along a feed; `data` is ready for JSON."""

    number: int
    kind: str
    data: dict[str, Any]


class Feed:
    """Published by any thread, followed in an event loop. Keeps `most` events, None for all; numbers follow `start`."""

    def __init__(self, most: int | None = None, start: int = 0) -> None:
        self._events: deque[Event] = deque(maxlen=most)
        self._last = start
        self._lock = threading.Lock()
        self._waiting: dict[asyncio.Event, asyncio.AbstractEventLoop] = {}
        self._closed = False

    def publish(self, kind: str, data: dict[str, Any]) -> None:
        """Add an event; progress replaces the progress of the same job right before it."""
        with self._lock:
            if self._closed:
                return
            if kind in SUPERSEDED and self._events:
                last = self._events[-1]
                if last.kind == kind and last.data.get("job") == data.get("job"):
                    self._events.pop()
            self._last += 1
            self._events.append(Event(self._last, kind, data))
            if kind == "preview":
                self._keep_previews(MOST_PREVIEWS)
            self._wake()

    def forget_previews(self) -> None:
        """Drop the previews: who follows from now on is told what lasts."""
        with self._lock:
            self._keep_previews(0)

    def _keep_previews(self, newest: int) -> None:
        previews = [event.number for event in self._events if event.kind == "preview"]
        dropped = set(previews[:len(previews) - newest]) if len(previews) > newest else set()
        if dropped:
            self._events = deque((event for event in self._events if event.number not in dropped), self._events.maxlen)

    def close(self) -> None:
        """Let followers go once they have read everything."""
        with self._lock:
            self._closed = True
            self._wake()

    def _wake(self) -> None:
        for event, loop in self._waiting.items():
            if not loop.is_closed():
                loop.call_soon_threadsafe(event.set)

    @property
    def last(self) -> int:
        """Number of the newest event."""
        with self._lock:
            return self._last

    def holds_after(self, number: int) -> bool:
        """Whether nothing that came after event `number` has been dropped for want of room."""
        with self._lock:
            oldest = self._events[0].number if self._events else self._last + 1
            return oldest - 1 <= number <= self._last

    async def follow(self, after: int = 0) -> AsyncIterator[Event | None]:
        """Yield events numbered above `after` as they come, None when nothing happened for a while, until close."""
        fresh_there = asyncio.Event()
        with self._lock:
            self._waiting[fresh_there] = asyncio.get_running_loop()
        try:
            while True:
                fresh_there.clear()
                with self._lock:
                    fresh = [event for event in self._events if event.number > after]
                    closed = self._closed
                for event in fresh:
                    yield event
                    after = event.number
                if fresh:
                    continue
                if closed:
                    return
                try:
                    await asyncio.wait_for(fresh_there.wait(), QUIET_SECONDS)
                except TimeoutError:
                    yield None
        finally:
            with self._lock:
                del self._waiting[fresh_there]
