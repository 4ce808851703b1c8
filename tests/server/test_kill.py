"""kill -9 at any moment: no finished picture and no entry of the gallery is lost."""

import http.client
import io
import random
import signal
import threading
import time

import pytest
from PIL import Image
from serving import Serving

from linocut.pipeline.png import read_recipe

PICTURES = 16
START_SECONDS = 60
# What a request meets whose server is killed: no connection, or an answer that ends too early.
CUT_OFF = (OSError, http.client.HTTPException)


class Life:
    """One server on a gallery that others were killed over; draws, marks and is killed in its turn."""

    def __init__(self, home):
        self.server = Serving(home)
        self.reported: dict[str, dict] = {}
        self.drawing = threading.Event()
        self.stopped = threading.Event()

    def follow(self):
        try:
            for kind, data in self.server.follow("/api/events"):
                if kind == "preview":
                    self.drawing.set()
                elif kind == "image":
                    self.reported[data["image"]["id"]] = data["image"]
        except CUT_OFF:
            pass

    def edit(self):
        while not self.stopped.is_set():
            for image_id in list(self.reported):
                try:
                    answer = self.server.ask("PATCH", f"/api/images/{image_id}", {"favourite": True, "tags": ["kept"]})
                except CUT_OFF:
                    return
                if answer.status == 200:
                    self.reported[image_id] = answer.json
            time.sleep(0.005)

    def draw_until_killed(self, seconds):
        """Kill it so long after it began to draw; returns whether it was drawing, and what it had reported as done."""
        threads = [threading.Thread(target=self.follow), threading.Thread(target=self.edit)]
        for thread in threads:
            thread.start()
        try:
            jobs = [self.server.job(num_images=PICTURES, steps=2) for _ in range(8)]
            assert self.drawing.wait(START_SECONDS)
            time.sleep(seconds)
        finally:
            self.server.stop(signal.SIGKILL)
            self.stopped.set()
            for thread in threads:
                thread.join()
        return len(self.reported) < PICTURES * len(jobs), self.reported

    def entries(self):
        there, cursor = {}, ""
        while cursor is not None:
            page = self.server.ask("GET", f"/api/images?limit=200{cursor and '&after=' + cursor}").json
            there |= {image["id"]: image for image in page["images"]}
            cursor = page["next"]
        return there


class Witness:
    """Remembers what lives have reported, and looks at a gallery after each of them."""

    def __init__(self, home):
        self.folder, self.home = home / "gallery" / "images", home
        self.reported: dict[str, dict] = {}
        self.seeds: dict[str, int] = {}

    def check_nothing_lost(self, there):
        files = {path.stem for path in self.folder.glob("*.png")}
        assert files == set(there), "every file has its entry and every entry its file"
        assert not list(self.home.rglob("*.partial"))
        for image_id, image in self.reported.items():
            # A mark that was answered is there; one that was on its way may be.
            found = there[image_id]
            assert found["favourite"] or not image["favourite"]
            assert {**found, "favourite": 0, "tags": 0, "bytes": 0} == {**image, "favourite": 0, "tags": 0, "bytes": 0}
        for name in files - set(self.seeds):
            data = (self.folder / f"{name}.png").read_bytes()
            Image.open(io.BytesIO(data)).load()
            self.seeds[name] = read_recipe(io.BytesIO(data)).seed
        assert {name: there[name]["seed"] for name in files} == self.seeds


@pytest.mark.parametrize("times", [3, pytest.param(50, marks=pytest.mark.slow)])
def test_kill_loses_nothing(tmp_path, times):
    moments, witness, amid = random.Random(times), Witness(tmp_path), 0
    for _ in range(times):
        life = Life(tmp_path)
        witness.check_nothing_lost(life.entries())
        drawing, reported = life.draw_until_killed(moments.uniform(0, 1))
        witness.reported |= reported
        amid += drawing
    last = Life(tmp_path)
    witness.check_nothing_lost(last.entries())
    last.server.stop(signal.SIGKILL)
    assert amid == times, "every kill came while pictures were being drawn"
    assert witness.reported
