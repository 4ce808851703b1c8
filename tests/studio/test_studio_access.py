"""Everybody can use the studio: axe finds nothing serious, narrow or wide, light or dark, and keys reach everything.

axe is Deque's rule engine, as `axe-playwright-python` packs it.
"""

import re

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Page, expect
from studio_server import SIZES, start, stop

pytestmark = pytest.mark.slow

SCREENS = ("create", "gallery", "compare", "machine")


def serious(page: Page) -> list[str]:
    found = Axe().run(page).response["violations"]
    return [f"{each['id']}: {node['html']}" for each in found if each["impact"] in ("serious", "critical")
            for node in each["nodes"]]


def too_wide(page: Page) -> list[str]:
    """Elements that reach beyond the window, once the page has settled; none if it does not scroll sideways."""
    for _ in range(50):
        if page.evaluate("document.documentElement.scrollWidth <= innerWidth"):
            return []
        page.wait_for_timeout(100)
    return page.evaluate("[...document.querySelectorAll('body *')].filter(e => e.getBoundingClientRect().right >"
                         " innerWidth + 0.5).map(e => e.outerHTML.slice(0, 200))") or ["the page itself"]


def test_a_page_that_scrolls_sideways_would_be_noticed(open_studio):
    page = open_studio()
    page.evaluate("document.body.insertAdjacentHTML('beforeend', '<p id=wide style=\"width:200vw\">wide</p>')")
    assert any("id=\"wide\"" in each for each in too_wide(page))


def test_axe_would_notice(open_studio):
    page = open_studio()
    page.evaluate("document.body.append(document.createElement('button'))")
    assert serious(page)


@pytest.mark.parametrize("colours", ["light", "dark"])
@pytest.mark.parametrize("size", ["phone", "wide"])
def test_no_serious_finding(open_studio, size, colours):
    page = open_studio(size, color_scheme=colours)
    page.locator("textarea#prompt").fill("a photo of a yellow car")
    page.locator("textarea#prompt").press("Control+Enter")
    expect(page.get_by_role("progressbar")).to_be_visible()
    assert serious(page) == []
    expect(page.get_by_role("button", name="Look at this picture")).to_be_visible()
    for screen in SCREENS:
        page.evaluate("screen => location.hash = '/' + screen", screen)
        expect(page.locator("h1")).to_have_count(1)
        expect(page.get_by_text("…", exact=False)).to_have_count(0)
        assert serious(page) == [], screen
        assert too_wide(page) == [], screen

    page.evaluate("location.hash = '/gallery'")
    page.get_by_role("button", name="a photo of a yellow car").first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert serious(page) == []
    page.keyboard.press("Escape")
    page.get_by_role("button", name="Open on a phone").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert serious(page) == []


@pytest.mark.parametrize("prompt", ["two red apples and a blue cup, " * 5, "rainbow" * 15], ids=["words", "one word"])
def test_a_long_prompt_does_not_widen_a_phone(open_studio, prompt):
    page = open_studio("phone")
    page.locator("textarea#prompt").fill(prompt)
    page.locator("textarea#prompt").press("Control+Enter")
    expect(page.get_by_role("progressbar")).to_be_visible()
    assert too_wide(page) == []
    page.get_by_role("button", name="Look at this picture").click()
    expect(page.get_by_role("dialog")).to_be_visible()
    assert too_wide(page) == []
    page.keyboard.press("Escape")
    for screen in ("create", "gallery"):
        page.evaluate("screen => location.hash = '/' + screen", screen)
        expect(page.locator("h1")).to_have_count(1)
        assert too_wide(page) == [], screen


def test_every_control_has_a_name_and_can_be_reached(open_studio):
    page = open_studio()
    expect(page.get_by_role("radio", name="embedded-binary")).to_be_attached()
    reached = set()
    for _ in range(60):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.id || document.activeElement.getAttribute('aria-label')"
                                  " || document.activeElement.textContent.trim()"))
    assert {"prompt", "seed", "Keep this seed", "Gallery", "History"} & reached >= {"prompt", "seed", "Keep this seed",
                                                                                    "Gallery"}


def test_keys_lead_to_the_screens(open_studio):
    page = open_studio()
    page.locator("main").focus()
    for key, title in (("2", "Gallery"), ("3", "Compare"), ("4", "What the machine does")):
        page.keyboard.press(key)
        expect(page.get_by_role("heading", level=1, name=title)).to_be_visible()
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keys")).to_be_visible()
    page.keyboard.press("Escape")
    expect(page.get_by_role("dialog")).to_have_count(0)


def test_a_page_zoomed_to_200_percent_stays_usable(open_studio):
    page = open_studio("zoomed")
    for screen in SCREENS:
        page.evaluate("screen => location.hash = '/' + screen", screen)
        expect(page.locator("h1")).to_have_count(1)
        assert too_wide(page) == [], screen


def test_it_can_be_installed_and_opens_without_the_server(browser, tmp_path):
    process, address = start(tmp_path)
    context = browser.new_context()
    try:
        page = context.new_page()
        page.goto(address)
        assert page.evaluate("navigator.serviceWorker.ready.then(worker => worker.active !== null)")
        page.reload()  # from now on the page is the service worker's
        expect(page.get_by_role("button", name="Draw 1 picture")).to_be_visible()
        chromium = context.new_cdp_session(page)
        assert chromium.send("Page.getAppManifest")["errors"] == []
        hindrances = {each["errorId"] for each in chromium.send("Page.getInstallabilityErrors")["installabilityErrors"]}
        assert hindrances <= {"in-incognito"}, "a browser's context of a test is private"
    finally:
        stop(process)
    page.reload(wait_until="domcontentloaded")
    expect(page.get_by_text("does not answer").first).to_be_visible()
    context.close()


def test_who_has_no_token_is_asked_for_it(browser, tmp_path):
    """And a phone that opens the link of the QR code is not."""
    token = "a-token-of-the-tests"
    process, address = start(tmp_path, "--host", "0.0.0.0", "--token", token)
    address = re.sub(r"//.*:", "//127.0.0.1:", address)
    try:
        context = browser.new_context(viewport=SIZES["phone"])
        page = context.new_page()
        page.goto(address)
        field = page.get_by_label("Token")
        field.fill("not-this-one")
        field.press("Enter")
        expect(page.get_by_role("alert").first).to_contain_text("not the token")
        assert serious(page) == []
        field.fill(token)
        field.press("Enter")
        expect(page.get_by_role("button", name="Draw 1 picture")).to_be_visible()
        page.get_by_role("button", name="Open on a phone").click()
        expect(page.get_by_alt_text("QR code of the studio's address")).to_be_visible()
        link = page.get_by_label("The studio's address").input_value()
        assert link.endswith(f"/?token={token}")
        assert serious(page) == []
        context.close()

        phone = browser.new_context(viewport=SIZES["phone"])
        page = phone.new_page()
        page.goto(address + link[link.index("/?"):])
        expect(page.get_by_role("button", name="Draw 1 picture")).to_be_visible()
        assert "token" not in page.url
        phone.close()
    finally:
        stop(process)
