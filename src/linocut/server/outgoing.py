"""What this process asked of the network, by Python's audit events: that nothing is sent is observed, not only said.

The interpreter reports every name that is looked up and every address that a socket is connected to, whichever library
asks for it. An audit hook cannot be taken away again, so a process has one. What code outside Python does is not seen:
a download of a model shows by the name that it looked up.
"""

import functools
import ipaddress
import socket
import sys
import threading
import time
from typing import Any

from linocut.server.link import PROBE

MOST_PLACES = 100
"""Places that are told apart; further ones are counted together."""
Place = tuple[str, str, int | None]


class Outgoing:
    """Names that were looked up and addresses that were connected to, this machine's own left out."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._places: dict[Place, dict[str, Any]] = {}

    def hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Take note of an audit event; it is called for all of them, and most are of no interest."""
        if event in ("socket.connect", "socket.sendto", "socket.sendmsg"):
            asking, address = arguments
            if asking.family in (socket.AF_INET, socket.AF_INET6) and address and address != PROBE:
                self._note("connection", str(address[0]), int(address[1]))
        elif event in ("socket.getaddrinfo", "socket.gethostbyname", "socket.gethostbyaddr"):
            name, port = (*arguments, None)[:2]
            if isinstance(name, bytes):
                name = name.decode("ascii", "replace")
            if name and not _is_address(name):  # an address is looked up without asking anybody
                self._note("lookup", name, port if isinstance(port, int) else None)

    def _note(self, kind: str, host: str, port: int | None) -> None:
        if _is_local(host):
            return
        now = time.time()
        with self._lock:
            place: Place = (kind, host, port)
            if place not in self._places and len(self._places) >= MOST_PLACES:
                place = (kind, "others", None)
            known = self._places.setdefault(place, {"kind": kind, "host": place[1], "port": place[2], "count": 0,
                                                    "first": now})
            known["count"] += 1
            known["last"] = now

    def calls(self) -> list[dict[str, Any]]:
        """Places: `kind` ("lookup" of a name, "connection" to an address), host, port, count, first and last time."""
        with self._lock:
            return [dict(place) for place in self._places.values()]


@functools.cache
def watch() -> Outgoing:
    """The watch of this process, which begins with the first call."""
    outgoing = Outgoing()
    sys.addaudithook(outgoing.hook)
    return outgoing


def statement(calls: list[dict[str, Any]]) -> str:
    """What the calls mean, in a sentence or two."""
    if calls:
        return ("linocut is made to fetch models that it was told to by their hub ids, and nothing else. Since its "
                "start this process asked the network for:")
    return ("Pictures are drawn and kept on this machine. Since its start this process has looked up no name and "
            "opened no connection to another machine.")


def _is_address(host: str) -> bool:
    try:
        ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    return True


def _is_local(host: str) -> bool:
    if not _is_address(host):
        return host == "localhost"
    found = ipaddress.ip_address(host.partition("%")[0])
    return found.is_loopback or found.is_unspecified
