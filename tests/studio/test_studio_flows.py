"""What people do in the studio, in a real browser against the real server and the embedded models."""

import csv
import json
import re
import time
import zipfile
from pathlib import Path

import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from linocut.pipeline.png import read_recipe

pytestmark = pytest.mark.slow

PROMPT = "two red apples and a blue cup"


def wait_for_models(page: Page) -> None:
    """Nothing is drawn before, and then the first example is filled in: nothing must come between it and typing."""
    expect(page.get_by_role("radio", name="embedded-binary")).to_be_attached()


def draw(page: Page, prompt: str, seed: int | None = None) -> None:
    """Draw by keyboard, and wait for the picture."""
    wait_for_models(page)
    field = page.get_by_label("What to draw", exact=True).and_(page.locator("textarea"))
    field.fill(prompt)
    if seed is not None:
        page.get_by_label("Seed", exact=True).fill(str(seed))
        page.get_by_label("Seed", exact=True).press("Tab")
    field.press("Control+Enter")
    expect(page.get_by_role("button", name="Look at this picture").get_by_alt_text(prompt)).to_be_visible()


def test_a_picture_is_drawn_and_kept(open_studio, tmp_path):
    page = open_studio()
    draw(page, PROMPT, seed=11)
    expect(page.get_by_role("list", name="Previews of the steps").get_by_role("button")).to_have_count(8)
    with page.expect_download() as download:
        page.get_by_role("link", name="Download").click()
    path = tmp_path / "picture.png"
    download.value.save_as(path)
    recipe = read_recipe(path)
    assert (recipe.prompt, recipe.seed, recipe.model) == (PROMPT, 11, "embedded")

    # The same file, given back to a fresh studio, brings all settings back.
    other = open_studio()
    other.get_by_label("Recall the settings of a picture").set_input_files(path)
    expect(other.locator("textarea#prompt")).to_have_value(PROMPT)
    expect(other.get_by_label("Seed", exact=True)).to_have_value("11")
    expect(other.get_by_role("button", name="Keep this seed")).to_have_attribute("aria-pressed", "true")


def test_a_dropped_picture_without_recipe_is_refused_in_words(open_studio, tmp_path):
    page = open_studio()
    Image.new("RGB", (64, 64)).save(tmp_path / "plain.png")
    page.get_by_label("Recall the settings of a picture").set_input_files(tmp_path / "plain.png")
    expect(page.get_by_role("alert")).to_contain_text("recipe")


def test_the_history_and_the_seed(open_studio):
    page = open_studio()
    draw(page, "a purple backpack")
    seed = page.get_by_label("Seed", exact=True).input_value()
    draw(page, "a photo of a yellow car")
    assert page.get_by_label("Seed", exact=True).input_value() != seed, "an open seed is rolled for each picture"
    page.get_by_role("button", name="Keep this seed").click()
    kept = page.get_by_label("Seed", exact=True).input_value()
    draw(page, "a purple backpack")
    assert page.get_by_label("Seed", exact=True).input_value() == kept

    field = page.locator("textarea#prompt")
    field.fill("")
    field.press("ArrowUp")
    expect(field).to_have_value("a purple backpack")
    field.press("Home")
    field.press("ArrowUp")
    expect(field).to_have_value("a photo of a yellow car")
    page.reload()
    expect(field).to_have_value("a photo of a yellow car")
    expect(page.get_by_label("Seed", exact=True)).to_have_value(kept)


def test_examples_and_the_history_fill_in_and_draw_nothing(open_studio):
    page = open_studio()
    draw(page, "a yellow banana")
    before = len(page.request.get(page.url.split("#")[0] + "api/jobs").json()["jobs"])
    page.get_by_role("group", name="Examples").get_by_role("button").first.click()
    expect(page.locator("textarea#prompt")).to_have_value(PROMPT)
    page.get_by_role("button", name="Other examples").click()
    page.get_by_role("button", name="History").click()
    page.get_by_role("list", name="Earlier prompts").get_by_role("button", name="a yellow banana").click()
    expect(page.locator("textarea#prompt")).to_have_value("a yellow banana")
    page.wait_for_timeout(300)
    assert len(page.request.get(page.url.split("#")[0] + "api/jobs").json()["jobs"]) == before


