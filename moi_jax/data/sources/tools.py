"""Tools: the descriptions of the tools that a row lists under `tools` or `functions`.

[{"type": "function", "function": {"name": "weather", "parameters": {...}}}]    OpenAI's form
[{"name": "weather", "parameters": {...}}]                                      bare functions
"""

import json
from collections.abc import Mapping
from functools import lru_cache
from reprlib import repr as shown  # a schema may be of any size
from typing import Any

from moi_jax.data.sources.readers import decode
from moi_jax.text.conversations import BadRow, Conversation

NULL_MATTERS = {"const", "default"}  # keys of a schema whose value may be null
TYPES = {"string", "number", "integer", "boolean", "array", "null"}  # of JSON Schema, but object


def compact(value: Any, reason: str) -> str:
    """The value as JSON on one line; raises BadRow(reason) if it has no JSON form."""
    try:
        return json.dumps(value, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(reason, str(error)) from None


def listed_tools(row: Mapping[str, Any]) -> list[Any]:
    """The entries of the row's `tools` and `functions`: each is a list, or the JSON text of one.

    Raises:
      BadRow: they are not a list.
    """
    entries = []
    for key in ("tools", "functions"):
        value = row.get(key)
        if isinstance(value, str):
            value = decode(value, "bad_tools") if value.strip() else None
        if value is None:
            continue
        if not isinstance(value, list):
            raise BadRow("bad_tools", f"{key!r} is {type(value).__name__}")
        entries += value
    return entries


def named_function(entry: Any, reason: str) -> tuple[str, Mapping[str, Any]]:
    """(name, object) of a tool or call, which may be nested below "function".

    Raises:
      BadRow: it has no valid name (`reason`).
    """
    function = entry.get("function", entry) if isinstance(entry, dict) else None
    if not isinstance(function, dict):
        raise BadRow(reason, f"an entry is a {type(entry).__name__}, not a function")
    name = function.get("name")
    if not isinstance(name, str) or not name.strip() or "\n" in name:
        raise BadRow(reason, "a function has no name on one line")
    return name.strip(), function


def description_of(name: str, function: Mapping[str, Any]) -> str:
    """What a tool says of itself, "" if it says nothing.

    Raises:
      BadRow: it is no text.
    """
    description = function.get("description")
    if not isinstance(description, str | None):
        raise BadRow("bad_tools", f"the description of {name} is {type(description).__name__}")
    return (description or "").strip()


def openai_form(entry: Any) -> str:
    """A tool as JSON on one line, as OpenAI's interface has it; keys keep their order.

    Raises:
      BadRow: the tool has no name, or its parameters are no JSON schema of an object.
    """
    name, function = named_function(entry, "bad_tools")
    description_of(name, function)
    kept = entry if "function" in entry else {}
    whole = {"type": "function", **kept, "function": {**function, "name": name}}
    if (parameters := _filled_in_left_out(function.get("parameters"))) is not None:
        _check_parameters(name, parameters)
        whole["function"]["parameters"] = parameters
    return compact(whole, "bad_tools")


def _filled_in_left_out(value: Any) -> Any:
    """A schema without keys that are null: a table adds those that other rows have."""
    if isinstance(value, list):
        return [_filled_in_left_out(part) for part in value]
    if not isinstance(value, dict):
        return value
    return {
        key: _filled_in_left_out(part)
        for key, part in value.items()
        if part is not None or key in NULL_MATTERS
    }


def _check_parameters(name: str, schema: Any) -> None:
    """Refuses what no reader of JSON Schema can take for the schema of an object.

    Names of types that JSON Schema does not know, such as Python's dict, are common in public sets
    and let pass. No template reads them.
    """
    if not isinstance(schema, dict):
        raise BadRow("bad_tools", f"the parameters of {name} are a {type(schema).__name__}")
    kind, required = schema.get("type") or "object", schema.get("required") or []
    if not isinstance(kind, str) or kind in TYPES:
        raise BadRow("bad_tools", f"the parameters of {name} are of type {shown(kind)}, not object")
    if not isinstance(required, list) or not all(isinstance(key, str) for key in required):
        raise BadRow("bad_tools", f"'required' of {name} is no list of names: {shown(required)}")
    _check_properties(name, schema)


def _check_properties(name: str, schema: Mapping[str, Any]) -> None:
    """Checks the properties, and those below them."""
    schemas = [schema]
    while schemas:
        found = schemas.pop().get("properties") or {}
        if not isinstance(found, dict):
            raise BadRow("bad_tools", f"'properties' of {name} is a {type(found).__name__}")
        for key, value in found.items():
            if not isinstance(value, dict | bool):  # a schema may be true or false
                raise BadRow("bad_tools", f"the parameter {shown(key)} of {name} has no schema")
            schemas += [value] if isinstance(value, dict) else []


def unlisted(conversation: Conversation) -> str:
    """What is called though the row does not list it, in words; "" if there is nothing."""
    calls = [call.name for message in conversation.messages for call in message.calls]
    listed = {_name(tool) for tool in conversation.tools} if calls else set()
    unknown = next((name for name in calls if name not in listed), None)
    return f"calls {shown(unknown)}, which is not among its tools" if unknown else ""


@lru_cache(maxsize=10_000)  # many rows list the same tools
def _name(tool: str) -> str:
    return json.loads(tool)["function"]["name"]
