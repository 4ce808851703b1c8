"""How fast the server and its studio answer: a real `linocut serve`, a real Chromium, the embedded model.

    python benchmarks/server.py [--runs 7] [-o benchmarks/results/server.json]

Each number is the median of several with the least and the most, beside its target. Servers get a gallery and a prompt
cache of their own, and every prompt is new, so the text encoder runs each time. Needs Debian's chromium, or another one
on the path, and the extras `serve` and `test`.
"""

from __future__ import annotations

import argparse
import contextlib
import gzip
import http.client
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, sync_playwright

from linocut.cli.bench import report
from linocut.server.settings import Settings

COLOURS = ("red", "orange", "yellow", "green", "blue", "purple", "pink", "brown", "white", "black")
OBJECTS = ("apple", "cup", "car", "frog", "book", "train", "boat", "banana", "laptop", "backpack")
# The page takes a prompt and a press of the button: what a visitor waits for.
READY = """(() => {
  const look = () => {
    const button = document.querySelector("form button[type=submit]");
    if (button && !button.disabled && document.querySelector("textarea#prompt")) window.ready ??= performance.now();
  };
  new MutationObserver(look).observe(document, { subtree: true, childList: true, attributes: true });
})()"""
# From the press of the button to the frame that shows the first preview.
PREVIEW = """() => new Promise((resolve) => {
  const begin = performance.now();
  const observer = new MutationObserver(async () => {
    const image = document.querySelector("#stage img.draft");
    if (!image) return;
    observer.disconnect();
    await image.decode();
    requestAnimationFrame(() => resolve((performance.now() - begin) / 1000));
  });
  observer.observe(document.body, { subtree: true, childList: true, attributes: true });
  document.querySelector("form button[type=submit]").click();
})"""


@dataclass
class Results:
    """Samples by name, with unit and target ("at most") where there is one."""

    rows: dict[str, dict[str, Any]] = field(default_factory=dict)

    def add(self, name: str, value: float, unit: str = "s", target: float | None = None) -> None:
        row = self.rows.setdefault(name, {"unit": unit, "target": target, "samples": []})
        row["samples"].append(round(value, 5))
        found = row["samples"]
        row.update(median=statistics.median(found), min=min(found), max=max(found))

    def table(self) -> str:
        head = f"{'':<52}{'median':>9}{'least':>9}{'most':>9}{'target':>10}\n"
        return head + "\n".join(self._line(name, row) for name, row in self.rows.items())

    @staticmethod
    def _line(name: str, row: dict[str, Any]) -> str:
        scale, digits = {"s": (1000, 1), "bytes": (1e-6, 1)}.get(row["unit"], (1, 2))
        unit = {"s": "ms", "bytes": "MB"}.get(row["unit"], row["unit"])
        numbers = "".join(f"{row[key] * scale:>9.{digits}f}" for key in ("median", "min", "max"))
        target = row["target"]
        if target is None:
            return f"{name + ', ' + unit:<52}{numbers}"
        verdict = "met" if row["max"] <= target else "met by the median" if row["median"] <= target else "MISSED"
        return f"{name + ', ' + unit:<52}{numbers}{target * scale:>10.0f}  {verdict}"


class Server:
    """`linocut serve` on a free port, with home and cache of its own; `age` counts from the start of the process."""

    def __init__(self, *options: str) -> None:
        self.folder = tempfile.TemporaryDirectory()
        environment = {**os.environ, "LINOCUT_CACHE": f"{self.folder.name}/cache"}
        self.began = time.perf_counter()
        self.process = subprocess.Popen(
            [sys.executable, "-m", "linocut", "serve", "--port", "0", "--home", f"{self.folder.name}/home", *options],
            stdout=subprocess.PIPE, text=True, env=environment)
        assert self.process.stdout is not None
        self.address = self.process.stdout.readline().rpartition(" ")[2].strip().rstrip("/")
        self.port = int(self.address.rpartition(":")[2])
        self._prompts = (f"{count} {colour} {thing}s" for count in ("two", "three", "four") for thing in OBJECTS
                         for colour in COLOURS)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(20)
        self.folder.cleanup()

    @property
    def age(self) -> float:
        return time.perf_counter() - self.began

    def prompt(self) -> str:
        """One that this server has not seen."""
        return next(self._prompts)

    def ask(self, method: str, path: str, body: Any = None) -> Any:
        """One request on a connection of its own; the answer's JSON, or its bytes."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, None if body is None else json.dumps(body),
                               {"content-type": "application/json"})
            answer = connection.getresponse()
            content = answer.read()
            if answer.status >= 400:
                raise RuntimeError(f"{method} {path}: {answer.status} {content.decode()}")
            return json.loads(content) if answer.headers["content-type"] == "application/json" else content
        finally:
            connection.close()

    def job(self, **facts: Any) -> str:
        return self.ask("POST", "/api/jobs", {"prompt": self.prompt(), **facts})["id"]

    def events(self, job: str) -> Iterator[tuple[str, Any]]:
        """Events of a job until it is over."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", f"/api/jobs/{job}/events")
            kind = ""
            for raw in connection.getresponse():
                line = raw.decode().rstrip("\n")
                if line.startswith("event: "):
                    kind = line[7:]
                elif line.startswith("data: "):
                    yield kind, json.loads(line[6:])

    def end(self, job: str) -> dict[str, Any]:
        return next(data for kind, data in self.events(job) if kind == "end")

    def resident(self) -> int:
        return int(self.ask("GET", "/api/system")["memory"]["rss"])


