"""Many clients at once: every job ends once, as its own client asked, and memory stays flat."""

import random
import threading
from collections import Counter

import pytest
from serving import Serving

GROWTH_BYTES = 80e6


class Client(threading.Thread):
    """Queues small jobs, follows them, cancels some, reads the gallery between them."""

    def __init__(self, server, number, requests):
        super().__init__()
        self.server, self.number, self.left = server, number, requests
        self.rng = random.Random(number)
        self.outcomes: Counter[str] = Counter()
        self.images: list[str] = []
        self.errors: list[str] = []

    def run(self):
        try:
            while self.left > 0:
                self.turn()
        except Exception as error:  # the test reports it
            self.errors.append(f"{type(error).__name__}: {error}")

    def ask(self, *arguments):
        self.left -= 1
        return self.server.ask(*arguments)

    def turn(self):
        prompt, seed = f"car of client {self.number}", self.rng.randrange(2**32)
        answer = self.ask("POST", "/api/jobs", {"prompt": prompt, "seed": seed, "width": 64, "height": 64, "steps": 1})
        if answer.status == 429:
            assert answer.headers["retry-after"]
            self.outcomes["full"] += 1
            self.ask("GET", "/api/images?query=car&limit=5")
            return
        assert answer.status == 201, answer.body
        job = answer.json
        if self.rng.random() < 0.5:
            assert self.ask("DELETE", f"/api/jobs/{job['id']}").status == 200
        self.left -= 1
        ends = [data for kind, data in self.server.follow(f"/api/jobs/{job['id']}/events") if kind == "end"]
        assert len(ends) == 1
        end = ends[0]
        assert (end["id"], end["prompt"], end["seeds"]) == (job["id"], prompt, [seed])
        assert end["state"] in ("done", "cancelled")
        if end["state"] == "done":
            (image,) = end["images"]
            assert (image["prompt"], image["seed"]) == (prompt, seed)
            self.images.append(image["id"])
        self.outcomes[end["state"]] += 1


def rush(server, clients, requests):
    threads = [Client(server, number, requests // clients) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [error for thread in threads for error in thread.errors] == []
    return threads


def resident(server):
    return server.ask("GET", "/api/system").json["memory"]["rss"]


@pytest.mark.parametrize(("clients", "requests"), [(12, 180), pytest.param(50, 2000, marks=pytest.mark.slow)])
def test_no_job_is_lost_or_mixed_up(tmp_path, clients, requests):
    server = Serving(tmp_path, "--max-queue", str(clients // 2), "--model", "embedded")
    rush(server, clients, clients * 4)
    before = resident(server)
    threads = rush(server, clients, requests)
    outcomes = sum((thread.outcomes for thread in threads), Counter())
    assert outcomes["done"] > 0
    assert outcomes["cancelled"] > 0
    made = [image for thread in threads for image in thread.images]
    assert len(set(made)) == len(made)
    for image in made[:20]:
        assert server.ask("GET", f"/api/images/{image}").status == 200
    listed = server.ask("GET", "/api/jobs").json
    assert listed["queued"] == 0
    assert {job["state"] for job in listed["jobs"]} <= {"done", "cancelled"}
    assert resident(server) - before < GROWTH_BYTES
    assert "Traceback" not in server.stop()
