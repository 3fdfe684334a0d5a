"""A server on loopback that speaks the model hub's protocol for folders, and remembers what it is asked."""

import base64
import hashlib
import json
import threading
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote, urlsplit


class Request(NamedTuple):
    """What was asked, with the token it was asked with."""

    method: str
    path: str
    token: str | None


class HubServer:
    """Serves repositories at `address` until `stop`: name -> revision -> folder, with `main` among the revisions.

    Those in `private` and `gated` want `token`; the terms of those in `gated` nobody has accepted. Who has the token
    can also make repositories and upload, into `uploads`; every file comes as a part of the commit.
    """

    def __init__(
        self,
        repositories: dict[str, dict[str, Path]],
        token: str,
        private: Collection[str] = (),
        gated: Collection[str] = (),
        uploads: Path | None = None,
    ) -> None:
        self.repositories, self.token, self.private, self.gated = repositories, token, set(private), gated
        self.uploads = uploads
        self.requests: list[Request] = []
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.address = f"http://127.0.0.1:{self._http.server_address[1]}"
        threading.Thread(target=self._http.serve_forever, args=(0.01,), daemon=True).start()

    def stop(self) -> None:
        self._http.shutdown()
        self._http.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self._answer()

            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer()

            def _answer(self) -> None:
                path = unquote(urlsplit(self.path).path)
                token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
                hub.requests.append(Request(self.command, path, token))
                given = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if self.command == "POST":
                    status, headers, body = hub.take(path, token, given)
                else:
                    status, headers, body = hub.answer(path, token)
                self.send_response(status)
                for name, value in {**headers, "Content-Length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(body)

        return Handler

    def answer(self, path: str, token: str | None) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body."""
        api = path.startswith("/api/")
        parts = path.removeprefix("/api/").strip("/").removeprefix("models/").removeprefix("datasets/").split("/")
        name, rest = "/".join(parts[:2]), parts[2:]
        if token not in (None, self.token):
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        if name not in self.repositories or (name in self.private and token != self.token):
            return _error(404 if token == self.token else 401, "RepoNotFound", "Repository not found")
        if name in self.gated:
            return _error(403 if token == self.token else 401, "GatedRepo", f"Access to model {name} is restricted")
        revision = rest[1] if len(rest) > 1 else "main"
        folder = next((f for r, f in self.repositories[name].items() if revision in (r, commit(name, r))), None)
        if folder is None:
            return _error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        sha = next(commit(name, r) for r in self.repositories[name] if revision in (r, commit(name, r)))
        files = sorted(file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file())
        if not api:
            return _file(folder, "/".join(rest[2:]), files, sha)
        if rest[:1] == ["tree"]:
            entries = [{"type": "file", "path": f, "oid": sha, "size": (folder / f).stat().st_size} for f in files]
            return 200, {"Content-Type": "application/json"}, json.dumps(entries).encode()
        info = {"id": name, "modelId": name, "sha": sha, "private": name in self.private, "tags": []}
        return (
            200,
            {"Content-Type": "application/json"},
            json.dumps({**info, "siblings": [{"rfilename": file} for file in files]}).encode(),
        )

    def take(self, path: str, token: str | None, given: bytes) -> tuple[int, dict[str, str], bytes]:
        """Make a repository, or take a commit of whole files; status, headers and body."""
        if token != self.token or self.uploads is None:
            return 401, {"X-Error-Message": "Invalid credentials in Authorization header"}, b""
        if path == "/api/repos/create":
            wanted = json.loads(given)
            name = f"{wanted['organization']}/{wanted['name']}"
            if wanted["visibility"] == "private":
                self.private.add(name)
            exists = name in self.repositories
            self.repositories.setdefault(name, {"main": self.uploads / name})
            return _json(409 if exists else 200, {"url": f"{self.address}/{name}", "id": name})
        if path == "/api/validate-yaml":
            return _json(200, {"errors": [], "warnings": []})
        name, _, action = path.removeprefix("/api/models/").rpartition("/main")[0].rpartition("/")
        if action == "preupload":
            files = json.loads(given)["files"]
            return _json(
                200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        for line in map(json.loads, given.splitlines()):
            if line["key"] == "file":
                file = self.repositories[name]["main"] / line["value"]["path"]
                file.parent.mkdir(parents=True, exist_ok=True)
                file.write_bytes(base64.b64decode(line["value"]["content"]))
        made = commit(name, "main")
        return _json(200, {"commitUrl": f"{self.address}/{name}/commit/{made}", "commitOid": made, "hookOutput": ""})


def commit(name: str, revision: str) -> str:
    """The commit that a revision of a repository is."""
    return hashlib.sha1(f"{name}@{revision}".encode()).hexdigest()


def _file(folder: Path, name: str, files: list[str], sha: str) -> tuple[int, dict[str, str], bytes]:
    if name not in files:
        status, headers, body = _error(404, "EntryNotFound", f"Entry not found: {name}")
        return status, {**headers, "X-Repo-Commit": sha}, body
    body = (folder / name).read_bytes()
    return 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": sha}, body


def _json(status: int, content: dict[str, Any]) -> tuple[int, dict[str, str], bytes]:
    return status, {"Content-Type": "application/json"}, json.dumps(content).encode()


def _error(status: int, code: str, message: str) -> tuple[int, dict[str, str], bytes]:
    headers = {"X-Error-Code": code, "X-Error-Message": message, "Content-Type": "application/json"}
    return status, headers, json.dumps({"error": message}).encode()
