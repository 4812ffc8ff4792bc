"""A small double of the Hugging Face hub on loopback, with switches for what may go wrong."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

REPO = "someone/their-paligemma"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
LARGE = 100_000  # bytes from which a file lies in git LFS


@dataclass
class Hub:
    """One repository, how the hub answers for it, and what it was asked.

    gate : a status, 401 or 403, with which files are refused
    error : the X-Error-Code that goes with it; None sends none
    break_after : bytes of a large file's body after which the connection is closed
    breaks : how many times that happens
    stall_after : bytes after which nothing comes any more, once
    damage : the name of a file that comes with a byte changed
    more : the name of a file that comes with more bytes than were promised
    redirect : where every request for a file is sent on to
    asked : of each request its path and its Range
    """

    files: dict[str, bytes]
    repo: str = REPO
    revisions: dict[str, str] = field(default_factory=lambda: {"main": COMMIT})
    gate: int | None = None
    error: str | None = "GatedRepo"
    token: str | None = None
    break_after: int | None = None
    breaks: int = 0
    stall_after: int | None = None
    damage: str | None = None
    more: str | None = None
    redirect: str | None = None
    asked: list[tuple[str, str | None]] = field(default_factory=list)
    stalled: threading.Event = field(default_factory=threading.Event)
    done: threading.Event = field(default_factory=threading.Event)
    address: str = ""

    def ranges(self, name: str) -> list[str | None]:
        """The Range of every request for a file."""
        return [given for path, given in self.asked if path.endswith(f"/{name}")]


def digest(content: bytes) -> str:
    """What the hub names a file by: its SHA-256 in LFS, git's id otherwise."""
    if len(content) >= LARGE:
        return hashlib.sha256(content).hexdigest()
    return git_id(content)


def git_id(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def info(hub: Hub, commit: str) -> dict[str, Any]:
    """What the hub says of a model."""
    siblings = []
    for name, content in hub.files.items():
        entry: dict[str, Any] = {
            "rfilename": name,
            "size": len(content),
            "blobId": git_id(content),
        }
        if len(content) >= LARGE:
            large = {"sha256": digest(content), "size": len(content), "pointerSize": 130}
            entry["lfs"] = large
        siblings.append(entry)
    return {
        "_id": "0",
        "id": hub.repo,
        "modelId": hub.repo,
        "sha": commit,
        "private": False,
        "gated": "auto" if hub.gate else False,
        "disabled": False,
        "downloads": 0,
        "likes": 0,
        "tags": [],
        "siblings": siblings,
    }


class Handler(BaseHTTPRequestHandler):
    """Answers of the hub: what there is, and files in parts."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        """Say nothing."""

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.hub.asked.append((path, self.headers.get("Range")))
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/revision/(.+)", path):
            self._tell(found[1], found[2])
        elif found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._give(found[1], found[2], found[3])
        else:
            self._refuse(404, "EntryNotFound")

    def _tell(self, repo: str, revision: str) -> None:
        if (commit := self._commit(repo, revision)) is not None:
            content = json.dumps(info(self.hub, commit)).encode()
            self._send(200, content, {"Content-Type": "application/json"})

    def _give(self, repo: str, revision: str, name: str) -> None:
        hub = self.hub
        if (commit := self._commit(repo, revision)) is None:
            return
        if hub.gate and (hub.token is None or self._token() != hub.token):
            self._refuse(hub.gate, hub.error)
            return
        if hub.redirect:
            self._send(302, b"", {"Location": hub.redirect})
            return
        if name not in hub.files:
            self._refuse(404, "EntryNotFound")
            return
        content = hub.files[name]
        named = digest(content)
        if hub.damage == name:
            content = content[:-1] + bytes([content[-1] ^ 1])
        if hub.more == name:
            content += bytes(2**20)
        headers = {"ETag": f'"{named}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        status, start = 200, 0
        if found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range") or ""):
            status, start = 206, int(found[1])
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        self._send(status, content[start:], headers)

    def _commit(self, repo: str, revision: str) -> str | None:
        """The commit of a revision; None where the answer was that there is none."""
        if repo != self.hub.repo:
            # As the hub does: who is not logged in is not told what there is.
            self._refuse(404 if self._token() else 401, "RepoNotFound" if self._token() else None)
            return None
        known = self.hub.revisions | {commit: commit for commit in self.hub.revisions.values()}
        if revision not in known:
            self._refuse(404, "RevisionNotFound")
        return known.get(revision)

    def _token(self) -> str | None:
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None

    def _refuse(self, status: int, code: str | None) -> None:
        self._send(status, b"{}", {"X-Error-Code": code} if code else {})

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        hub = self.hub
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(body))}).items():
            self.send_header(key, value)
        self.end_headers()
        if len(body) >= LARGE and hub.stall_after is not None:
            self.wfile.write(body[: hub.stall_after])
            self.wfile.flush()
            hub.stall_after = None
            hub.stalled.set()
            hub.done.wait(60)
            self.close_connection = True
        elif len(body) >= LARGE and hub.break_after is not None and hub.breaks > 0:
            hub.breaks -= 1
            self.wfile.write(body[: hub.break_after])
            self.close_connection = True
        else:
            self.wfile.write(body)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """Run the double on a free port of loopback."""
    handler = type("Bound", (Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    hub.address = f"http://127.0.0.1:{server.server_port}"
    try:
        yield hub
    finally:
        hub.done.set()
        server.shutdown()
        server.server_close()
        thread.join()
