"""The objects below a URL of an object store, read and written through tensorstore.

tensorstore comes with orbax and speaks both gs:// and s3://. It finds the credentials by itself in
the environment, as the tools of the two clouds do. They are in no message of ours.
"""

import logging
import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from time import monotonic, sleep
from typing import TYPE_CHECKING, Any, TypeVar

from moi_jax.common.errors import Unreachable, UserError
from moi_jax.common.locations import location_text, url_parts
from moi_jax.common.retry import FIRST_PAUSE, LONGEST_PAUSE

if TYPE_CHECKING:
    from tensorstore import Future

T = TypeVar("T")

log = logging.getLogger(__name__)

# For how long a call is tried again while the store fails, where no config says it.
PATIENCE = 60.0  # seconds
TELL_EVERY = 60.0  # seconds
# A transfer without a byte for so long has failed, as one to a host that is gone. Seconds.
SILENCE = "15"
# Files that are sent or fetched at once; each is in memory as a whole.
AT_ONCE = 4
# What may pass by itself, as the status codes of tensorstore name it.
PASSING = ("UNAVAILABLE", "ABORTED", "DEADLINE_EXCEEDED", "INTERNAL", "UNKNOWN", "CANCELLED")


@dataclass(frozen=True)
class Version:
    """An object as it was read.

    Attributes:
      content: None where there is no such object.
      generation: of the content; the store writes only over the generation that it is given.
    """

    content: bytes | None
    generation: bytes


class Store:
    """The objects below a URL, by the rest of their names.

    Every call is tried again while the store fails in a way that may pass.

    Raises, every call of it:
      Unreachable: the store has failed for `patience`.
      UserError: the store refuses; the message says why.
    """

    def __init__(self, place: Path, patience: float = PATIENCE):
        """Opens what is below a URL.

        Args:
          place: see `locations`; nothing need be there.
          patience: seconds.
        """
        self.url = location_text(place)
        self._patience = patience
        try:
            self._objects = _open(place)
        except ValueError as error:
            raise UserError(f"{self.url} cannot be opened: {_short(error)}") from None
        self._told = -TELL_EVERY

    def version(self, name: str) -> Version:
        """An object with its generation."""
        read = self._call("read", name, lambda: self._objects.read(name))
        return Version(read.value if read.state == "value" else None, read.stamp.generation)

    def read(self, name: str) -> bytes | None:
        """The content of an object; None where there is none."""
        return self.version(name).content

    def write(self, name: str, content: bytes) -> None:
        """Writes an object as a whole, whatever was there."""
        self._call("write", name, lambda: self._objects.write(name, content))

    def write_over(self, before: Version, name: str, content: bytes) -> Version | None:
        """Writes an object if the one of this name is still `before`; else returns None."""
        expected = before.generation
        stamp = self._call(
            "write", name, lambda: self._objects.write(name, content, if_equal=expected)
        )
        return Version(content, stamp.generation) if stamp.generation else None

    def names(self, below: str = "") -> list[str]:
        """The names of all objects that begin with `below`, in order.

        Without those that end with "/", which other tools write in the place of empty folders.
        """
        listed = self._call("list", below, lambda: self._objects.list(_range(below)))
        return sorted(name.decode() for name in listed if not name.endswith(b"/"))

    def delete(self, name: str) -> None:
        """Deletes an object, if it is there."""
        self._call("delete", name, lambda: self._objects.write(name, None))

    def delete_below(self, below: str) -> None:
        """Deletes all objects whose names begin with `below`."""
        self._call("delete", below, lambda: self._objects.delete_range(_range(below)))

    def send(self, files: Iterable[tuple[str, Path]]) -> None:
        """Writes (name, local file) pairs, some at once.

        Raises:
          OSError: a file cannot be read.
        """
        self._at_once(lambda pair: self.write(pair[0], pair[1].read_bytes()), files)

    def fetch(self, files: Iterable[tuple[str, Path]]) -> None:
        """Reads objects into (name, local file) pairs, some at once; their folders are made.

        Raises:
          FileNotFoundError: there is no such object.
          OSError: a file cannot be written.
        """
        self._at_once(lambda pair: self._fetch(*pair), files)

    def _fetch(self, name: str, file: Path) -> None:
        content = self.read(name)
        if content is None:
            raise FileNotFoundError(f"{name} is missing")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content)

    @staticmethod
    def _at_once(work: Callable[[Any], None], items: Iterable[Any]) -> None:
        with ThreadPoolExecutor(AT_ONCE) as threads:
            futures = [threads.submit(work, item) for item in items]
            try:
                for future in futures:
                    future.result()
            finally:
                threads.shutdown(cancel_futures=True)

    def _call(self, verb: str, name: str, start: "Callable[[], Future[T]]") -> T:
        """The result of a call of tensorstore, which raises ValueError for whatever fails."""
        deadline, pause = monotonic() + self._patience, FIRST_PAUSE
        place = f"{self.url}/{name}".rstrip("/")
        while True:
            try:
                return start().result()
            except ValueError as error:
                code, _, what = _short(error).partition(": ")
            if code not in PASSING:
                raise UserError(f"cannot {verb} {place}: {what or code}; {_way_out(code)}")
            if monotonic() + pause > deadline:
                raise Unreachable(
                    f"cannot {verb} {place}: {what}; give the same command again when the store "
                    f"works"
                )
            self._tell(f"cannot {verb} {place}: {what}; trying again for {self._patience:.0f} s")
            sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)

    def _tell(self, line: str) -> None:
        if monotonic() - self._told >= TELL_EVERY:
            self._told = monotonic()
            log.warning(line)


