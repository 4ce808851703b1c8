"""Bind, say where, run until interrupted."""

import errno
import secrets
import socket
import sys
from dataclasses import replace
from types import FrameType

import uvicorn

from linocut.errors import UsageError
from linocut.server.app import make_app
from linocut.server.link import address, link, qr_text
from linocut.server.service import Service
from linocut.server.settings import Settings
from linocut.server.tls import certificate

STOP_SECONDS = 5
BACKLOG = 512


class Server(uvicorn.Server):
    """Uvicorn that lets followers of events go when it is told to stop; it would wait for them."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        self.service.queue.close()
        self.service.everyone.close()
        super().handle_exit(sig, frame)


def serve(settings: Settings, open_browser: bool = False) -> None:
    """Serve until Ctrl-C or SIGTERM. Raises UsageError if the port is taken, and what opening the models raises."""
    if not settings.local and settings.token is None:
        settings = replace(settings, token=secrets.token_urlsafe(16))
    listening = _bind(settings)
    settings = replace(settings, port=listening.getsockname()[1])
    files = certificate(settings.home / "tls", settings.host) if settings.tls else None
    guard, service = make_app(settings)
    config = uvicorn.Config(guard, log_level="warning", access_log=False, server_header=False,
                            timeout_graceful_shutdown=STOP_SECONDS, ws="none", lifespan="on",
                            ssl_certfile=files[0] if files else None, ssl_keyfile=files[1] if files else None)
    _announce(settings)
    if open_browser:
        import webbrowser
        webbrowser.open(link(settings))
    Server(config, service).run(sockets=[listening])


def _bind(settings: Settings) -> socket.socket:
    """A listening socket, before anything is loaded: a port that is taken is told at once."""
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((settings.host, settings.port))
        listening.listen(BACKLOG)
    except OSError as error:
        listening.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(f"port {settings.port} is taken by another program; choose another with --port, or 0 for "
                             "any free one") from None
        raise UsageError(f"cannot listen on {settings.host}:{settings.port}: {error.strerror or error}") from None
    return listening


def _announce(settings: Settings) -> None:
    """Say where the server is, on stdout; on a terminal with a QR code if other devices can reach it."""
    where = link(settings)
    if settings.local:
        print(f"linocut serves at {where}", flush=True)
        return
    print(f"linocut serves at {address(settings)}, to browsers that were let in by this link:\n{where}", flush=True)
    if sys.stdout.isatty():
        print(qr_text(where), flush=True)
    if settings.tls:
        print(f"to trust it on a phone, add the authority at {address(settings)}ca.crt there", flush=True)
