"""audit.json: what an audit found, closed by a digest of its own content."""

import hashlib
import json
from pathlib import Path
from typing import Any

from moi_jax.common.atomic_files import atomic_write_text
from moi_jax.common.errors import UserError

SIGNED = "signed-off"


def sign(content: dict[str, Any]) -> dict[str, Any]:
    """The content with the digest of its canonical form."""
    return {**content, SIGNED: _digest(content)}


def write_signed(path: Path, signed: dict[str, Any]) -> None:
    """Writes it as JSON that people can read; layout is no part of what is signed."""
    atomic_write_text(path, json.dumps(signed, indent=1, ensure_ascii=False) + "\n")


def check_signed(path: Path) -> dict[str, Any] | None:
    """The content of an audit.json as it was written; None if it has changed since.

    Raises:
      UserError: the file cannot be read or is no audit.json.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        digest = content.pop(SIGNED)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; name an audit.json") from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{path} is no audit.json; name the file that an audit wrote") from None
    return content if digest == _digest(content) else None


def _digest(content: dict[str, Any]) -> str:
    """sha256 hex of the JSON with sorted keys and no spaces."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()