def test_the_queue_is_reordered_and_cancelled_by_keyboard(open_studio):
    page = open_studio()
    wait_for_models(page)
    page.get_by_label("Steps", exact=True).fill("100")
    page.get_by_label("Steps", exact=True).press("Tab")
    for prompt in ("a red car", "a blue car", "a green car"):
        page.locator("textarea#prompt").fill(prompt)
        page.locator("textarea#prompt").press("Control+Enter")
    waiting = page.get_by_role("region", name="Waiting").get_by_role("listitem")
    expect(waiting).to_have_count(2)
    expect(waiting.first).to_contain_text("a blue car")
    page.get_by_role("button", name="Draw earlier: a green car").press("Enter")
    expect(waiting.first).to_contain_text("a green car")
    page.locator("textarea#prompt").press("Escape")
    expect(waiting).to_have_count(1)
    expect(waiting.first).to_contain_text("a blue car")
    page.get_by_role("button", name="Cancel: a blue car").click()
    expect(waiting).to_have_count(0)
    page.locator("textarea#prompt").press("Escape")
    expect(page.get_by_role("button", name=re.compile("^Cancel"))).to_have_count(0)


def test_an_answer_that_comes_late_does_not_put_a_job_back(open_studio):
    """The stream of events is often faster than the answer to the request that started the job."""
    page = open_studio(service_workers="block")

    def late(route):
        answer = route.fetch()
        time.sleep(1.5)
        route.fulfill(response=answer)

    page.route("**/api/jobs", late)
    wait_for_models(page)
    page.get_by_label("Steps", exact=True).fill("100")
    page.get_by_label("Steps", exact=True).press("Tab")
    page.locator("textarea#prompt").fill("a green car")
    with page.expect_response(lambda answer: answer.request.method == "POST" and answer.url.endswith("/api/jobs")):
        page.locator("textarea#prompt").press("Control+Enter")
        expect(page.get_by_role("button", name=re.compile("^Cancel"))).to_have_count(1)
    page.wait_for_timeout(200)
    expect(page.get_by_role("region", name="Waiting")).to_have_count(0)
    expect(page.get_by_text("Waiting for its turn")).to_have_count(0)
    page.locator("textarea#prompt").press("Escape")
    expect(page.get_by_role("button", name=re.compile("^Cancel"))).to_have_count(0)


def test_the_size_can_be_free(open_studio):
    page = open_studio()
    page.get_by_role("radio", name="Free").check()
    page.get_by_label("Width in pixels").fill("200")
    page.get_by_label("Width in pixels").press("Tab")
    expect(page.get_by_label("Width in pixels")).to_have_value("192")
    expect(page.get_by_text("192 × 256 takes up to")).to_be_visible()
    draw(page, "a green frog on a white background")
    picture = page.get_by_alt_text("a green frog on a white background")
    expect(picture).to_have_js_property("naturalWidth", 192)
    expect(picture).to_have_js_property("naturalHeight", 256)


