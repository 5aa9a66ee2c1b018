"""A Hugging Face hub on loopback, in memory: the few routes that pushing an adapter and loading it take.

Every file travels as a "regular" one, inside the commit, which leaves out the protocols for large files. A repository
has one branch, main, and only its newest commit. A route that is not in `ROUTES` is answered with 404 and recorded.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


@dataclass
class Repo:
    commit: str = "0" * 40
    files: dict[str, bytes] = field(default_factory=dict)


class Hub(ThreadingHTTPServer):
    """The server and what it holds: `repos`, each request (`seen`), and those that no route took (`unknown`)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.seen: list[str] = []
        self.unknown: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def serve() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


def blob_id(content: bytes) -> str:
    """The name that git gives to a file's content; the hub uses it as ETag, and the client's cache as file name."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def dispatch(self) -> None:
        path = unquote(urlsplit(self.path).path)
        line = f"{self.command} {self.path}"
        self.server.seen.append(line)
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        for methods, pattern, answer in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and self.command in methods:
                answer(self, **{key: value for key, value in match.groupdict().items() if value is not None})
                return
        self.server.unknown.append(line)
        self.refuse("UnknownRoute", f"the loopback hub has no route for {line}")

    do_DELETE = do_GET = do_HEAD = do_POST = do_PUT = dispatch

    def create(self) -> None:
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        self.server.repos.setdefault(name, Repo())
        self.reply_json({"url": f"{self.server.url}/{name}"})

    def validate_yaml(self) -> None:
        self.reply_json({"errors": [], "warnings": []})

    def preupload(self, name: str, revision: str) -> None:
        if self.find(name, revision):
            paths = [file["path"] for file in json.loads(self.body)["files"]]
            files = [{"path": path, "uploadMode": "regular", "shouldIgnore": False} for path in paths]
            self.reply_json({"files": files})

    def commit(self, name: str, revision: str) -> None:
        repo = self.find(name, revision)
        if repo is None:
            return
        entries = [json.loads(line) for line in self.body.splitlines()]
        others = {entry["key"] for entry in entries} - {"header", "file"}
        if others:
            self.refuse("BadRequest", f"the loopback hub takes no commit entries {sorted(others)}", status=400)
            return
        files = [entry["value"] for entry in entries if entry["key"] == "file"]
        repo.files.update({file["path"]: base64.b64decode(file["content"], validate=True) for file in files})
        repo.commit = hashlib.sha1(repo.commit.encode() + self.body).hexdigest()
        url = f"{self.server.url}/{name}/commit/{repo.commit}"
        self.reply_json({"success": True, "commitOid": repo.commit, "commitUrl": url, "hookOutput": ""})

    def resolve(self, name: str, revision: str, file: str) -> None:
        repo = self.find(name, revision)
        if repo is None:
            return
        content = repo.files.get(file)
        if content is None:
            self.refuse("EntryNotFound", f"{name} has no file {file}", headers={"X-Repo-Commit": repo.commit})
        else:
            self.reply(content, headers={"ETag": f'"{blob_id(content)}"', "X-Repo-Commit": repo.commit})

    def info(self, name: str, revision: str = "main") -> None:
        repo = self.find(name, revision)
        if repo is not None:
            siblings = [{"rfilename": path} for path in sorted(repo.files)]
            self.reply_json({"id": name, "sha": repo.commit, "private": False, "tags": [], "siblings": siblings})

    def tree(self, name: str, revision: str) -> None:
        repo = self.find(name, revision)
        if repo is not None:
            entries = [
                {"type": "file", "path": path, "size": len(content), "oid": blob_id(content)}
                for path, content in sorted(repo.files.items())
            ]
            self.reply_json(entries)

    def find(self, name: str, revision: str) -> Repo | None:
        """The repository, or None after the refusal that the real hub gives."""
        repo = self.server.repos.get(name)
        if repo is None:
            self.refuse("RepoNotFound", f"there is no repository {name}")
        elif revision not in ("main", repo.commit):
            self.refuse("RevisionNotFound", f"{name} has no revision {revision}")
        else:
            return repo
        return None

    def refuse(self, code: str, message: str, status: int = 404, headers: dict[str, str] | None = None) -> None:
        body = json.dumps({"error": message}).encode()
        self.reply(body, status, {"X-Error-Code": code, "X-Error-Message": message, **(headers or {})})

    def reply_json(self, value: Any) -> None:
        self.reply(json.dumps(value).encode(), headers={"Content-Type": "application/json"})

    def reply(self, body: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for key, value in {**(headers or {}), "Content-Length": str(len(body))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet: `Hub.seen` is the log."""


NAME = r"(?P<name>[^/]+/[^/]+)"
REVISION = r"(?P<revision>[^/]+)"
ROUTES: list[tuple[tuple[str, ...], str, Callable[..., None]]] = [
    (("POST",), r"/api/repos/create", Handler.create),
    (("POST",), r"/api/validate-yaml", Handler.validate_yaml),
    (("POST",), rf"/api/models/{NAME}/preupload/{REVISION}", Handler.preupload),
    (("POST",), rf"/api/models/{NAME}/commit/{REVISION}", Handler.commit),
    (("GET", "HEAD"), rf"/{NAME}/resolve/{REVISION}/(?P<file>.+)", Handler.resolve),
    (("GET",), rf"/api/models/{NAME}(/revision/{REVISION})?", Handler.info),
    (("GET",), rf"/api/models/{NAME}/tree/{REVISION}", Handler.tree),
]
