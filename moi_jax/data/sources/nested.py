"""Nested rows: extracts plain rows from ToolBench answers, OASST trees and seed tasks."""

import math
from collections.abc import Mapping
from typing import Any

from moi_jax.data.sources.readers import decode
from moi_jax.text.conversations import BadRow

JsonObject = Mapping[str, Any]


def _object(value: Any, what: str) -> JsonObject:
    if not isinstance(value, dict):
        raise BadRow("missing_field", f"{what} is not an object")
    return value


def _objects(row: JsonObject, key: str) -> list[JsonObject]:
    value = row.get(key)
    if not isinstance(value, list):
        raise BadRow("missing_field", f"no list {key!r}")
    return [_object(entry, f"an entry of {key!r}") for entry in value]


def toolbench(row: JsonObject) -> JsonObject:
    """The chat of a ToolBench row: the last, which is the longest, of its growing prefixes.

    The system text describes ToolBench's own protocol and is left out. The call of Finish becomes
    the answer that it passes on.
    """
    answer = _object(row.get("answer_generation"), "'answer_generation'")
    prefixes = answer.get("train_messages")
    if not isinstance(prefixes, list) or not prefixes or not isinstance(prefixes[-1], list):
        raise BadRow("missing_field", "no list 'train_messages' of chats")
    turns = [_object(turn, "a turn") for turn in prefixes[-1]]
    turns = [_toolbench_turn(turn) for turn in turns if turn.get("role") != "system"]
    functions = answer.get("function") or []
    if isinstance(functions, list):
        names = [f.get("name") if isinstance(f, dict) else None for f in functions]
        functions = [f for f, name in zip(functions, names, strict=True) if name != "Finish"]
    return {"messages": turns, "functions": functions}


def _toolbench_turn(turn: JsonObject) -> JsonObject:
    content, call = turn.get("content"), turn.get("function_call")
    if turn.get("role") == "user" and isinstance(content, str):
        return {**turn, "content": content.strip().removesuffix("Begin!").strip()}
    if not isinstance(call, dict) or call.get("name") != "Finish":
        return turn
    text = call.get("arguments")
    arguments = decode(text) if isinstance(text, str) else text
    if not isinstance(arguments, dict) or arguments.get("return_type") != "give_answer":
        raise BadRow("gave_up", "the trajectory ends without an answer")
    return {
        "role": "assistant",
        "reasoning_content": content,
        "content": arguments.get("final_answer"),
    }


def oasst(row: JsonObject) -> JsonObject:
    """The path through a tree that takes the best reply to each message.

    The best reply has the smallest rank. Replies without a rank come last; ties keep file order.
    """
    turns, node = [], _object(row.get("prompt"), "'prompt'")
    while node:
        role = node.get("role")
        turns.append({"role": "user" if role == "prompter" else role, "content": node.get("text")})
        replies = _objects(node, "replies") if node.get("replies") else []
        replies = [reply for reply in replies if not reply.get("deleted")]
        node = min(replies, key=_rank, default={})
    return {"messages": turns}


def _rank(reply: JsonObject) -> float:
    rank = reply.get("rank")
    if isinstance(rank, int | float) and not math.isnan(rank):  # pandas writes no rank as NaN
        return rank
    return float("inf")


def self_instruct(row: JsonObject) -> JsonObject:
    """The task with its first instance."""
    instances = _objects(row, "instances")
    if not instances:
        raise BadRow("missing_field", "the task has no instance")
    first = instances[0]
    return {
        "instruction": row.get("instruction"),
        "input": first.get("input"),
        "output": first.get("output"),
    }
