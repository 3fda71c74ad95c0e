"""A file of tools: a JSON list, or a JSON object a line."""

import json
from pathlib import Path
from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.data.sources.tools import openai_form
from moi_jax.text.conversations import BadRow


def read_tools(path: Path) -> tuple[str, ...]:
    """The tools of a file, as `Conversation.tools` has them.

    Args:
      path: tools in OpenAI's form, or their functions alone, as a JSON list or one a line.

    Raises:
      UserError: there is no such file, it has no tools, or one of them is malformed.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the tools in {path}: {error}") from None
    try:
        tools = tuple(map(openai_form, _entries(text)))
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is neither a JSON list of tools nor a JSON object a line: {error}"
        ) from None
    except BadRow as bad:
        raise UserError(f"{path}: {bad.detail} ({bad.reason})") from None
    if not tools:
        raise UserError(f"{path} has no tools")
    return tools


def _entries(text: str) -> list[Any]:
    try:
        whole = json.loads(text)
    except json.JSONDecodeError:
        return [json.loads(line) for line in text.splitlines() if line.strip()]
    return whole if isinstance(whole, list) else [whole]
