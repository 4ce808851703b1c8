"""A real `linocut serve` in a process of its own, and a plain client for it."""

import http.client
import json
import os
import signal
import ssl
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

PROGRAM = "from linocut.cli import main; main()"


@dataclass
class Answer:
    """A response: its status, headers (names in lower case) and body."""

    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def sentence(self) -> str:
        """The message of an error."""
        return self.json["error"]["message"]


class Serving:
    """`linocut serve` on a free port, up when this returns; arguments are those of the command."""

    def __init__(self, home: Path, *arguments: str, **environment: str) -> None:
        self.home, self.headers = home, {"content-type": "application/json"}
        self.process = subprocess.Popen(
            [sys.executable, "-c", PROGRAM, "serve", "--port", "0", "--home", str(home), *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment})
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if "serves at" not in line:
            raise AssertionError(line + self.process.communicate(timeout=20)[1])
        self.url = line.split("serves at ")[1].split(",")[0].strip().rstrip("/")
        self.port = urlsplit(self.url).port
        self.ask("GET", "/api/models")  # waits for the application behind the socket

    def connect(self, seconds: float = 120) -> http.client.HTTPConnection:
        if self.url.startswith("https"):
            context = ssl.create_default_context(cafile=str(self.home / "tls" / "ca.crt"))
            return http.client.HTTPSConnection("127.0.0.1", self.port, timeout=seconds, context=context)
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=seconds)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Answer:
        """One request on a connection of its own; a body that is no bytes goes as JSON."""
        connection = self.connect()
        data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        try:
            connection.request(method, path, data, given)
            response = connection.getresponse()
            return Answer(response.status, {k.lower(): v for k, v in response.getheaders()}, response.read())
        finally:
            connection.close()

    def job(self, prompt: str = "a red car", **facts: Any) -> dict[str, Any]:
        """Queue a small job."""
        answer = self.ask("POST", "/api/jobs", {"prompt": prompt, "width": 64, "height": 64, "steps": 1, **facts})
        assert answer.status == 201, answer.body
        return answer.json

    def follow(self, path: str, last: int | None = None) -> Iterator[tuple[str, Any]]:
        """Events of a stream as (kind, data) until it ends or the caller stops."""
        connection = self.connect()
        try:
            connection.request("GET", path, headers=self.headers if last is None else
                               {**self.headers, "last-event-id": str(last)})
            response = connection.getresponse()
            assert response.status == 200, response.read()
            assert response.headers["content-type"].startswith("text/event-stream")
            kind = ""
            for raw in response:
                line = raw.decode().rstrip("\n")
                if line.startswith("event: "):
                    kind = line[7:]
                elif line.startswith("data: "):
                    yield kind, json.loads(line[6:])
        finally:
            connection.close()

    def finished(self, job: dict[str, Any]) -> dict[str, Any]:
        """The job once it is over."""
        return next(data for kind, data in self.follow(f"/api/jobs/{job['id']}/events") if kind == "end")

    def images(self, query: str = "") -> list[dict[str, Any]]:
        return self.ask("GET", f"/api/images?limit=200{query}").json["images"]

    def stop(self, how: signal.Signals = signal.SIGTERM) -> str:
        """End the server and return what it said on stderr."""
        self.process.send_signal(how)
        try:
            return self.process.communicate(timeout=30)[1]
        except subprocess.TimeoutExpired:
            self.process.kill()
            raise
