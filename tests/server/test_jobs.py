"""Jobs: drawn as asked, followed, moved, cancelled."""

import asyncio
import base64
import io
import time

import numpy as np
import pytest
from PIL import Image

from linocut.pipeline.request import Job as Asked
from linocut.pipeline.request import Request
from linocut.server.feed import Feed
from linocut.server.jobs import KEPT_PREVIEWS, Queue, QueueFull, WrongState

LONG = {"width": 256, "height": 256, "steps": 100}


def test_a_job_draws_what_the_pipeline_draws(server):
    from linocut import Pipeline

    job = server.job("a red car", seed=11, num_images=2, steps=2)
    assert job["state"] in ("queued", "running")
    assert job["seeds"] == [11, 12]
    done = server.finished(job)
    assert done["state"] == "done"
    assert [image["seed"] for image in done["images"]] == [11, 12]
    expected = Pipeline.from_pretrained("embedded")("a red car", seed=11, num_images=2, width=64, height=64,
                                                    num_inference_steps=2).images
    for image, pixels in zip(done["images"], expected, strict=True):
        png = server.ask("GET", image["url"])
        assert png.headers["content-type"] == "image/png"
        assert np.array_equal(np.asarray(Image.open(io.BytesIO(png.body))), np.asarray(pixels))


def test_events_tell_the_whole_story_in_order(server):
    job = server.job("a blue cup", num_images=2, steps=3)
    events = list(server.follow(f"/api/jobs/{job['id']}/events"))
    kinds = [kind for kind, _ in events]
    assert kinds[0] == "job"
    assert kinds[-1] == "end"
    previews = [data for kind, data in events if kind == "preview"]
    assert [(p["picture"], p["step"]) for p in previews] == [(i, s) for i in range(2) for s in (1, 2, 3)]
    small = Image.open(io.BytesIO(base64.b64decode(previews[-1]["image"].partition(",")[2])))
    assert small.size == (8, 8)
    assert [data["picture"] for kind, data in events if kind == "image"] == [0, 1]
    fractions = [data["fraction"] for kind, data in events if kind == "progress" and data["phase"] != "loading"]
    assert fractions == sorted(fractions)
    assert fractions[-1] == pytest.approx(1, abs=0.01)
    again = list(server.follow(f"/api/jobs/{job['id']}/events"))
    lasting = [[event for event in told if event[0] != "progress"] for told in (events, again)]
    assert lasting[0] == lasting[1], "a finished job tells the same once more, but for progress that was superseded"
    assert [kind for kind, _ in server.follow(f"/api/jobs/{job['id']}/events", last=10**6)] == []


def test_cancel_stops_a_running_job_and_the_next_one_goes_on(server):
    job = server.job(**LONG)
    for kind, _ in server.follow(f"/api/jobs/{job['id']}/events"):
        if kind == "preview":
            break
    following = server.job()
    answer = server.ask("DELETE", f"/api/jobs/{job['id']}")
    assert answer.status == 200
    assert answer.json["cancelling"] or answer.json["state"] == "cancelled"
    done = server.finished(job)
    assert done["state"] == "cancelled"
    assert done["images"] == []
    assert server.finished(following)["state"] == "done"
    assert server.ask("DELETE", f"/api/jobs/{job['id']}").json["state"] == "cancelled"


def test_queued_jobs_can_be_moved_and_cancelled(server):
    running = server.job(**LONG)
    while server.ask("GET", f"/api/jobs/{running['id']}").json["state"] == "queued":
        time.sleep(0.01)
    first, second, third = (server.job(f"number {i}") for i in range(3))
    assert [job["position"] for job in (first, second, third)] == [0, 1, 2]
    moved = server.ask("PATCH", f"/api/jobs/{third['id']}", {"position": 0})
    assert moved.json["position"] == 0
    listed = server.ask("GET", "/api/jobs").json
    assert [job["id"] for job in listed["jobs"][:4]] == [running["id"], third["id"], first["id"], second["id"]]
    assert listed["queued"] == 3
    assert server.ask("DELETE", f"/api/jobs/{first['id']}").json["state"] == "cancelled"
    refused = server.ask("PATCH", f"/api/jobs/{running['id']}", {"position": 0})
    assert refused.status == 409
    assert "only a queued job" in refused.sentence
    server.ask("DELETE", f"/api/jobs/{running['id']}")
    ends = [server.finished(job) for job in (second, third)]
    assert [end["state"] for end in ends] == ["done", "done"]
    assert ends[1]["started"] < ends[0]["started"], "moved ahead, so drawn first"


