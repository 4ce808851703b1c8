"""What a server is told once, when it starts, and the limits that hold for every request."""

import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

DEFAULT_PORT = 7860
MOST_PROMPT = 4000
MOST_IMAGES = 16
MOST_STEPS = 100
LARGEST_SIDE = 4096
MOST_QUEUED = 64
MOST_BODY = 1 << 20
MOST_UPLOAD = 64 << 20
IDLE_SECONDS = 600.0
LOOPBACK = ("127.0.0.1", "localhost", "[::1]")


def default_home() -> Path:
    """Folder of what is kept between runs: `LINOCUT_HOME`, else linocut's folder where programs keep data."""
    asked = os.environ.get("LINOCUT_HOME", "").strip()
    if asked:
        return Path(asked).expanduser()
    data = os.environ.get("XDG_DATA_HOME", "").strip()
    return (Path(data) if data else Path.home() / ".local" / "share") / "linocut"


@dataclass(frozen=True)
class Settings:
    """`home` holds the gallery and certificates; `token` None asks for none; `port` 0 takes a free one.

    `hosts` are further names, without port, by which browsers may call this server. `largest_side` in pixels.
    """

    home: Path
    host: str = "127.0.0.1"
    port: int = DEFAULT_PORT
    token: str | None = None
    hosts: tuple[str, ...] = ()
    tls: bool = False
    models: tuple[str, ...] = ("embedded", "embedded-binary")
    devices: tuple[str, ...] = ("cpu",)
    dtype: str = "float32"
    threads: int | None = None
    idle_seconds: float = IDLE_SECONDS
    most_queued: int = MOST_QUEUED
    largest_side: int = LARGEST_SIDE
    studio: Path = field(default=Path(__file__).parent / "studio")

    @property
    def local(self) -> bool:
        """Whether only programs of this machine can reach the server."""
        return is_loopback(self.host)

    @property
    def scheme(self) -> str:
        return "https" if self.tls else "http"

    def knows_host(self, host: str) -> bool:
        """Whether a Host header, without its port, names this server.

        A page of a foreign site can point its own name at this machine, and then its requests look like ours but for
        this header. On a LAN any address is fine, since such a page has a name and no token.
        """
        host = host.lower()
        if host in LOOPBACK or host in self.hosts:
            return True
        if self.local:
            return False
        name = socket.gethostname().lower()
        address = re.fullmatch(r"\d{1,3}(\.\d{1,3}){3}|\[[0-9a-f:.%]+\]", host)
        return address is not None or host in (name, f"{name}.local", f"{name}.lan")


def is_loopback(host: str) -> bool:
    return host in ("localhost", "::1") or re.fullmatch(r"127(\.\d{1,3}){3}", host) is not None