def _short(error: ValueError) -> str:
    """The code of an error of tensorstore and its reason, without its tries and what it quotes."""
    text = re.sub(r"All \d+ retry attempts failed: ", "", str(error).partition(" [")[0])
    return " ".join(text.split())[:200]


def _way_out(code: str) -> str:
    if code == "NOT_FOUND":
        return "make the bucket, or name another"
    return "check the credentials in the environment and what they are allowed to do"


def _range(below: str) -> Any:
    import tensorstore as ts

    # All names that begin with `below` are before those that begin with its successor.
    return ts.KvStore.KeyRange(below, below[:-1] + chr(ord(below[-1]) + 1) if below else "")


def _open(place: Path) -> Any:
    """The key-value store of tensorstore below a URL."""
    # Read by tensorstore when it makes its first connection.
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_TIME_SECONDS", SILENCE)
    os.environ.setdefault("TENSORSTORE_CURL_LOW_SPEED_LIMIT_BYTES", "1")
    import tensorstore as ts

    scheme, bucket, path = url_parts(place)
    # Few: the pauses between the tries, and telling of them, are ours.
    retries = {"max_retries": 1, "initial_delay": "100ms", "max_delay": "1s"}
    spec: dict[str, Any] = {"bucket": bucket, "path": f"{path}/" if path else ""}
    if scheme == "gs":
        spec |= {"driver": "gcs", "context": {"gcs_request_retries": retries}}
    else:
        spec |= {"driver": "s3", "context": {"s3_request_retries": retries}, **_s3_options()}
    return ts.KvStore.open(spec).result()


def _s3_options() -> dict[str, Any]:
    """What the environment variables of AWS's own tools say and tensorstore does not read."""
    environment = os.environ
    options: dict[str, Any] = {}
    if endpoint := environment.get("AWS_ENDPOINT_URL_S3") or environment.get("AWS_ENDPOINT_URL"):
        options["endpoint"] = endpoint
    if region := environment.get("AWS_REGION") or environment.get("AWS_DEFAULT_REGION"):
        options["aws_region"] = region
    if "AWS_ACCESS_KEY_ID" in environment:
        # Else tensorstore looks into files first, and writes to standard error that there are none.
        options["aws_credentials"] = {"type": "environment"}
    return options