def test_the_stream_of_everything_holds_jobs_queue_and_memory(server):
    stream = server.follow("/api/events")
    assert next(stream)[0] == "hello"
    job = server.job()
    seen = []
    for kind, data in stream:
        seen.append(kind)
        if kind == "end" and data["id"] == job["id"]:
            break
    assert {"job", "queue", "progress", "preview", "image"} <= set(seen)
    assert any(kind == "memory" and data["rss"] > 0 for kind, data in stream_until(stream, "memory"))


def stream_until(stream, kind):
    for event in stream:
        yield event
        if event[0] == kind:
            return


def test_other_requests_are_answered_while_a_picture_is_drawn(server):
    job = server.job(**LONG)
    for kind, _ in server.follow(f"/api/jobs/{job['id']}/events"):
        if kind == "preview":
            break
    for _ in range(20):
        assert server.ask("GET", "/api/images").status == 200
    assert server.ask("GET", f"/api/jobs/{job['id']}").json["state"] == "running"
    server.ask("DELETE", f"/api/jobs/{job['id']}")
    assert server.finished(job)["state"] == "cancelled"


@pytest.mark.parametrize(("facts", "status", "words"), [
    ({"prompt": ""}, 422, "prompt"), ({"prompt": " \n"}, 422, "prompt"), ({"prompt": 5}, 422, "string"),
    ({"prompt": "x" * 4001}, 422, "4000"), ({}, 422, "prompt"), ({"prompt": "a", "width": 65}, 422, "multiple of 32"),
    ({"prompt": "a", "height": 320}, 400, "at most 256"), ({"prompt": "a", "steps": 101}, 422, "100"),
    ({"prompt": "a", "num_images": 17}, 422, "16"), ({"prompt": "a", "seed": -1}, 422, "seed"),
    ({"prompt": "a", "seed": 2**63}, 422, "seed"), ({"prompt": "a", "model": "/etc"}, 404, "embedded"),
    ({"prompt": "a", "guidance": 3}, 400, "distilled"), ({"prompt": "a", "stepps": 3}, 422, "stepps")])
def test_what_cannot_be_drawn_is_refused_with_a_sentence(server, facts, status, words):
    answer = server.ask("POST", "/api/jobs", facts)
    assert answer.status == status
    assert words in answer.sentence


def test_a_body_that_is_no_json_is_refused(server):
    for body in (b"", b"{", b'"x"', b"[1]", b'{"prompt": "\\ud800"}', b"\xff"):
        answer = server.ask("POST", "/api/jobs", body)
        assert answer.status in (400, 422)
        assert answer.sentence


def request(prompt="x"):
    return Request((Asked(0, prompt, 1),), 64, 64, 1, 1.0)


def test_the_queue_is_bounded():
    queue = Queue(2, Feed())
    queue.add("m", request())
    second = queue.add("m", request())
    with pytest.raises(QueueFull, match="2 jobs wait"):
        queue.add("m", request())
    assert queue.take(0) is not None
    queue.add("m", request())
    assert queue.take(0) is second
    with pytest.raises(WrongState, match="running"):
        queue.move(second, 0)
    queue.close()
    assert queue.take(0) is None
    assert second.cancel.is_set()


def test_a_feed_drops_superseded_progress_and_resumes():
    feed = Feed(most=4)
    feed.publish("progress", {"job": "a", "done": 1})
    feed.publish("progress", {"job": "a", "done": 2})
    feed.publish("progress", {"job": "b", "done": 1})
    feed.publish("end", {"job": "b"})

    async def read(after):
        feed.close()
        return [(event.number, event.kind) async for event in feed.follow(after)]

    assert feed.holds_after(0) is False, "event 1 is gone"
    assert feed.holds_after(1)
    assert not feed.holds_after(5)
    assert asyncio.run(read(0)) == [(2, "progress"), (3, "progress"), (4, "end")]
    assert asyncio.run(read(3)) == [(4, "end")]


def test_previews_are_bounded():
    """A job of sixteen pictures in a hundred steps makes 1,600 of them, and a hundred finished jobs are kept."""
    everyone = Feed(200)
    queue = Queue(50, everyone)
    for _ in range(KEPT_PREVIEWS + 3):
        job = queue.add("m", request())
        assert queue.take(0) is job
        for step in range(1000):
            job.publish("preview", {"job": job.id, "step": step, "image": "x"})
        queue.finish(job, "done")

    async def told(feed):
        feed.close()
        return [event async for event in feed.follow()]

    feeds = [asyncio.run(told(queue.find(job["id"]).feed)) for job in queue.describe_all()["jobs"]]
    previews = [[event.data["step"] for event in events if event.kind == "preview"] for events in feeds]
    assert previews == [list(range(900, 1000))] * KEPT_PREVIEWS + [[]] * 3, "newest jobs first"
    assert all([events[0].kind, events[-1].kind] == ["job", "end"] for events in feeds)
