"""SIGTERM taken as Ctrl-C, for commands that have something to clear away."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Within it, SIGTERM raises KeyboardInterrupt, so that cleaning up happens as it does for Ctrl-C."""
    previous = signal.signal(signal.SIGTERM, _interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


def _interrupt(_: int, __: FrameType | None) -> None:
    raise KeyboardInterrupt
