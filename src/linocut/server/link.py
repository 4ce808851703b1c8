"""The address that another device on the LAN opens, and its QR code."""

import contextlib
import socket
from urllib.parse import quote

from linocut.server.settings import Settings

ANY = ("0.0.0.0", "::", "")
PROBE = ("192.0.2.1", 9)
"""A documentation address: connecting UDP picks a route and sends no packet."""


def lan_address() -> str:
    """The address of this machine on the network that it routes by; 127.0.0.1 if it has none. Nothing is sent."""
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect(PROBE)
        return str(probe.getsockname()[0])
    return "127.0.0.1"


def address(settings: Settings, port: int | None = None) -> str:
    """URL of the server, as another device would write it if it can reach it; without the token."""
    host = lan_address() if settings.host in ANY else settings.host
    host = f"[{host}]" if ":" in host else host
    return f"{settings.scheme}://{host}:{settings.port if port is None else port}/"


def link(settings: Settings, port: int | None = None) -> str:
    """URL that lets a browser in: the address, with the token if one is asked for."""
    token = "" if settings.token is None else f"?token={quote(settings.token, safe='')}"
    return address(settings, port) + token


def qr_svg(url: str) -> str:
    """The QR code of a URL as an SVG element, dark on white with its quiet zone."""
    import segno
    return segno.make(url, micro=False).svg_inline(scale=4, border=4, light="#fff", dark="#000")


def qr_text(url: str) -> str:
    """The QR code of a URL for a terminal, two rows of modules per line."""
    import io

    import segno
    out = io.StringIO()
    segno.make(url, micro=False, error="l").terminal(out, compact=True, border=2)
    return out.getvalue()
