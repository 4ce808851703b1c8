"""`linocut serve` itself: what it says, what it refuses, how it starts and ends."""

import json
import signal
import socket
import stat
import subprocess
import sys
import time

import pytest
from conftest import TOKEN
from serving import PROGRAM, Serving

BLOCKED = "import sys; sys.modules['fastapi'] = None; sys.modules['uvicorn'] = None\n"


def serve(*arguments, before=""):
    return subprocess.run([sys.executable, "-c", before + PROGRAM, "serve", *arguments], capture_output=True, text=True,
                          timeout=60, check=False)


def test_without_the_extra_it_says_what_to_install():
    finder = ("import importlib.util as u; find = u.find_spec\n"
              "u.find_spec = lambda name, *more: None if name == 'fastapi' else find(name, *more)\n")
    done = serve(before=BLOCKED + finder)
    assert done.returncode == 2
    assert done.stderr.startswith("error: serving needs fastapi")
    assert "linocut[serve]" in done.stderr


def test_a_taken_port_is_told_at_once(tmp_path):
    with socket.create_server(("127.0.0.1", 0)) as other:
        done = serve("--port", str(other.getsockname()[1]), "--home", str(tmp_path))
    assert done.returncode == 2
    assert "is taken" in done.stderr
    assert "--port" in done.stderr


@pytest.mark.parametrize(("arguments", "words"), [
    (("--token", "short"), "at least 8"), (("--token", "with a space in it"), "spaces"),
    (("--model", "/nowhere"), "no model"), (("--model", "embedded", "--model", "embedded"), "two models"),
    (("--host", "203.0.113.7"), "cannot listen")])
def test_mistakes_end_in_one_line(tmp_path, arguments, words):
    done = serve("--port", "0", "--home", str(tmp_path), *arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_other_devices_need_a_token_that_is_made_if_none_is_given(tmp_path):
    server = Serving(tmp_path, "--host", "0.0.0.0")
    assert server.process.stdout is not None
    link = server.process.stdout.readline().strip()
    assert server.ask("GET", "/api/jobs").status == 401
    token = link.split("?token=")[1]
    assert len(token) >= 20
    assert server.ask("GET", "/api/jobs", authorization=f"Bearer {token}").status == 200
    server.ask("GET", f"/?token={token}")
    server.ask("GET", f"/api/nothing?token={token}", authorization=f"Bearer {token}")
    assert token not in server.stop(), "no secrets in logs"


def test_it_ends_soon_while_a_picture_is_drawn_and_someone_follows(tmp_path):
    server = Serving(tmp_path)
    job = server.job(width=256, height=256, steps=100)
    stream = server.follow(f"/api/jobs/{job['id']}/events")
    assert any(kind == "preview" for kind, _ in stream)
    began = time.monotonic()
    said = server.stop(signal.SIGINT)
    assert time.monotonic() - began < 20
    assert "Traceback" not in said
    assert [kind for kind, _ in stream][-1:] in (["end"], [])


def test_tls_serves_with_a_certificate_that_its_authority_vouches_for(tmp_path):
    server = Serving(tmp_path, "--tls")
    assert server.url.startswith("https://")
    assert server.ask("GET", "/api/jobs").status == 200, "verified against ca.crt, host name included"
    assert b"BEGIN CERTIFICATE" in server.ask("GET", "/ca.crt").body
    first = (tmp_path / "tls" / "server.crt").read_bytes()
    assert stat.S_IMODE((tmp_path / "tls" / "server.key").stat().st_mode) == 0o600
    assert {path.name for path in (tmp_path / "tls").iterdir()} == {"ca.crt", "server.crt", "server.key"}
    server.stop()
    again = Serving(tmp_path, "--tls")
    assert (tmp_path / "tls" / "server.crt").read_bytes() == first, "kept, so a phone needs to trust it once"
    again.stop()


def test_an_idle_model_leaves_memory_and_comes_back(tmp_path):
    server = Serving(tmp_path, "--idle", "1")
    server.finished(server.job())
    for _ in range(100):
        if not server.ask("GET", "/api/system").json["devices"][0]["loaded"]:
            break
        time.sleep(0.2)
    else:
        raise AssertionError("still loaded")
    assert server.finished(server.job())["state"] == "done"
    server.stop()


def test_models_and_machine_are_described(server):
    models = server.ask("GET", "/api/models?width=128&height=64").json["models"]
    assert [model["name"] for model in models] == ["embedded", "embedded-binary"]
    assert [model["encoding"] for model in models] == ["ternary", "binary"]
    for model in models:
        assert model["payload"]["total"] == sum(v for k, v in model["payload"].items() if k != "total")
        assert model["memory"]["width"] == 128
        assert model["memory"]["peak"] == max(model["memory"]["phases"].values())
        assert model["memory"]["fits"]
    huge = server.ask("GET", "/api/models?width=16384&height=16384").json["models"][0]["memory"]
    assert not huge["fits"]
    assert "would fit" in huge["why_not"]
    server.finished(server.job())
    system = server.ask("GET", "/api/system").json
    assert system["state"] == "ready"
    assert {(kernel["model"], kernel["component"]) for kernel in system["kernels"]} >= {
        ("embedded", "transformer"), ("embedded", "text_encoder")}
    assert system["memory"]["rss"] > 50e6
    assert system["memory"]["history"]
    assert system["network"]["calls"] == []


def test_examples_use_words_that_the_embedded_models_know():
    from linocut.formats.folder import ModelFolder
    from linocut.pipeline.vocabulary import Vocabulary
    from linocut.server.catalogue import SCENES

    vocabulary = Vocabulary.of(ModelFolder.open("embedded"))
    assert vocabulary is not None
    assert [vocabulary.note(prompt) for prompt in SCENES] == [None] * len(SCENES)


def test_no_network_call_is_observed_and_not_only_said(lan_server, monkeypatch):
    """Of a server that draws and tells its address on the LAN; a name that is looked up would be told."""
    monkeypatch.setitem(lan_server.headers, "authorization", f"Bearer {TOKEN}")
    assert lan_server.finished(lan_server.job())["state"] == "done"
    for path in ("/api/link", "/api/models"):
        assert lan_server.ask("GET", path).status == 200
    network = lan_server.ask("GET", "/api/system").json["network"]
    assert network["calls"] == []
    assert "no connection" in network["statement"]


def test_what_is_asked_of_the_network_is_seen():
    """In a process of its own: an audit hook stays for good."""
    code = """if True:
        import contextlib, json, socket
        from linocut.server.link import lan_address
        from linocut.server.outgoing import statement, watch
        watch()
        lan_address()
        with socket.create_server(("127.0.0.1", 0)) as own, socket.create_connection(own.getsockname()):
            pass
        assert watch().calls() == []
        for _ in range(2):
            with contextlib.suppress(OSError):
                socket.getaddrinfo("models.invalid", 443)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as far:
            far.connect(("203.0.113.1", 53))  # connecting UDP sends nothing
        print(json.dumps(watch().calls()))
        assert "hub ids" in statement(watch().calls())
    """
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    found = [(call["kind"], call["host"], call["port"], call["count"]) for call in json.loads(done.stdout)]
    assert found == [("lookup", "models.invalid", 443, 2), ("connection", "203.0.113.1", 53, 1)]
