"""Foreign pages, forged names, paths that climb, bodies without end: all kept out, each with a sentence."""

import contextlib
import json
import socket
from pathlib import Path

import pytest
from conftest import TOKEN

from linocut.server.app import _inside
from linocut.server.settings import Settings


def raw(server, *lines, body=b""):
    """Send a request as it is written here; returns status, head and body."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as line:
        line.sendall("\r\n".join(lines).encode() + b"\r\n\r\n" + body)
        received = b""
        while part := line.recv(65536):
            received += part
    head, _, rest = received.partition(b"\r\n\r\n")
    return int(head.split()[1]), head.decode().lower(), rest


@pytest.mark.parametrize("headers", [
    {"origin": "https://evil.example"}, {"origin": "null"}, {"origin": "http://127.0.0.1:1"},
    {"sec-fetch-site": "cross-site"}, {"sec-fetch-site": "same-site"}])
def test_a_page_of_another_site_can_do_nothing(server, headers):
    before = len(server.ask("GET", "/api/jobs").json["jobs"])
    for method, path, body in (("POST", "/api/jobs", {"prompt": "x"}), ("GET", "/api/images", None),
                               ("POST", "/v1/images/generations", {"prompt": "x"})):
        answer = server.ask(method, path, body, **headers)
        assert answer.status == 403
        assert "may not use this server" in answer.sentence
        assert "access-control-allow-origin" not in answer.headers
    assert len(server.ask("GET", "/api/jobs").json["jobs"]) == before


def test_a_form_of_another_site_is_kept_out(server):
    answer = server.ask("POST", "/api/jobs", b'{"prompt": "x"}', origin="http://evil.example",
                        content_type="text/plain")
    assert answer.status == 403


def test_our_own_page_is_let_in(server):
    for host in (f"127.0.0.1:{server.port}", f"localhost:{server.port}"):
        answer = server.ask("GET", "/api/images", host=host, origin=f"http://{host}", sec_fetch_site="same-origin")
        assert answer.status == 200


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:80", "", "[::2]",
                                  "192.168.1.5", "127.0.0.1@evil.example"])
def test_a_name_that_is_not_ours_is_refused(server, host):
    """A page that points its own name at this machine (DNS rebinding) says that name."""
    answer = server.ask("GET", "/api/images", host=host)
    assert answer.status == 403
    assert "not called" in answer.sentence


def test_two_hosts_or_none_are_refused(server):
    port = f"127.0.0.1:{server.port}"
    for lines in (("GET /api/images HTTP/1.1", f"Host: {port}", "Host: evil.example", "Connection: close"),
                  ("GET /api/images HTTP/1.0",)):
        status, _, body = raw(server, *lines)
        assert 400 <= status < 500, body


def test_names_on_a_lan():
    lan = Settings(Path("home"), host="0.0.0.0", hosts=("studio.example",))
    for name in ("192.168.1.5", "[fe80::1]", "localhost", "studio.example"):
        assert lan.knows_host(name)
    for name in ("evil.example", "192.168.1.5.evil.example", ""):
        assert not lan.knows_host(name)


@pytest.mark.parametrize("path", [
    "/../../../../etc/passwd", "/assets/../../app.py", "/%2e%2e/app.py", "/..%2fapp.py", "/..%5capp.py", "//etc/passwd",
    "/assets/%2e%2e/%2e%2e/settings.py", "/%00.png", "/" + "a" * 3000 + ".js",
    "/api/images/..%2f..%2fgallery.sqlite/file", "/api/images/..%2fgallery/thumbnail", "/api/images/%2e%2e/file"])
def test_no_path_leads_out(server, path):
    status, _, body = raw(server, f"GET {path} HTTP/1.1", f"Host: 127.0.0.1:{server.port}", "Connection: close")
    assert status in (200, 400, 404)
    for secret in (b"root:", b"import ", b"SQLite format"):
        assert secret not in body


def test_files_of_the_studio_stay_inside(tmp_path):
    root = tmp_path / "studio"
    (root / "assets").mkdir(parents=True)
    (root / "assets" / "a.js").write_text("a")
    (tmp_path / "secret").write_text("s")
    (root / "link").symlink_to(tmp_path / "secret")
    assert _inside(root, "assets/a.js") == root / "assets" / "a.js"
    for path in ("../secret", "link", "assets/../../secret", "/etc/passwd", "assets", "a\0b", "x" * 5000):
        assert _inside(root, path) is None


def test_bodies_are_bounded(server):
    host = f"Host: 127.0.0.1:{server.port}"
    status, _, body = raw(server, "POST /api/jobs HTTP/1.1", host, "Content-Type: application/json",
                          "Content-Length: 99999999999", "Connection: close", body=b"{")
    assert status == 413
    assert b"at most 1048576 bytes" in body
    large = b"%x\r\n" % (3 << 20) + b"x" * (3 << 20) + b"\r\n0\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as line:
        line.sendall(f"POST /api/jobs HTTP/1.1\r\n{host}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        with contextlib.suppress(OSError):  # it may hang up while we are sending
            line.sendall(large)
        try:
            answer = line.recv(4096)
        except OSError:
            answer = b""
    assert answer == b"" or b" 413 " in answer
    assert server.ask("GET", "/api/jobs").status == 200


@pytest.mark.parametrize("path", ["/api/images", "/api/jobs", "/api/events", "/v1/models", "/api/openapi.json",
                                  "/api/link", "/api/nothing"])
def test_the_token_is_wanted(lan_server, path):
    for headers in ({}, {"authorization": "Bearer wrong-token"}, {"authorization": f"Basic {TOKEN}"},
                    {"cookie": "linocut_token=wrong"}, {"authorization": "Bearer \xff"}):
        answer = lan_server.ask("GET", path, **headers)
        assert answer.status == 401
        assert "token" in answer.sentence
        assert answer.headers["www-authenticate"] == "Bearer"


def test_the_token_lets_in_as_header_and_as_cookie(lan_server):
    assert lan_server.ask("GET", "/v1/models", authorization=f"Bearer {TOKEN}").status == 200
    by_link = lan_server.ask("GET", f"/?token={TOKEN}")
    by_form = lan_server.ask("POST", "/api/login", {"token": TOKEN})
    assert (by_link.status, by_link.headers["location"], by_form.status) == (303, "/", 204)
    for answer in (by_link, by_form):
        cookie = answer.headers["set-cookie"]
        assert "httponly" in cookie.lower()
        assert "samesite=strict" in cookie.lower()
        assert lan_server.ask("GET", "/api/images", cookie=cookie.split(";")[0]).status == 200
    assert "set-cookie" not in lan_server.ask("GET", "/?token=wrong").headers
    assert lan_server.ask("POST", "/api/login", {"token": "wrong"}).status == 401
    link = lan_server.ask("GET", "/api/link", authorization=f"Bearer {TOKEN}").json
    assert link["url"].endswith(f"?token={TOKEN}")
    assert link["qr"].startswith("<svg")


def test_the_page_itself_is_public_and_guarded_against_frames(lan_server):
    answer = lan_server.ask("GET", "/")
    assert answer.status == 200
    assert "frame-ancestors 'none'" in answer.headers["content-security-policy"]
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert answer.headers["referrer-policy"] == "no-referrer"


def test_errors_have_one_shape(server):
    for method, path in (("GET", "/api/nothing"), ("GET", "/v1/nothing"), ("PUT", "/api/jobs"),
                         ("GET", "/api/jobs/none"), ("GET", "/api/images/none"), ("DELETE", "/api/jobs/none")):
        answer = server.ask(method, path)
        assert answer.status in (404, 405)
        assert set(json.loads(answer.body)["error"]) == {"message", "type", "param", "code"}
