"""Answers kept on disk as soon as they are there, so that a killed command repeats none of them."""

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax.common.errors import UserError, cannot_write

Json = dict[str, Any]
# An item's id, and which of its turns, samples or choices.
Place = tuple[str, int]


class AnswerLog:
    """The model's texts and likelihoods by place, appended to a file as they come.

    The first line of the file says what made them; the log of a run that was killed goes on.
    """

    def __init__(self, path: Path | None, made_by: Json):
        """
        Args:
          path: None keeps nothing on disk.

        Raises:
          UserError: the file there was made by something else, or cannot be written.
        """
        self.found: dict[Place, Json] = {}
        self._file = None
        if path is None:
            return
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
            raise UserError(f"{path} is damaged ({error}); delete it to begin anew") from None

    def has(self, place: Place, prompt: Sequence[int]) -> bool:
        """Whether there is an answer to this very prompt: the data may have changed since."""
        return self.found.get(place, {}).get("prompt") == _key(prompt)

    def add(self, place: Place, prompt: Sequence[int], **record: Any) -> None:
        item, n = place
        line = {"id": item, "n": n, "prompt": _key(prompt), **record}
        self.found[place] = line
        if self._file:
            whole = json_line(line).encode()
            try:
                written = self._file.write(whole)  # unbuffered: there, or not
            except OSError:
                written = 0
            if written < len(whole):
                raise UserError(
                    f"cannot write {self._file.name}: is the disk full? The answers before are "
                    f"kept, and the same command goes on"
                )

    def close(self) -> None:
        if self._file:
            self._file.close()


def json_line(value: Json) -> str:
    """One line of JSON; half a surrogate pair, which UTF-8 cannot hold, is kept escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def _key(prompt: Sequence[int]) -> str:
    return f"{zlib.crc32(np.array(prompt, np.int32).tobytes()):08x}"


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file, without a last one that a kill left half-written."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.decode().split("\n")[:-1]  # a text may hold U+2028, which splitlines breaks at


def _check_same(path: Path, before: Json, now: Json) -> None:
    """Raises UserError naming what differs."""
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"{path} holds answers made otherwise ({'; '.join(changed)[:300]}); choose another "
            f"--out, or delete that file"
        )
