"""A small Hub on 127.0.0.1 for the real huggingface_hub client: model information, file tree, files."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from urllib.parse import unquote, urlparse

from tests.services.http_server import serving

_INFO = re.compile(r"/api/models/(?P<repo>[^/]+(/[^/]+)?)(/revision/(?P<revision>.+))?")
_TREE = re.compile(r"/api/models/(?P<repo>[^/]+(/[^/]+)?)/tree/(?P<revision>[^/]+)")
_FILE = re.compile(r"/(?P<repo>[^/]+(/[^/]+)?)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")


@dataclass
class Repository:
    """A model repository: the files of each commit, and the commit of each branch or tag."""

    commits: dict[str, dict[str, bytes]]
    branches: dict[str, str]
    gated: bool = False


@dataclass
class Hub:
    """State of the server: repositories, recorded requests, and failures to simulate."""

    endpoint: str = ""
    repositories: dict[str, Repository] = field(default_factory=dict)
    token: str | None = None
    fail_with: int | None = None
    fail_at: str = "/"
    requests: list[str] = field(default_factory=list)
    authorizations: set[str | None] = field(default_factory=set)

    def add(self, name: str, files: dict[str, bytes], *, branch: str = "main", gated: bool = False) -> str:
        """Commit `files` to a branch and return the commit."""
        repository = self.repositories.setdefault(name, Repository({}, {}))
        repository.gated = gated
        commit = hashlib.sha1(repr((branch, sorted(files.items()))).encode()).hexdigest()  # noqa: S324
        repository.commits[commit] = files
        repository.branches[branch] = commit
        return commit

    def downloaded(self) -> set[tuple[str, str]]:
        """Return (commit, path) of each file that was sent."""
        matches = (_FILE.fullmatch(line.removeprefix("GET ")) for line in self.requests)
        return {(match["revision"], match["path"]) for match in matches if match}


@contextmanager
def serve_hub() -> Iterator[Hub]:
    """Serve until the block ends, on a free port of 127.0.0.1."""
    hub = Hub()
    with serving(type("Handler", (_Handler,), {"hub": hub})) as hub.endpoint:
        yield hub


class _Handler(BaseHTTPRequestHandler):
    hub: Hub

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.hub.requests.append(f"{self.command} {path}")
        self.hub.authorizations.add(self.headers["Authorization"])
        if self.hub.fail_with is not None and path.startswith(self.hub.fail_at):
            return self._send(self.hub.fail_with, b"down for maintenance")
        match = _TREE.fullmatch(path) or _INFO.fullmatch(path) or _FILE.fullmatch(path)
        repository = self.hub.repositories.get(match["repo"]) if match else None
        if match is None or repository is None:
            return self._send(401, b'{"error":"Invalid username or password."}', code="RepoNotFound")
        revision = match["revision"] or "main"
        commit = repository.branches.get(revision, revision)
        files = repository.commits.get(commit)
        if files is None:
            return self._send(404, b'{"error":"Invalid rev id"}', code="RevisionNotFound")
        if match.re is _INFO:
            siblings = [{"rfilename": name} for name in files]
            return self._send_json({"id": match["repo"], "sha": commit, "siblings": siblings})
        if match.re is _TREE:
            return self._send_json([_entry(name, body) for name, body in files.items()])
        # As on the Hub, everyone can list a gated repository, but only some can read its files.
        if repository.gated and self.headers["Authorization"] != f"Bearer {self.hub.token}":
            return self._send(403, b'{"error":"Access to this model is restricted."}', code="GatedRepo")
        body = files.get(match["path"])
        if body is None:
            return self._send(404, b'{"error":"Entry not found"}', code="EntryNotFound")
        return self._send(200, body, commit=commit)

    def _send_json(self, value: object) -> None:
        self._send(200, json.dumps(value).encode(), content_type="application/json")

    def _send(
        self,
        status: int,
        body: bytes,
        *,
        code: str = "",
        commit: str = "",
        content_type: str = "application/octet-stream",
    ) -> None:
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.send_header("Content-Length", str(len(body)))
        if code:
            self.send_header("X-Error-Code", code)
        if commit:
            self.send_header("X-Repo-Commit", commit)
            self.send_header("ETag", f'"{_blob_id(body)}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _entry(name: str, body: bytes) -> dict[str, object]:
    return {"type": "file", "path": name, "size": len(body), "oid": _blob_id(body)}


def _blob_id(body: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(body) + body).hexdigest()  # noqa: S324 - git's own