def test_the_gallery(open_studio, tmp_path):
    page = open_studio()
    draw(page, "three oranges and a purple book")
    draw(page, "a red train left of a blue boat")
    page.keyboard.press("Tab")
    page.goto(page.url.split("#")[0] + "#/gallery")
    trains = page.get_by_role("button", name="a red train left of a blue boat")
    expect(trains).to_have_count(1)

    page.get_by_role("searchbox").fill("oranges")
    expect(trains).to_have_count(0)
    oranges = page.get_by_role("button", name="three oranges and a purple book")
    expect(oranges).to_have_count(1)
    oranges.click()
    view = page.get_by_role("dialog")
    expect(view.get_by_text("three oranges and a purple book").first).to_be_visible()
    page.keyboard.press("f")
    expect(view.get_by_role("button", name="Favourite")).to_have_attribute("aria-pressed", "true")
    view.get_by_label("Add a tag").fill("fruit")
    view.get_by_label("Add a tag").press("Enter")
    expect(view.get_by_role("button", name="Remove the tag fruit")).to_be_visible()
    view.get_by_text("The recipe inside the PNG").click()
    expect(view.get_by_text("model_hash")).to_be_visible()
    page.keyboard.press("Escape")
    expect(view).to_have_count(0)

    page.get_by_role("searchbox").fill("")
    page.get_by_role("button", name="Favourites").click()
    expect(oranges).to_have_count(1)
    expect(trains).to_have_count(0)
    page.get_by_role("button", name="Favourites").click()

    page.get_by_role("button", name="Select").click()
    trains.click()
    oranges.click()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export ZIP").click()
    path = tmp_path / "pictures.zip"
    download.value.save_as(path)
    with zipfile.ZipFile(path) as archive:
        assert len([name for name in archive.namelist() if name.endswith(".png")]) == 2
        assert len(json.loads(archive.read("recipes.json"))) == 2

    page.get_by_role("button", name="Delete", exact=True).click()
    expect(trains).to_have_count(0)
    page.get_by_role("button", name="Undo").click()
    expect(trains).to_have_count(1)
    trains.click()
    page.get_by_role("button", name="Use these settings").click()
    expect(page.locator("textarea#prompt")).to_have_value("a red train left of a blue boat")


def test_what_is_deleted_is_found_again_restored_or_destroyed(open_studio):
    page = open_studio()
    for prompt in ("a purple car", "a purple boat"):
        draw(page, prompt)
    page.goto(page.url.split("#")[0] + "#/gallery")
    page.get_by_role("searchbox").fill("purple")
    expect(page.locator("button.tile:not([aria-label*=purple])")).to_have_count(0)  # else tiles move under the click
    car, boat = (page.get_by_role("button", name=f"a purple {thing}", exact=True) for thing in ("car", "boat"))
    car.click()
    page.keyboard.press("Delete")
    expect(car).to_have_count(0)
    boat.click()
    page.get_by_role("dialog").get_by_role("button", name="Delete").click()
    expect(boat).to_have_count(0)

    page.get_by_role("button", name="Deleted").click()
    expect(boat).to_have_count(1)
    car.click()
    page.get_by_role("dialog").get_by_role("button", name="Restore").click()
    expect(car).to_have_count(0)
    page.get_by_role("button", name="Select").click()
    boat.click()
    page.get_by_role("button", name="Destroy").click()
    page.get_by_role("dialog", name="Destroy 1 picture?").get_by_role("button", name="Destroy").click()
    expect(boat).to_have_count(0)
    page.get_by_role("button", name="Deleted").click()
    expect(car).to_have_count(1)
    expect(boat).to_have_count(0)


def test_escape_stops_what_is_looked_at_alone(open_studio):
    """On the gallery it leaves the selection and lets the drawing go on; in the list of prompts it closes the list."""
    page = open_studio()
    draw(page, "a photo of a yellow car")
    for what, number in (("Steps", "100"), ("Pictures", "16")):
        page.get_by_label(what, exact=True).fill(number)
        page.get_by_label(what, exact=True).press("Tab")
    page.locator("textarea#prompt").press("Control+Enter")
    cancel = page.get_by_role("button", name=re.compile("^Cancel"))
    expect(cancel).to_have_count(1)
    page.get_by_role("button", name="History").click()
    page.get_by_role("list", name="Earlier prompts").get_by_role("button").first.press("Escape")
    expect(page.get_by_role("list", name="Earlier prompts")).to_have_count(0)
    page.get_by_role("link", name="Gallery").click()
    select = page.get_by_role("button", name="Select")
    select.click()
    page.keyboard.press("Escape")
    expect(select).to_have_attribute("aria-pressed", "false")
    page.get_by_role("navigation").get_by_role("link", name="Create").click()
    expect(cancel).to_have_count(1)
    page.locator("textarea#prompt").press("Escape")
    expect(cancel).to_have_count(0)