def measure_start(results: Results) -> None:
    """From the shell to the page and to the first picture, fetched."""
    with Server() as server:
        server.ask("GET", "/")
        results.add("serve: start to the page", server.age)
        end = server.end(server.job())
        assert server.ask("GET", end["images"][0]["url"]).startswith(b"\x89PNG")
        results.add("serve: start to the first picture", server.age, target=8.0)


def measure_page(results: Results, browser: Browser, server: Server, runs: int) -> None:
    """A first visit: nothing of the page is in the browser's cache."""
    for number in range(runs + 1):
        context = browser.new_context(viewport={"width": 1440, "height": 900})
        page = context.new_page()
        page.add_init_script(READY)
        page.goto(server.address)
        while not (ready := page.evaluate("window.ready")):  # the page forbids what wait_for_function would do
            page.wait_for_timeout(5)
        seconds = ready / 1000
        page.locator("textarea#prompt").press_sequentially("x")
        assert page.locator("textarea#prompt").input_value().endswith("x")
        context.close()
        if number:  # the first one finds the browser cold
            results.add("studio: page interactive", seconds, target=1.0)
    scripts = [path.read_bytes() for path in Settings(Path()).studio.rglob("*.js")]
    results.add("studio: JavaScript as gzip", sum(len(gzip.compress(script)) for script in scripts) / 1000, "kB", 150)


def measure_preview(results: Results, browser: Browser, server: Server, runs: int) -> None:
    """By pressing the button, and by a client of the API; then the whole picture."""
    context = browser.new_context(viewport={"width": 1440, "height": 900}, reduced_motion="reduce")
    page: Page = context.new_page()
    page.goto(server.address)
    for _ in range(runs):
        page.locator("textarea#prompt").fill(server.prompt())
        page.locator("form button[type=submit]:enabled").wait_for()
        results.add("Draw pressed to the first preview on screen", page.evaluate(PREVIEW), target=0.3)
        page.get_by_role("button", name="Look at this picture").wait_for()
    context.close()
    for _ in range(runs):
        began = time.perf_counter()
        first = None
        for kind, _data in server.events(server.job()):
            if kind == "preview" and first is None:
                first = time.perf_counter() - began
        assert first is not None
        results.add("POST to the first preview event", first, target=0.3)
        results.add("POST to the whole picture (256 px, 8 steps)", time.perf_counter() - began)


def measure_cancel(results: Results, server: Server, side: int, runs: int, target: float | None = None) -> None:
    """Cancel amid a step: when the request is answered, when the job is over, and how long a block takes."""
    for number in range(runs):
        job = server.job(width=side, height=side, steps=100)
        steps: list[float] = []
        blocks = 0.0
        for kind, data in server.events(job):
            if kind == "progress" and data["phase"] == "denoise":
                blocks = data["total"] / data["steps"]
            elif kind == "preview":
                steps.append(time.perf_counter())
                if len(steps) == 3:
                    break
        step = (steps[-1] - steps[0]) / (len(steps) - 1)
        time.sleep(step * (number + 0.5) / runs)
        began, clock = time.time(), time.perf_counter()
        server.ask("DELETE", f"/api/jobs/{job}")
        results.add(f"cancel at {side} px: answered", time.perf_counter() - clock, target=0.15)
        stopped, block = server.end(job)["finished"] - began, step / blocks
        results.add(f"cancel at {side} px: work stopped", stopped)
        results.add(f"cancel at {side} px: one block takes", block)
        results.add(f"cancel at {side} px: stopped after", stopped / block, "blocks", target)


def measure_others(results: Results, server: Server, requests: int = 200) -> None:
    """Requests of somebody else while a picture is drawn."""
    job = server.job(steps=100, num_images=4)
    next(kind for kind, _ in server.events(job) if kind == "preview")
    samples = []
    for _ in range(requests):
        began = time.perf_counter()
        server.ask("GET", "/api/images?query=red")
        samples.append(time.perf_counter() - began)
    assert server.ask("GET", f"/api/jobs/{job}")["state"] == "running", "it was drawn all the while"
    server.ask("DELETE", f"/api/jobs/{job}")
    server.end(job)
    for sample in samples:
        results.add("a search of the gallery while drawing", sample)


def measure_memory(results: Results) -> None:
    """Resident memory with the model warm, and when it has left."""
    with Server("--idle", "2") as server:
        server.end(server.job())
        results.add("resident memory, model warm", server.resident(), "bytes")
        while server.ask("GET", "/api/system")["devices"][0]["loaded"]:
            time.sleep(0.2)
        results.add("resident memory, model unloaded", server.resident(), "bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=7)
    parser.add_argument("-o", "--output", type=Path)
    given = parser.parse_args()
    if given.runs < 1:
        parser.error("--runs must be at least 1")
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        parser.error("no Chromium on the path; on Debian: apt-get install chromium")
    results = Results()
    for _ in range(min(given.runs, 5)):
        measure_start(results)
    with Server() as server, sync_playwright() as playwright:
        # Containers run as root, where Chromium's own sandbox cannot start; it visits this server alone.
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        server.end(server.job())  # warm
        measure_page(results, browser, server, given.runs)
        measure_preview(results, browser, server, given.runs)
        browser.close()
        measure_cancel(results, server, 256, given.runs)
        measure_cancel(results, server, 1024, given.runs, target=1)  # blocks that outlast the request itself
        measure_others(results, server)
    measure_memory(results)
    print(results.table())
    if given.output is not None:
        threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        settings = {"runs": given.runs, "model": "embedded", "chromium": _chromium_version(chromium)}
        report.write(given.output, report.document("server", threads, settings, results.rows))


def _chromium_version(program: str) -> str:
    return subprocess.run([program, "--version"], stdout=subprocess.PIPE, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
