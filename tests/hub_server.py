"""A hub on this machine: as much of the Hugging Face hub's HTTP interface as listing, fetching and publishing need.

It answers the real client over real sockets, and can misbehave as networks and servers do. Small files lie in git and
are served directly; large ones lie in a storage of their own behind a redirect to another origin, as on the real hub.
"""

import base64
import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
import urllib.parse
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import linocut

LARGE = 2000  # bytes from which a file lies in the storage
TOKEN = "hf_" + "t" * 34
SRC = str(Path(linocut.__file__).resolve().parents[1])


@dataclass
class Repo:
    """A repository: files by path per commit, and what branches and tags stand for."""

    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)
    private: bool = False
    gated: bool = False

    def commit(self, files: dict[str, bytes], message: str = "", branch: str = "main") -> str:
        facts = (branch, len(self.commits), sorted((path, hashlib.sha1(data).hexdigest())
                                                   for path, data in files.items()))
        sha = hashlib.sha1(repr(facts).encode()).hexdigest()
        self.commits[sha], self.refs[branch] = dict(files), sha
        self.messages.append(message)
        return sha

    def at(self, revision: str) -> str | None:
        return revision if revision in self.commits else self.refs.get(revision)


class Hub:
    """The state of the server, and its faults. `requests` are (method, path, headers) of all that came in."""

    def __init__(self) -> None:
        self.repos: dict[str, Repo] = {}
        self.storage: dict[str, bytes] = {}
        self.requests: list[tuple[str, str, dict[str, str]]] = []
        self.cuts: dict[str, list[int]] = {}  # end of path -> bytes after which each next answer breaks off
        self.lies: dict[str, list[bytes]] = {}  # end of path -> bytes that each next answer has instead
        self.statuses: dict[str, list[int]] = {}  # end of path -> statuses of the next answers
        self.stalls: dict[str, list[int]] = {}  # end of path -> bytes after which each next answer waits for `go`
        self.go = threading.Event()
        self.ranges = True
        self.listing = None  # answers instead of a repository's true list of files
        self.parents: list[str | None] = []
        self.lock = threading.Lock()

    def add(self, name: str, root: Path | dict[str, bytes], **options: bool) -> Repo:
        """Publish a folder."""
        files = root if isinstance(root, dict) else {
            path.relative_to(root).as_posix(): path.read_bytes() for path in root.rglob("*") if path.is_file()}
        repo = self.repos.setdefault(name, Repo(**options))
        repo.commit(files)
        for data in files.values():
            self.storage[hashlib.sha256(data).hexdigest()] = data
        return repo

    def fetched(self) -> list[str]:
        """Paths of the files whose bytes were asked for."""
        return [path.partition("/resolve/")[2].partition("/")[2] for method, path, _ in self.requests
                if method == "GET" and "/resolve/" in path]

    @staticmethod
    def take(faults: dict[str, list], path: str):
        for end, values in faults.items():
            if path.endswith(end) and values:
                return values.pop(0)
        return None


