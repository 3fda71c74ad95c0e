"""Responses of a model, saved to disk one by one, so that a killed command repeats none of them."""

import json
import zlib
from collections.abc import Sequence
from functools import partial
from operator import getitem
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from moi_jax.common.errors import UserError, cannot_write
from moi_jax.parallel import hosts

Json = dict[str, Any]
# An item's id, and the number of its turn, sample or choice.
ResponseKey = tuple[str, int]
# Responses in one message to the other processes, which should stay below some megabytes.
SHARED_AT_ONCE = 1000


class ResponseLog:
    """Texts and likelihoods by their keys, each appended to a file as soon as it is there.

    The first line of the file says which settings made them. A later run with the same settings
    continues the file.

    All processes of a run keep the same responses; process 0 alone reads and writes the file.

    Attributes:
      found: the responses so far.
    """

    def __init__(self, path: Path | None, made_by: Json):
        """
        Args:
          path: the file; None saves nothing.
          made_by: all settings that the responses depend on.

        Raises:
          UserError: the file was made with other settings, is damaged, or cannot be written.
        """
        self.found: dict[ResponseKey, Json] = {}
        self._file: BinaryIO | None = None
        if path is None:
            return
        if hosts.is_main():
            self._open(path, made_by)
        self._share_found()

    def _open(self, path: Path, made_by: Json) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = _whole_lines(path)
            if lines:
                _check_same(path, json.loads(lines[0]), made_by)
            else:
                path.write_text(json_line(made_by), encoding="utf-8")
            for line in lines[1:]:
                record = json.loads(line)
                self.found[record["id"], record["n"]] = record
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise cannot_write(path, error) from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it to start again") from None

    def _share_found(self) -> None:
        """Gives the responses that process 0 found to the other processes."""
        records = list(self.found.values())
        count = hosts.from_main("the number of answers", lambda: len(records))
        for first in range(0, count, SHARED_AT_ONCE):
            part = slice(first, first + SHARED_AT_ONCE)
            for record in hosts.from_main("the answers so far", partial(getitem, records, part)):
                self.found[record["id"], record["n"]] = record

    def has(self, key: ResponseKey, prompt: Sequence[int]) -> bool:
        """Whether there is a response to this very prompt: the data may have changed since."""
        return self.found.get(key, {}).get("prompt") == _checksum(prompt)

    def add(self, key: ResponseKey, prompt: Sequence[int], **record: Any) -> None:
        """Saves a response.

        Raises:
          UserError: it cannot be written.
        """
        item, n = key
        line = {"id": item, "n": n, "prompt": _checksum(prompt), **record}
        self.found[key] = line
        if self._file:
            whole = json_line(line).encode()
            try:
                written = self._file.write(whole)  # unbuffered: it is on disk, or not
            except OSError:
                written = 0
            if written < len(whole):
                raise UserError(
                    f"cannot write {self._file.name}: is the disk full? The earlier answers are "
                    f"saved, and the same command continues from them"
                )

    def close(self) -> None:
        if self._file:
            self._file.close()


def json_line(value: Json) -> str:
    """One line of JSON; half a surrogate pair, which UTF-8 cannot hold, stays escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def _checksum(prompt: Sequence[int]) -> str:
    return f"{zlib.crc32(np.array(prompt, np.int32).tobytes()):08x}"


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file; a last line that a kill left half-written is cut off."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.decode().split("\n")[:-1]  # not splitlines, which also breaks at U+2028


def _check_same(path: Path, before: Json, now: Json) -> None:
    """Raises UserError, which names the settings that differ."""
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"{path} holds answers made with other settings ({'; '.join(changed)[:300]}); choose "
            f"another --out, or delete that file"
        )
