"""A stand-in for the Hugging Face Hub on the loopback interface: it takes pushes and remembers what arrived.

It speaks the part of the Hub's API that `create_repo` and `upload_folder` of huggingface_hub use over plain LFS
(`HF_HUB_DISABLE_XET=1`): create, whoami, model info, tree, validate-yaml, preupload, LFS batch, upload, commit, download.
"""

import base64
import hashlib
import json
import re
import threading
from collections import defaultdict
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePath
from urllib.parse import unquote, urlsplit

import yaml


_LFS_SUFFIXES = {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf"}
_MAX_BODY = 64 * 2**20
_MAX_REQUESTS = 1000


@dataclass
class Commit:
    """One commit as it arrived: its message and the files it added or changed."""

    repo: str
    message: str
    files: dict[str, bytes]


@dataclass
class HubServer:
    """The server, as a context manager: `with HubServer(token) as hub: ... hub.url ... hub.files("user/name")`.

    Attributes:
        token: The only token that is accepted; API calls without it are answered with 401.
        lifetime: Seconds after which the server stops by itself.
        repos: Repositories created, with the visibility asked for.
        commits: Commits in order of arrival.
        requests: Method, path and whether the request carried the token.
    """

    token: str
    lifetime: float = 300.0
    repos: dict[str, str] = field(default_factory=dict)
    commits: list[Commit] = field(default_factory=list)
    requests: list[tuple[str, str, bool]] = field(default_factory=list)

    def __post_init__(self):
        self.lfs_objects: dict[str, bytes] = {}
        self.lock = threading.Lock()
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._http.daemon_threads = True
        self._timer = threading.Timer(self.lifetime, self._http.shutdown)
        self._timer.daemon = True
        self._thread = threading.Thread(target=self._http.serve_forever, args=(0.05,), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_port}"

    def files(self, repo: str) -> dict[str, bytes]:
        """The content of the main branch after all commits."""
        merged: dict[str, bytes] = {}
        for commit in self.commits:
            if commit.repo == repo:
                merged.update(commit.files)
        return merged

    def __enter__(self) -> "HubServer":
        self._thread.start()
        self._timer.start()
        return self

    def __exit__(self, *exception) -> None:
        self._timer.cancel()
        self._http.shutdown()
        self._thread.join()
        self._http.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def _handle(self) -> None:
        hub = self.hub
        body = self._read_body()
        path = unquote(urlsplit(self.path).path)
        authorized = self.headers.get("Authorization") == f"Bearer {hub.token}"
        with hub.lock:
            hub.requests.append((self.command, path, authorized))
            too_many = len(hub.requests) > _MAX_REQUESTS
        if body is None or too_many:
            self.close_connection = True
            return self._send(413 if body is None else 429)
        for method, pattern, needs_token, action in _ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command:
                if needs_token and not authorized:
                    return self._send(401, {"error": "Invalid credentials"})
                return action(self, body, **match.groupdict())
        return self._send(404, {"error": f"No such address: {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = _handle

    def _read_body(self) -> bytes | None:
        """The body of the request, or `None` if it is too large."""
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            length = int(self.headers.get("Content-Length", 0))
            return self.rfile.read(length) if length <= _MAX_BODY else None
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            if len(body) + size > _MAX_BODY:
                return None
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _send(self, status: int, content: object = None, headers: dict[str, str] | None = None) -> None:
        payload = (
            content if isinstance(content, bytes) else json.dumps(content).encode() if content is not None else b""
        )
        self.send_response(status)
        self.send_header(
            "Content-Type", "application/octet-stream" if isinstance(content, bytes) else "application/json"
        )
        self.send_header("Content-Length", str(len(payload)))
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(payload)

    # ---------------------------------------------------------------- what the Hub does

    def whoami(self, body: bytes) -> None:
        self._send(200, {"type": "user", "name": "user", "orgs": [], "auth": {"accessToken": {"role": "write"}}})

    def create(self, body: bytes) -> None:
        asked = json.loads(body)
        repo = f"{asked.get('organization') or 'user'}/{asked['name']}"
        with self.hub.lock:
            exists = repo in self.hub.repos
            self.hub.repos.setdefault(repo, asked.get("visibility") or "public")
        self._send(409 if exists else 200, {"name": repo, "id": repo, "url": f"{self.hub.url}/{repo}"})

    def validate_yaml(self, body: bytes) -> None:
        match = re.match(r"---\n(.*?)\n---\n", json.loads(body)["content"], re.DOTALL)
        try:
            data = yaml.safe_load(match[1]) if match else None
        except yaml.YAMLError as error:
            return self._send(400, {"errors": [{"message": str(error)}], "warnings": []})
        warnings = [] if isinstance(data, dict) else [{"message": "empty or missing yaml metadata in repo card"}]
        return self._send(200, {"errors": [], "warnings": warnings})

    def info(self, body: bytes, repo: str, revision: str | None = None) -> None:
        if repo not in self.hub.repos:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        files = [{"rfilename": name} for name in sorted(self.hub.files(repo))]
        head = f"{len(self.hub.commits):040x}"
        return self._send(200, {"id": repo, "modelId": repo, "sha": head, "siblings": files, "private": False})

    def tree(self, body: bytes, repo: str, revision: str) -> None:
        if repo not in self.hub.repos:
            return self._send(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        files = [
            {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            for name, content in sorted(self.hub.files(repo).items())
        ]
        return self._send(200, files)

    def preupload(self, body: bytes, repo: str, revision: str) -> None:
        existing = self.hub.files(repo)
        files = []
        for asked in json.loads(body)["files"]:
            lfs = PurePath(asked["path"]).suffix in _LFS_SUFFIXES
            answer = {"path": asked["path"], "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
            if asked["path"] in existing:
                content = existing[asked["path"]]
                git_blob = b"blob %d\0" % len(content) + content
                answer["oid"] = hashlib.sha256(content).hexdigest() if lfs else hashlib.sha1(git_blob).hexdigest()
            files.append(answer)
        self._send(200, {"files": files})

    def lfs_batch(self, body: bytes, repo: str) -> None:
        objects = []
        for asked in json.loads(body)["objects"]:
            if asked["oid"] not in self.hub.lfs_objects:
                asked["actions"] = {"upload": {"href": f"{self.hub.url}/lfs-storage/{asked['oid']}"}}
            objects.append(asked)
        self._send(200, {"transfer": "basic", "objects": objects})

    def lfs_upload(self, body: bytes, oid: str) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            return self._send(400, {"error": "The content does not have the announced hash"})
        with self.hub.lock:
            self.hub.lfs_objects[oid] = body
        return self._send(200)

    def commit(self, body: bytes, repo: str, revision: str) -> None:
        entries: dict[str, list[dict]] = defaultdict(list)
        for line in body.splitlines():
            entry = json.loads(line)
            entries[entry["key"]].append(entry["value"])
        unknown = set(entries) - {"header", "file", "lfsFile"}
        if unknown or any(value["oid"] not in self.hub.lfs_objects for value in entries["lfsFile"]):
            return self._send(
                400, {"error": f"Unknown operations {sorted(unknown)}, or an LFS file that was not uploaded"}
            )
        files = {value["path"]: base64.b64decode(value["content"]) for value in entries["file"]}
        files |= {value["path"]: self.hub.lfs_objects[value["oid"]] for value in entries["lfsFile"]}
        with self.hub.lock:
            self.hub.commits.append(Commit(repo, entries["header"][0]["summary"], files))
            oid = f"{len(self.hub.commits):040x}"
        return self._send(200, {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo}/commit/{oid}"})

    def resolve(self, body: bytes, repo: str, revision: str, path: str) -> None:
        content = self.hub.files(repo).get(path)
        if content is None:
            code = "EntryNotFound" if repo in self.hub.repos else "RepoNotFound"
            return self._send(404, {"error": "Not found"}, {"X-Error-Code": code})
        etag = {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": f"{len(self.hub.commits):040x}"}
        return self._send(200, content, etag)


_REPO = r"(?P<repo>[^/]+/[^/]+)"
_ROUTES = [
    ("GET", r"/api/whoami-v2", True, _Handler.whoami),
    ("POST", r"/api/repos/create", True, _Handler.create),
    ("POST", r"/api/validate-yaml", False, _Handler.validate_yaml),
    ("GET", rf"/api/models/{_REPO}(/revision/(?P<revision>[^/]+))?", False, _Handler.info),
    ("GET", rf"/api/models/{_REPO}/tree/(?P<revision>[^/]+)", False, _Handler.tree),
    ("POST", rf"/api/models/{_REPO}/preupload/(?P<revision>[^/]+)", True, _Handler.preupload),
    ("POST", rf"/{_REPO}\.git/info/lfs/objects/batch", True, _Handler.lfs_batch),
    ("PUT", r"/lfs-storage/(?P<oid>[0-9a-f]{64})", False, _Handler.lfs_upload),
    ("POST", rf"/api/models/{_REPO}/commit/(?P<revision>[^/]+)", True, _Handler.commit),
    ("GET", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", False, _Handler.resolve),
    ("HEAD", rf"/{_REPO}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", False, _Handler.resolve),
]
