"""T-Eval with tools in the model's own form: as its chat template lists them and writes calls.

A record whose answer is one call then has no text that describes APIs and a form of answers. Its
APIs are the tools of the prompt, earlier calls and results are those of the template, and the call
that the model writes is scored as if it were written in the form that the record asks for.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.data.sources.tools import openai_form
from moi_jax.evaluation.teval.parsing import load_lenient
from moi_jax.evaluation.teval.plan import FINISH
from moi_jax.evaluation.teval.scoring import Variant
from moi_jax.text.conversations import BadRow, Message, ToolCall

Json = dict[str, Any]

DOCUMENTED = "api_descrip.json"
CALLING = ("instruct", "reason_retrieve_understand")  # their answer is one call
# How the documentation names the types of JSON Schema, where not by their own names.
TYPES = {"list": "array", "dict": "object", "float": "number", "int": "integer", "bool": "boolean"}
SCHEMA_TYPES = ("string", "number", "integer", "boolean", "array", "object")


def documented_tools(directory: Path) -> dict[str, str]:
    """The tools of T-Eval's documentation: name, such as "Bnb.search" -> OpenAI's form.

    Raises:
      UserError: the file is missing or malformed.
    """
    path = directory / DOCUMENTED
    try:
        groups = json.loads(path.read_text(encoding="utf-8"))
        named = {f"{g['name']}.{api['name']}": api for g in groups for api in g["api_list"]}
        return {name: openai_form(_function(name, api)) for name, api in named.items()}
    except OSError as error:
        raise UserError(
            f"native tools need T-Eval's documentation of its APIs in {path} ({error.strerror}); "
            f"put docs/api_descrip.json of its repository there, or use --teval-tools published"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, BadRow) as error:
        raise UserError(f"{path} is no documentation of T-Eval's APIs: {error!r:.100}") from None


def _function(name: str, api: Json) -> Json:
    required, optional = (api.get(f"{kind}_parameters") or [] for kind in ("required", "optional"))
    properties = {entry["name"]: _schema(entry) for entry in [*required, *optional]}
    return {
        "name": name,
        "description": api.get("description") or "",
        "parameters": {
            "type": "object",
            "properties": properties,
            "required": [entry["name"] for entry in required],
        },
    }


def _schema(entry: Json) -> Json:
    kind = str(entry.get("type") or "").lower()
    kind = TYPES.get(kind, kind)
    known = {"type": kind} if kind in SCHEMA_TYPES else {}
    return {**known, "description": entry.get("description") or ""}


def native_chat(
    turns: Sequence[tuple[str, str]], tools: Mapping[str, str]
) -> tuple[tuple[Message, ...], tuple[str, ...]]:
    """The conversation of a record in native form, and the tools that it offers.

    Args:
      turns: role and content. The system text at the head is left out; what it names is offered.
      tools: documented, by name.

    Raises:
      ValueError: the system text names no documented API, or the model has no turn to answer.
    """
    system = "\n".join(content for role, content in turns[:1] if role == "system")
    named = set(re.findall(r"\w+\.\w+", system)) & tools.keys()
    if not named:
        raise ValueError(f"its system text names no API of {DOCUMENTED}")
    messages: list[Message] = []
    for role, content in turns[1:]:
        if role == "assistant":
            messages.append(_assistant(content))
        elif messages and messages[-1].calls:
            called = messages[-1].calls[0].name
            messages.append(Message("tool", content.removeprefix("response:").strip(), name=called))
        elif role == "user":
            messages.append(Message("user", content))
        else:
            raise ValueError(f"a {role} turn follows no call")
    if not messages or messages[-1].role == "assistant":
        raise ValueError("origin_prompt must end with a turn that the model can answer")
    return tuple(messages), tuple(tools[name] for name in sorted(named))


def _assistant(content: str) -> Message:
    """An earlier answer: a call in the published form, the final answer, or any other text."""
    answer = load_lenient(content, "{", "}")
    if not isinstance(answer, dict) or not isinstance(answer.get("name"), str):
        return Message("assistant", content)
    thought, args = str(answer.get("thought", "")), answer.get("args")
    if answer["name"] == FINISH:
        return Message("assistant", str(args or thought))
    arguments = json.dumps(args if isinstance(args, dict) else {}, ensure_ascii=False)
    return Message("assistant", thought, calls=(ToolCall(answer["name"], arguments),))


def in_published_form(answer: Message, variant: Variant, gold: Json) -> str:
    """The first call of an answer as the text that the record asks for, for `score_answer`.

    An answer without a call is a final one, which instruct has no form for.
    """
    thought = "\n".join(part for part in (answer.thinking, answer.content.strip()) if part)
    name, args = FINISH, answer.content.strip() or answer.thinking
    if answer.calls:
        name, args = answer.calls[0].name, json.loads(answer.calls[0].arguments)
    if variant.tasks != "instruct":
        return json.dumps({"thought": thought, "name": name, "args": args}, ensure_ascii=False)
    if not answer.calls:
        return ""
    template = gold["template"]
    if variant.form == "json":
        parts = {"thought": thought, "action": name, "args": args}
        return json.dumps({template[key]: part for key, part in parts.items()}, ensure_ascii=False)
    written = {"thought": "", "action": name, "args": repr(args)}
    return "".join(
        f"{template[f'{key}_start']}{part}{template[f'{key}_end']}" for key, part in written.items()
    )
