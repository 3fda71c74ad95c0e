"""A Hugging Face hub on this machine: directories as repositories, for the real huggingface_hub."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit


class Hub(ThreadingHTTPServer):
    """Serves the branch main of each repository that is put into `repositories`.

    A commit is the digest of its files; every commit that was ever asked for stays.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Path] = {}
        self.commits: dict[str, dict[str, bytes]] = {}
        self.given: list[str] = []  # the files that were sent, in order
        self.lock = threading.Lock()

    def head(self, repository: str) -> str:
        """The newest commit of a repository."""
        folder = self.repositories[repository]
        files = {p.name: p.read_bytes() for p in sorted(folder.iterdir()) if p.is_file()}
        commit = hashlib.sha1(b"\0".join(n.encode() + b"\0" + files[n] for n in files)).hexdigest()
        self.commits[commit] = files
        return commit

    @property
    def weights_given(self) -> list[str]:
        return [name for name in self.given if name.endswith(".safetensors")]


class _Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        owner, name, what, revision, *file = [*(parts[2:] if api else parts), "", "", "", ""][:5]
        repository = f"{owner}/{name}"
        if repository not in self.server.repositories:
            return self._refuse(404, "RepoNotFound")
        head = self.server.head(repository)
        commit = head if revision == "main" else revision
        if commit not in self.server.commits:
            return self._refuse(404, "RevisionNotFound")
        files = self.server.commits[commit]
        if api and what == "revision":
            return self._json({"id": repository, "sha": commit, "siblings": []})
        if api and what == "tree":
            return self._json([_entry(path, content) for path, content in files.items()])
        if file[0] not in files:
            return self._refuse(404, "EntryNotFound")
        return self._file(file[0], files[file[0]], commit)

    def _file(self, name, content, commit):
        self.send_response(200)
        self.send_header("X-Repo-Commit", commit)
        self.send_header("ETag", f'"{_blob(content)}"')
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command == "GET":
            with self.server.lock:
                self.server.given.append(name)
            self.wfile.write(content)

    def _json(self, values):
        data = json.dumps(values).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _refuse(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()


def _blob(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": _blob(content)}


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A Hub that listens."""
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
