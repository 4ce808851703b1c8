"""A real server with the embedded models, and a real browser."""

import os
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

ROOT = Path(__file__).parents[2]
START_SECONDS = 60
# Far above what anything takes: tests run beside others on two cores.
PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)
SIZES = {"phone": {"width": 360, "height": 740}, "wide": {"width": 1440, "height": 900},
         "zoomed": {"width": 720, "height": 450}}  # what is left of the wide one at 200 %


def start(home: Path, *options: str) -> tuple["subprocess.Popen[str]", str]:
    """Start `linocut serve` on a free port with its data in `home`; returns the process and its address."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "HF_HUB_OFFLINE": "1"}
    process = subprocess.Popen([sys.executable, "-m", "linocut", "serve", "--port", "0", "--home", str(home), *options],
                               env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    said = ""
    ends = time.monotonic() + START_SECONDS
    while time.monotonic() < ends and process.poll() is None:
        if select.select([process.stdout], [], [], 0.2)[0]:
            said += process.stdout.readline()
        if found := re.search(r"serves at (http://\S+)/", said):
            return process, found[1]
    process.kill()
    raise AssertionError(f"linocut serve did not start: {said}")


def stop(process: "subprocess.Popen[str]") -> None:
    process.send_signal(signal.SIGINT)
    try:
        process.wait(20)
    except subprocess.TimeoutExpired:
        process.kill()
        raise


@pytest.fixture(scope="session")
def server(tmp_path_factory) -> Iterator[str]:
    process, address = start(tmp_path_factory.mktemp("studio-home"))
    yield address
    stop(process)


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    chromium = shutil.which("chromium") or shutil.which("google-chrome")
    assert chromium, "the studio's tests need a browser; on Debian: apt-get install chromium"
    with sync_playwright() as playwright:
        # Containers run as root, where Chromium's own sandbox cannot start; it only visits our server here.
        opened = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield opened
        opened.close()


@pytest.fixture
def open_studio(browser, server) -> Iterator[Callable[..., Page]]:
    """Call with a name of SIZES to get a fresh browser's page of the studio. Errors of the page fail the test."""
    contexts, errors = [], []

    def open_page(size: str = "wide", path: str = "/", **options: object) -> Page:
        context = browser.new_context(viewport=SIZES[size], reduced_motion="reduce", **options)
        context.set_default_timeout(PATIENCE_MS)
        contexts.append(context)
        page = context.new_page()
        page.on("pageerror", lambda error: errors.append(str(error)))
        # The browser logs each refused request by itself; how the studio takes it is what tests look at.
        page.on("console", lambda message: message.type == "error"
                and not message.text.startswith("Failed to load resource") and errors.append(message.text))
        page.goto(server + path)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert not errors
