"""kill -9 at any moment: no finished picture and no entry of the gallery is lost."""

import io
import random
import signal
import threading
import time

import pytest
from PIL import Image
from serving import Serving

from linocut.pipeline.png import read_recipe


def kill_while_drawing(home, seconds):
    """Draw and mark until the server is killed, so long after its first picture; returns what it reported as done."""
    server = Serving(home)
    reported: dict[str, dict] = {}
    begun, stopped = threading.Event(), threading.Event()

    def follow():
        try:
            for kind, data in server.follow("/api/events"):
                if kind == "image":
                    reported[data["image"]["id"]] = data["image"]
                    begun.set()
        except OSError:
            pass

    def edit():
        while not stopped.is_set():
            for image_id in list(reported):
                try:
                    answer = server.ask("PATCH", f"/api/images/{image_id}", {"favourite": True, "tags": ["kept"]})
                except OSError:
                    return
                if answer.status == 200:
                    reported[image_id] = answer.json
            time.sleep(0.005)

    threads = [threading.Thread(target=follow), threading.Thread(target=edit)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(8):
            server.job(num_images=16)
        begun.wait(60)  # loading takes as long as the machine is busy
        time.sleep(seconds)
    finally:
        server.stop(signal.SIGKILL)
        stopped.set()
        for thread in threads:
            thread.join()
    return reported


def check_nothing_lost(home, reported):
    server = Serving(home)
    there = {}
    cursor = ""
    while cursor is not None:
        page = server.ask("GET", f"/api/images?limit=200{cursor and '&after=' + cursor}").json
        there |= {image["id"]: image for image in page["images"]}
        cursor = page["next"]
    server.stop(signal.SIGKILL)
    files = {path.stem for path in (home / "gallery" / "images").glob("*.png")}
    assert files == set(there), "every file has its entry and every entry its file"
    assert not list(home.rglob("*.partial"))
    for image_id, image in reported.items():
        # A mark that was answered is there; one that was on its way may be.
        found = there[image_id]
        assert found["favourite"] or not image["favourite"]
        assert {**found, "favourite": 0, "tags": 0, "bytes": 0} == {**image, "favourite": 0, "tags": 0, "bytes": 0}
    for name in files:
        data = (home / "gallery" / "images" / f"{name}.png").read_bytes()
        Image.open(io.BytesIO(data)).load()
        assert read_recipe(io.BytesIO(data)).seed == there[name]["seed"]


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_loses_nothing(tmp_path, times):
    moments, reported = random.Random(times), {}
    for _ in range(times):
        reported |= kill_while_drawing(tmp_path, moments.uniform(0, 0.7))
        check_nothing_lost(tmp_path, reported)
    assert len(reported) >= times, "the kills came while pictures were being made"