def test_two_models_under_a_slider(open_studio):
    page = open_studio(path="/#/compare")
    page.get_by_label("What both draw").fill(PROMPT)
    page.get_by_role("button", name="Draw with both").click()
    line = page.get_by_role("slider", name="Line between embedded and embedded-binary")
    expect(line).to_have_value("50")
    left, right = (page.get_by_alt_text(f"{name}: {PROMPT}", exact=True) for name in ("embedded", "embedded-binary"))
    assert left.get_attribute("src") != right.get_attribute("src")
    line.press("End")
    expect(line).to_have_value("100")
    expect(left).to_have_css("clip-path", "inset(0px 0% 0px 0px)")


def test_a_blind_vote_is_exported(open_studio, tmp_path):
    page = open_studio(path="/#/compare")
    page.get_by_role("button", name="Blind vote").click()
    page.get_by_label("Prompts, one a line").fill("a purple backpack\na photo of a yellow car")
    page.get_by_role("button", name="Draw 2 pairs").click()
    ballot = page.get_by_role("region", name="The pair to vote on")
    expect(ballot.get_by_role("heading", name="a purple backpack")).to_be_visible()
    expect(ballot.get_by_text("embedded")).to_have_count(0)
    page.keyboard.press("ArrowLeft")
    expect(ballot.get_by_role("heading", name="a photo of a yellow car")).to_be_visible()
    page.keyboard.press("ArrowDown")
    expect(page.get_by_role("heading", name="2 votes")).to_be_visible()
    with page.expect_download() as download:
        page.get_by_role("button", name="Export CSV").click()
    path = Path(tmp_path / "votes.csv")
    download.value.save_as(path)
    with open(path, encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["choice"] for row in rows] == ["left", "tie"]
    assert rows[0]["winner"] == rows[0]["left"]
    assert rows[1]["winner"] == ""
    assert {rows[0]["left"], rows[0]["right"]} == {"embedded", "embedded-binary"}


@pytest.mark.parametrize(("screen", "vote", "field"), [
    ("create", False, "What to draw"), ("compare", False, "What both draw"), ("compare", True, "Prompts, one a line")])
@pytest.mark.parametrize("typed_before", [True, False])
def test_examples_that_come_late_leave_the_field_to_who_writes(open_studio, screen, vote, field, typed_before):
    page = open_studio(path="/#/gallery", service_workers="block")
    waiting, released = [], []

    def hold(request):
        request.continue_() if released else waiting.append(request)

    page.route("**/api/models*", hold)
    page.goto(page.url.replace("gallery", screen))
    page.reload()
    if vote:
        page.get_by_role("button", name="Blind vote").click()
    text = page.get_by_role("textbox", name=field)
    text.focus()
    if typed_before:
        page.keyboard.type(PROMPT)
    released.append(True)
    with page.expect_response("**/api/models*"):
        for request in waiting:
            request.continue_()
    page.wait_for_timeout(300)
    if not typed_before:
        page.keyboard.type(PROMPT)
    expect(text).to_have_value(PROMPT)


def test_the_machine_says_what_it_does(open_studio):
    page = open_studio(path="/#/create")
    draw(page, "a purple backpack")
    page.get_by_role("link", name="Machine").click()
    expect(page.get_by_role("heading", name="No network calls")).to_be_visible()
    expect(page.get_by_role("img", name=re.compile("Memory of linocut"))).to_be_visible()
    expect(page.get_by_role("cell", name="transformer").first).to_be_visible()
    page.get_by_role("button", name="Open on a phone").last.click()
    expect(page.get_by_role("dialog").get_by_text("linocut serve --host 0.0.0.0")).to_be_visible()