def git_sha(data: bytes) -> str:
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection. The storage is the same server under another name of this machine."""

    protocol_version = "HTTP/1.1"
    hub: Hub
    here: str
    storage: str

    def log_message(self, *args: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(body=False)

    def do_GET(self) -> None:
        self._get(body=True)

    def do_PUT(self) -> None:
        data = self._begin()
        oid = self.path.rpartition("/")[2]
        if hashlib.sha256(data).hexdigest() != oid:
            self._send(400, b"wrong bytes")
            return
        self.hub.storage[oid] = data
        self._send(200, b"")

    def do_POST(self) -> None:
        data = self._begin()
        path, _ = self._path()
        if path == "/api/repos/create":
            self._create(json.loads(data))
        elif path == "/api/validate-yaml":
            self._json({"warnings": [], "errors": []})
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", path):
            self._preupload(match[1], json.loads(data))
        elif match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            self._batch(json.loads(data))
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", path):
            self._commit(match[1], match[2], [json.loads(line) for line in data.splitlines()])
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/paths-info/([^/]+)", path):
            asked = urllib.parse.parse_qs(data.decode()).get("paths") or json.loads(data)["paths"]
            self._on(match[1], match[2], lambda commit, files: self._json(
                [entry for entry in map(tree_entry, sorted(files.items())) if entry["path"] in asked]))
        elif path == "/storage/verify":
            facts = json.loads(data)
            whole = len(self.hub.storage.get(facts["oid"], b"")) == facts["size"]
            self._send(200 if whole else 404, b"{}")
        else:
            self._send(404, b"{}")

    # ---- reading -----------------------------------------------------------------------------------------------------

    def _get(self, body: bool) -> None:
        self._begin()
        path, _ = self._path()
        status = self.hub.take(self.hub.statuses, path)
        if status is not None:
            self._send(status, b"{}", body=body)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/revision/(.+))?", path):
            self._on(match[1], match[2] or "main", lambda commit, files: self._json(
                self._info(match[1], commit, files)), listing=True)
        elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
            self._on(match[1], match[2], lambda commit, files: self._json(
                [tree_entry(item) for item in sorted(files.items())]), listing=True)
        elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._on(match[1], match[2], lambda commit, files: self._resolve(commit, files, match[3], body))
        elif match := re.fullmatch(r"/storage/([0-9a-f]{64})/(.+)", path):
            if self.headers.get("Authorization"):
                self._send(400, b"the token of the hub was sent to its storage")
            else:
                self._bytes(self.hub.storage[match[1]], match[2], {"ETag": f'"{match[1][:32]}"'}, body)
        else:
            self._send(404, b"{}", body=body)

    def _on(self, name: str, revision: str, answer, listing: bool = False) -> None:
        """Answer for a repository at a commit, or say why not as the hub does."""
        repo, known = self.hub.repos.get(name), self.headers.get("Authorization") == f"Bearer {TOKEN}"
        revision = urllib.parse.unquote(revision)
        if self.headers.get("Authorization") and not known:
            self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
        elif repo is None or (repo.private and not known):
            self._send(404 if known else 401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repo.gated and not listing and not known:
            self._send(401, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted."})
        elif repo.gated and not listing:
            self._send(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "You are not in the list."})
        elif (commit := repo.at(revision)) is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            answer(commit, repo.commits[commit])

    def _info(self, name: str, commit: str, files: dict[str, bytes]) -> dict:
        siblings = []
        for path, data in sorted(files.items()):
            entry = tree_entry((path, data))
            siblings.append({"rfilename": path, "size": entry["size"], "blobId": entry["oid"]} | (
                {"lfs": {"sha256": entry["lfs"]["oid"], "size": entry["size"], "pointerSize": 130}}
                if "lfs" in entry else {}))
        return {"_id": "1", "id": name, "modelId": name, "sha": commit, "private": False, "tags": [], "downloads": 0,
                "siblings": siblings if self.hub.listing is None else self.hub.listing}

    def _resolve(self, commit: str, files: dict[str, bytes], path: str, body: bool) -> None:
        data = files.get(path)
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit}, body)
        elif is_large(path, data):
            sha = hashlib.sha256(data).hexdigest()
            self._send(302, b"", {
                "Location": f"{self.storage}/storage/{sha}/{path}?expires=soon", "X-Repo-Commit": commit,
                "X-Linked-Etag": f'"{sha}"', "X-Linked-Size": str(len(data)), "ETag": f'"{git_sha(data)}"'}, body)
        else:
            self._bytes(data, path, {"ETag": f'"{git_sha(data)}"', "X-Repo-Commit": commit}, body)

    def _bytes(self, data: bytes, path: str, headers: dict[str, str], body: bool) -> None:
        lie = self.hub.take(self.hub.lies, path) if body else None
        data = data if lie is None else lie
        status, first, last = 200, 0, len(data) - 1
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match and self.hub.ranges:
            first, last = int(match[1]), min(int(match[2] or last), last)
            if first >= len(data):
                self._send(416, b"", {"Content-Range": f"bytes */{len(data)}"}, body)
                return
            status, headers = 206, headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"}
        piece = data[first:last + 1]
        cut = self.hub.take(self.hub.cuts, path) if body else None
        stall = self.hub.take(self.hub.stalls, path) if body else None
        if stall is not None:
            self._send(status, piece, headers, body=False, close=True)
            with contextlib.suppress(OSError):  # the client may be gone
                self.wfile.write(piece[:stall])
                self.wfile.flush()
                self.hub.go.wait(30)
                self.wfile.write(piece[stall:])
            return
        if cut is None:
            self._send(status, piece, {"Accept-Ranges": "bytes", **headers}, body)
            return
        self._send(status, piece, headers, body=False, close=True)
        self.wfile.write(piece[:cut])
        self.wfile.flush()

    # ---- writing -----------------------------------------------------------------------------------------------------

    def _create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'me'}/{asked['name']}"
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, b'{"error": "Invalid username or password."}')
        elif name in self.hub.repos:
            self._json({"url": f"{self.here}/{name}", "error": "You already created this model repo"}, 409)
        else:
            private = bool(asked.get("private") or asked.get("visibility") == "private")
            self.hub.repos[name] = Repo(private=private)
            self.hub.repos[name].commit({".gitattributes": b"*.safetensors filter=lfs\n"}, "initial commit")
            self._json({"url": f"{self.here}/{name}", "name": name})

    def _preupload(self, name: str, asked: dict) -> None:
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(401, b"{}", {"X-Error-Message": "Invalid credentials in Authorization header"})
            return
        head = self.hub.repos[name].commits[self.hub.repos[name].refs["main"]]
        answer = []
        for entry in asked["files"]:
            large = entry["size"] >= LARGE or entry["path"].endswith(".safetensors")
            old = head.get(entry["path"])
            oid = None if old is None else hashlib.sha256(old).hexdigest() if large else git_sha(old)
            answer.append({"path": entry["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False,
                           "oid": oid})
        self._json({"files": answer})

    def _batch(self, asked: dict) -> None:
        objects = []
        for entry in asked["objects"]:
            here = f"{self.storage}/storage/upload/{entry['oid']}"
            todo = {"actions": {"upload": {"href": here}, "verify": {"href": f"{self.here}/storage/verify"}}}
            objects.append(dict(entry) | ({} if entry["oid"] in self.hub.storage else todo))
        self._json({"transfer": "basic", "objects": objects})

    def _commit(self, name: str, branch: str, lines: list[dict]) -> None:
        repo = self.hub.repos[name]
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._send(403, b'{"error": "no"}')
            return
        head = repo.refs[branch]
        files, summary = dict(repo.commits[head]), ""
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                summary = value["summary"]
                self.hub.parents.append(value.get("parentCommit"))
                if value.get("parentCommit") not in (None, head):
                    self._json({"error": "a commit has happened since"}, 412)
                    return
            elif line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.storage[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(files, summary, branch)
        self._json({"commitUrl": f"{self.here}/{name}/commit/{sha}", "commitOid": sha})

    # ---- what they share ---------------------------------------------------------------------------------------------

    def _begin(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            data = b""
            while size := int(self.rfile.readline(), 16):
                data += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            data = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        headers = {key.title(): value for key, value in self.headers.items()}
        with self.hub.lock:
            self.hub.requests.append((self.command, self.path, headers))
        return data

    def _path(self) -> tuple[str, dict]:
        parts = urllib.parse.urlsplit(self.path)
        return urllib.parse.unquote(parts.path), urllib.parse.parse_qs(parts.query)

    def _json(self, value: object, status: int = 200) -> None:
        self._send(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: dict[str, str] | None = None, body: bool = True,
              close: bool = False) -> None:
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(data)))
        if close:
            self.send_header("Connection", "close")
            self.close_connection = True
        self.end_headers()
        if body and self.command != "HEAD":
            self.wfile.write(data)


def is_large(path: str, data: bytes) -> bool:
    return path.endswith(".safetensors") or len(data) >= LARGE


def tree_entry(item: tuple[str, bytes]) -> dict:
    """An entry of the hub's tree."""
    path, data = item
    entry = {"type": "file", "path": path, "size": len(data), "oid": git_sha(data)}
    if is_large(path, data):
        entry["lfs"] = {"oid": hashlib.sha256(data).hexdigest(), "size": len(data), "pointerSize": 130}
    return entry


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[str]:
    """Serve; yields the address for HF_ENDPOINT."""
    handler = type("ThisHandler", (Handler,), {"hub": hub})
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    handler.here = f"http://127.0.0.1:{server.server_port}"
    handler.storage = f"http://localhost:{server.server_port}"  # another origin
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield handler.here
    finally:
        hub.go.set()
        server.shutdown()
        server.server_close()


def environment(home: Path, endpoint: str, **more: str) -> dict[str, str]:
    """The environment of a program that uses the hub at `endpoint`; without Xet, whose protocol is another one."""
    names = ("HF_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy")
    inherited = {key: value for key, value in os.environ.items() if key not in names}
    return inherited | {"PYTHONPATH": SRC, "HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_XET": "1",
                        "HF_HUB_DISABLE_TELEMETRY": "1", "NO_PROXY": "127.0.0.1,localhost",
                        "no_proxy": "127.0.0.1,localhost", "COLUMNS": "200"} | more


def linocut_program(*arguments: object, env: dict[str, str], cwd: Path | None = None,
                    program: str = "-m linocut") -> "subprocess.CompletedProcess[str]":
    """Run the command line."""
    return subprocess.run([sys.executable, *program.split(), *map(str, arguments)], capture_output=True, text=True,
                          check=False, timeout=120, env=env, cwd=cwd)
