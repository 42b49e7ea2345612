"""A hub on loopback, and child processes that fetch from it with an empty cache."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

ROOT = Path(__file__).parents[2]
INHERITED = ("PATH", "LD_LIBRARY_PATH", "SYSTEMROOT", "TMPDIR", "VIRTUAL_ENV")


class Hub:
    """Repositories by name and revision, and what was requested of them.

    `repositories` maps "owner/name" to folders by revision; `failures` maps "owner/name" to an HTTP status or a body
    for every request, or to the name of a file that is cut off in the middle.
    """

    def __init__(self):
        self.repositories: dict[str, dict[str, Path]] = {}
        self.failures: dict[str, int | str | bytes] = {}
        self.tokens: dict[str, str] = {}
        """Tokens that repositories require, by "owner/name"."""
        self.fetched: list[str] = []
        """Files that were sent, as "owner/name/file"."""
        self.address = ""

    def commit(self, repository: str, revision: str) -> str | None:
        """Return the commit hash of a branch, tag or commit, None if there is none of that name."""
        for name in self.repositories[repository]:
            commit = hashlib.sha1(f"{repository}@{name}".encode()).hexdigest()
            if revision in (name, commit):
                return commit
        return None

    def folder(self, repository: str, revision: str) -> Path:
        revisions = self.repositories[repository]
        commit = self.commit(repository, revision)
        return next(folder for name, folder in revisions.items() if self.commit(repository, name) == commit)


class Handler(BaseHTTPRequestHandler):
    """Serve model information, trees and files as the hub does."""

    protocol_version = "HTTP/1.1"
    hub: Hub

    def do_HEAD(self):
        self.respond()

    def do_GET(self):
        self.respond()

    def respond(self):
        path = unquote(urlparse(self.path).path)
        if api := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+))?", path):
            repository, route, revision = api.groups()
        elif file := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            (repository, revision, name), route = file.groups(), "file"
        else:
            return self.send(404)
        failure = self.hub.failures.get(repository)
        if isinstance(failure, int):
            return self.send(failure)
        if isinstance(failure, bytes):
            return self.send(200, content=failure)
        token = self.hub.tokens.get(repository)
        if token and self.headers.get("Authorization") != f"Bearer {token}":
            return self.send(401)
        if repository not in self.hub.repositories:
            return self.send(404, {"X-Error-Code": "RepoNotFound"})
        commit = self.hub.commit(repository, revision or "main")
        if commit is None:
            return self.send(404, {"X-Error-Code": "RevisionNotFound"})
        folder = self.hub.folder(repository, commit)
        if route == "file":
            return self.send_file(repository, folder / name, commit, cut=name == failure)
        files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
        names = {path.relative_to(folder).as_posix(): path for path in files}
        if route == "tree":
            return self.send_json(
                [
                    {"type": "file", "path": name, "size": path.stat().st_size, "oid": etag(path)}
                    for name, path in names.items()
                ]
            )
        return self.send_json(
            {
                "id": repository,
                "modelId": repository,
                "sha": commit,
                "private": False,
                "tags": [],
                "downloads": 0,
                "likes": 0,
                "siblings": [{"rfilename": name} for name in names],
            }
        )

    def send_file(self, repository: str, path: Path, commit: str, cut: bool):
        if not path.is_file():
            return self.send(404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        content, first = path.read_bytes(), 0
        headers = {"ETag": f'"{etag(path)}"', "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
        if part := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")):
            first = int(part[1])
            headers["Content-Range"] = f"bytes {first}-{len(content) - 1}/{len(content)}"
        if cut and self.command == "GET":
            self.close_connection = True
            if first:  # nor do later attempts get anything
                return self.connection.close()
            return self.send(200, headers, content[: len(content) // 2], length=len(content))
        if self.command == "GET":
            self.hub.fetched.append(f"{repository}/{path.relative_to(self.hub.folder(repository, commit)).as_posix()}")
        return self.send(206 if first else 200, headers, content[first:])

    def send_json(self, value):
        self.send(200, {"Content-Type": "application/json"}, json.dumps(value).encode())

    def send(self, status, headers=(), content=b"", length=None):
        self.send_response(status)
        for name, value in dict(headers).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if length is None else length))
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def etag(path: Path) -> str:
    return hashlib.sha1(path.read_bytes()).hexdigest()


@contextmanager
def serve():
    """Yield a hub that is served until the end of the block."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("HubHandler", (Handler,), {"hub": hub}))
    hub.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def environment(address: str, home: Path, **variables: str) -> dict[str, str]:
    """Return the environment of a child process that reaches the hub at `address` and nothing else."""
    kept = {name: os.environ[name] for name in INHERITED if name in os.environ}
    return kept | {
        "PYTHONPATH": str(ROOT),
        "HOME": str(home),
        "HF_HOME": str(home / "huggingface"),
        "HF_ENDPOINT": address,
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
        "HF_HUB_ETAG_TIMEOUT": "2",
        "OMP_NUM_THREADS": "1",
        "NO_PROXY": "*",
        **variables,
    }


def run(*command: str, env: dict[str, str], cwd: Path) -> subprocess.CompletedProcess:
    """Run Python with these arguments."""
    return subprocess.run(
        [sys.executable, *command], env=env, cwd=cwd, capture_output=True, text=True, encoding="utf-8", timeout=120
    )
