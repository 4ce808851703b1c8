"""A real server with the embedded models, and a real browser."""

import shutil
from collections.abc import Callable, Iterator

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright
from studio_server import SIZES, start, stop

# Far above what anything takes: tests run beside others on two cores.
PATIENCE_MS = 60_000
expect.set_options(timeout=PATIENCE_MS)


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
    """Call with a name of SIZES to get a fresh browser's page of the studio. Errors of the page fail the test.

    A test that routes or watches requests gives service_workers="block": what passes through one is not seen.
    """
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
