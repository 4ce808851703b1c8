"""Server-sent events on the wire."""

import json
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import StreamingResponse

from linocut.server.feed import Event

SSE: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}},
                                              "description": "Server-sent events."}}
"""What a route that answers with events says of itself in the OpenAPI schema."""


def encode(kind: str, data: object, number: int | None = None) -> str:
    """One event, ready to be sent."""
    head = "" if number is None else f"id: {number}\n"
    return f"{head}event: {kind}\ndata: {json.dumps(data, ensure_ascii=False)}\n\n"


async def encode_all(events: AsyncIterator[Event | None]) -> AsyncIterator[str]:
    """Events of a feed, with a comment now and then that keeps proxies from closing the line."""
    async for event in events:
        yield ": still here\n\n" if event is None else encode(event.kind, event.data, event.number)


def response(lines: AsyncIterator[str]) -> StreamingResponse:
    return StreamingResponse(lines, media_type="text/event-stream",
                             headers={"cache-control": "no-store", "x-accel-buffering": "no"})


def last_event_id(request: Request) -> int | None:
    """The number of the last event that a follower saw before it lost its connection, or None."""
    given = request.headers.get("last-event-id", "")
    return int(given) if given.isascii() and given.isdecimal() and len(given) < 20 else None
