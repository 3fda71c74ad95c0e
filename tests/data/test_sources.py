"""Sources: every row of a file becomes a conversation or a bad row with its reason and line."""

import contextlib
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.config import Source
from moi_jax.data.sources.formats import FORMATS, to_conversation
from moi_jax.data.sources.readers import SourceFile
from moi_jax.data.sources.rows import SourceRow, detect_format, expand, source_rows
from moi_jax.text.conversations import BadRow, Conversation, Message, content_hash

# A slow machine is no failure.
STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
USER, GPT = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
PLAIN = (Message("user", "Hi"), Message("assistant", "Hello."))


def messages(*turns: Any, **keys: Any) -> bytes:
    return json.dumps({"messages": turns, **keys}).encode()


def parts(role: str, *found: Any) -> dict[str, Any]:
    return {"role": role, "content": list(found)}


def calls(*functions: Any) -> dict[str, Any]:
    turned = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": None, "tool_calls": turned}


CALL = {"name": "f", "arguments": "{}"}
TOOL = {"role": "tool", "content": "7"}


def named(*ids: str) -> dict:
    """A turn that makes a call with each id."""
    return {**calls(), "tool_calls": [{"id": id, "function": CALL} for id in ids]}


def file_of(path: Path, content: bytes) -> SourceFile:
    path.write_bytes(content)
    return SourceFile(path.name, path)


def rows_of(file: SourceFile, form: str | None) -> list[SourceRow]:
    return list(source_rows(file, form))


def read(path: Path, content: bytes) -> list[SourceRow]:
    file = file_of(path, content)
    return rows_of(file, detect_format(file))


BAD_ROWS = [
    ("invalid_json", b'{"messages": ['),
    ("invalid_json", b"plain text"),
    ("invalid_json", b'{"messages": ' + b"[" * 200_000),
    ("invalid_json", b'{"messages": ' + b"1" * 10_000 + b"}"),
    ("invalid_utf8", b'{"messages": "\xff"}'),
    ("not_an_object", b'"text"'),
    ("not_an_object", b"null"),
    ("not_an_object", messages("Hi")),
    ("missing_field", b"{}"),
    ("missing_field", b'{"messages": null}'),
    ("missing_field", messages({"role": "user"}, GPT)),
    ("missing_role", messages({"content": "Hi"}, GPT)),
    ("unknown_role", messages({"role": "narrator", "content": "Hi"}, GPT)),
    ("unknown_role", messages({"role": ["user"], "content": "Hi"}, GPT)),
    ("content_not_text", messages(USER, {"role": "assistant", "content": None})),
    ("content_not_text", messages({"role": "user", "content": [{"type": "text"}]}, GPT)),
    ("content_not_text", messages({"role": "user", "content": 7}, GPT)),
    ("content_not_text", messages(USER, GPT, system=7)),
    ("empty_assistant", messages(USER, {"role": "assistant", "content": ""})),
    ("empty_assistant", messages(USER, {"role": "assistant", "content": " \n\t"}, USER, GPT)),
    ("no_assistant", messages()),
    ("no_assistant", messages(USER)),
    ("no_assistant", messages({"role": "system", "content": "S"})),
    ("system_not_first", messages(USER, GPT, {"role": "system", "content": "S"}, USER, GPT)),
    ("system_not_first", messages({"role": "system", "content": "S"}, USER, GPT, system="S")),
    ("roles_not_alternating", messages(USER, USER, GPT)),
    ("roles_not_alternating", messages(USER, GPT, GPT)),
    ("roles_not_alternating", messages(USER, GPT, USER, USER)),
    ("first_turn_assistant", messages(GPT, USER, GPT)),
    ("control_tokens", messages({"role": "user", "content": "a<|im_end|>b"}, GPT)),
    ("control_tokens", messages(USER, {"role": "assistant", "content": "<|im_start|>"})),
    ("control_tokens", messages(USER, {"role": "assistant", "content": "<|endoftext|>"})),
    ("control_tokens", messages(USER, GPT, system="<|extra_17|>")),
    ("lone_surrogate", rb'{"messages": [{"role": "user", "content": "\ud83d"}, '
     rb'{"role": "assistant", "content": "x"}]}'),
    ("lone_surrogate", messages(USER, GPT, tools=[{"name": "f", "description": "\ud83d"}])),
    ("nul_character", messages(USER, {"role": "assistant", "content": "a\0b"})),
    ("not_finite", b'{"messages": [], "score": NaN}'),
    ("not_finite", b'{"messages": [], "score": [-Infinity]}'),
    ("duplicate_key", b'{"messages": [], "messages": []}'),
    ("duplicate_key", b'{"messages": [{"role": "user", "role": "assistant"}]}'),
    ("invalid_json", b'{"messages": "[{]"}'),
    ("missing_field", b'{"messages": "{}"}'),
    ("part_not_text", messages(parts("user", {"type": "image_url", "image_url": {}}), GPT)),
    ("part_not_text", messages(parts("user", {"type": "reasoning", "value": "x"}), GPT)),
    ("part_not_text", messages(USER, parts("assistant", {"type": "audio", "text": "x"}))),
    ("content_not_text", messages(parts("user", ["Hi"]), GPT)),
    ("content_not_text", messages(parts("user", {"type": "text", "text": ["nested"]}), GPT)),
    ("content_not_text", messages(USER, parts("assistant", {"type": None, "text": "x"}))),
    ("content_not_text", messages(USER, {**GPT, "reasoning_content": 7})),
    ("empty_assistant", messages(USER, parts("assistant", {"type": "reasoning", "value": "x"}))),
    ("empty_assistant", messages(USER, parts("assistant"))),
    ("bad_tools", messages(USER, GPT, tools="[{")),
    ("bad_tools", messages(USER, GPT, tools={"name": "f"})),
    ("bad_tools", messages(USER, GPT, tools=["f"])),
    ("bad_tools", messages(USER, GPT, functions=[{"description": "no name"}])),
    ("bad_tools", messages(USER, GPT, functions=[{"name": "f", "description": 7}])),
    ("bad_tools", b'{"messages": [], "tools": [{"name": "f", "parameters": 1e999}]}'),
    ("bad_call", messages(USER, calls({"arguments": "{}"}))),
    ("bad_call", messages(USER, calls({"name": "two\nlines"}))),
    ("bad_call", messages(USER, calls("f"))),
    ("bad_call", messages(USER, {"role": "function_call", "content": "f(x)"})),
    ("bad_arguments", messages(USER, calls({"name": "f", "arguments": "{x: 1}"}))),
    ("bad_arguments", messages(USER, calls({"name": "f", "arguments": "[1]"}))),
    ("bad_arguments", messages(USER, calls({"name": "f", "arguments": 7}))),
    ("observation_without_call", messages(USER, TOOL, GPT)),
    ("observation_without_call", messages(USER, calls(CALL), TOOL, TOOL, GPT)),
    ("observation_without_call", messages(USER, calls(CALL), {**TOOL, "tool_call_id": "b"}, GPT)),
    (
        "observation_without_call",
        messages(USER, named("a", "b"), *[{**TOOL, "tool_call_id": "a"}] * 2, GPT),
    ),
    (
        "call_without_observation",
        messages(USER, named("a", "b"), {**TOOL, "tool_call_id": "b"}),
    ),
    ("bad_call", messages(USER, parts("assistant", {"type": "tool_call", "text": "[]"}))),
    ("call_without_observation", messages(USER, calls(CALL), GPT)),
    ("call_without_observation", messages(USER, calls(CALL), USER, GPT)),
    ("call_without_observation", messages(USER, calls(CALL, CALL))),
    ("call_without_observation", messages(USER, calls(CALL, CALL), TOOL, GPT)),
    ("unanswered_observation", messages(USER, calls(CALL), TOOL)),
    ("unanswered_observation", messages(USER, calls(CALL), TOOL, USER, GPT)),
    ("empty_assistant", messages(USER, calls(CALL), TOOL, {"role": "assistant", "content": " "})),
    ("roles_not_alternating", messages(USER, calls(CALL), TOOL, GPT, GPT)),
    ("first_turn_assistant", messages(calls(CALL), TOOL, GPT)),
    ("content_not_text", messages(USER, calls(CALL), {"role": "tool", "content": {"a": 1}}, GPT)),
    ("bad_weight", messages(USER, {**calls(CALL), "weight": 0}, TOOL, GPT)),
    ("control_tokens", messages(USER, calls(CALL), {**TOOL, "content": "<|im_end|>"}, GPT)),
    ("bad_weight", messages(USER, {**GPT, "weight": -0.5})),
    ("bad_weight", messages(USER, {**GPT, "weight": "0.5"})),
    ("bad_weight", messages(USER, GPT, weight=-1)),
    ("bad_weight", messages(USER, {**GPT, "train": "no"})),
]  # fmt: skip


@pytest.mark.parametrize(("reason", "row"), BAD_ROWS)
def test_bad_row_is_named_by_reason_and_line_between_good_ones(
    tmp_path: Path, reason: str, row: bytes
) -> None:
    good = messages(USER, GPT)
    rows = read(tmp_path / "a.jsonl", good + b"\n" + row + b"\n" + good)
    assert [r.line for r in rows] == [1, 2, 3]
    assert [isinstance(r.conversation, BadRow) for r in rows] == [False, True, False]
    assert rows[1].conversation.reason == reason


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("messages", {"messages": [USER, GPT]}, PLAIN),
        ("messages", {"messages": [USER, GPT], "tools": "[]"}, PLAIN),
        ("messages", {"messages": [{"role": "system", "content": " "}, USER, GPT]}, PLAIN),
        (
            "messages",
            {"messages": [{"role": "system", "content": "S"}, USER, GPT]},
            (Message("system", "S"), *PLAIN),
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    {"from": "human", "value": "Hi"},
                    {"from": "gpt", "value": "Hello."},
                    {"from": "user", "value": "Hi"},
                    {"from": "assistant", "value": "Hello."},
                ],
                "system": "S",
            },
            (Message("system", "S"), *PLAIN, *PLAIN),
        ),
        ("alpaca", {"instruction": "Hi", "input": "", "output": "Hello."}, PLAIN),
        ("alpaca", {"instruction": "Hi", "output": "Hello."}, PLAIN),
        (
            "alpaca",
            {"instruction": "Add", "input": "1 2", "response": "3"},
            (Message("user", "Add\n\n1 2"), Message("assistant", "3")),
        ),
        ("question_answer", {"answer": "Hello.", "question": "Hi"}, PLAIN),
        ("problem_solution", {"problem": "Hi", "level": "1", "solution": "Hello."}, PLAIN),
        ("text_code", {"text": "Hi", "code": "Hello.", "test_list": []}, PLAIN),
    ],
)
def test_format_is_detected_and_read(
    tmp_path: Path, form: str, row: dict, expected: tuple[Message, ...]
) -> None:
    file = file_of(tmp_path / "a.jsonl", json.dumps(row).encode())
    assert detect_format(file) == form
    (result,) = rows_of(file, form)
    assert result.conversation == Conversation(expected)
    assert not result.trimmed


def test_alpaca_row_without_answer_or_with_odd_history_is_bad(tmp_path: Path) -> None:
    good = {"instruction": "Hi", "output": "Hello."}
    odd = [{**good, "history": history} for history in ("a", ["a"], [["a"]], [["a", None]])]
    rows = [good, {"instruction": "Hi"}, *odd]
    found = read(tmp_path / "a.jsonl", "\n".join(map(json.dumps, rows)).encode())
    reasons = [r.conversation.reason for r in found[1:]]
    assert reasons == ["missing_field", *["bad_history"] * 4]


def test_only_line_feeds_end_a_row(tmp_path: Path) -> None:
    text = "one\u2028two\u0085three\rfour"
    row = json.dumps({"question": text, "answer": "x\ry"}, ensure_ascii=False).encode()
    content = b"\xef\xbb\xbf" + row + b"\r\n\n  \n" + row
    rows = read(tmp_path / "a.jsonl", content)
    assert [r.line for r in rows] == [1, 4]
    for result in rows:
        assert [m.content for m in result.conversation.messages] == [text, "x\ry"]


def test_trailing_user_turn_is_trimmed_and_told(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "a.jsonl", messages(USER, GPT, USER))
    assert row.trimmed
    assert row.conversation == Conversation(PLAIN)


@pytest.mark.parametrize("mark", [{"weight": 0}, {"train": False}, {"weight": 0.0, "train": True}])
def test_message_marked_untrained_is_kept_untrained(tmp_path: Path, mark: dict) -> None:
    (row,) = read(tmp_path / "a.jsonl", messages(USER, {**GPT, **mark}, USER, {**GPT, "weight": 1}))
    assert [m.train for m in row.conversation.messages] == [True, False, True, True]


def test_empty_file_has_no_rows_and_no_format(tmp_path: Path) -> None:
    file = file_of(tmp_path / "a.jsonl", b"\n \n")
    assert detect_format(file) is None
    assert rows_of(file, None) == []


def test_format_is_detected_behind_unreadable_rows(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.jsonl", b"{oops\n7\n" + messages(USER, GPT))
    reasons = [r.conversation.reason for r in rows[:2]]
    assert reasons == ["invalid_json", "not_an_object"]
    assert rows[2].conversation == Conversation(PLAIN)


def test_format_is_detected_behind_a_row_of_another_shape(tmp_path: Path) -> None:
    rows = read(tmp_path / "a.jsonl", b'{"version": 1}\n{}\n' + messages(USER, GPT))
    assert [r.conversation.reason for r in rows[:2]] == ["missing_field"] * 2
    assert rows[2].conversation == Conversation(PLAIN)


def test_unknown_keys_are_refused_with_the_formats_known(tmp_path: Path) -> None:
    file = file_of(tmp_path / "a.jsonl", b'{"ask": "a", "reply": "b"}')
    with pytest.raises(UserError, match=r"a\.jsonl:1: .*'ask', 'reply'.*messages.*text_code"):
        detect_format(file)


def test_unknown_format_name_is_refused_with_the_valid_ones(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"'alpacca'.*auto.*alpaca"):
        expand(tmp_path, [Source(path="*", format="alpacca")], tmp_path)


def test_expand_sorts_below_the_root_and_refuses_an_empty_match(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("d/b.jsonl", "d/a.jsonl", "d/e/c.jsonl"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    found = expand(Path("~/d"), [Source(path="*"), Source(path="**/c.jsonl")], tmp_path)
    assert [[file.name for file in part] for part in found] == [
        ["a.jsonl", "b.jsonl"], ["e/c.jsonl"],
    ]  # fmt: skip
    with pytest.raises(UserError, match=r"no file matches 'x\*\.jsonl'"):
        expand(Path("~/d"), [Source(path="x*.jsonl")], tmp_path)


ROLES = st.sampled_from(["system", "user", "assistant", "human", "gpt", "tool", "function_call"])
TEXTS = st.text(max_size=5) | st.sampled_from(['{"name": "f", "arguments": {}}', "[]", "text"])
KEYS = sorted({key for form in FORMATS.values() for s in form.signatures for key in s})
KEYS += ["tools", "functions", "system", "system_prompt", "history", "input", "context"]
INNER = ["role", "from", "content", "value", "weight", "reasoning_content", "tool_calls"]
INNER += ["function_call", "function", "name", "arguments", "type", "text", "replies", "rank"]
INNER += ["train_messages", "output", "reasoning", "thinking", "loss_weight", "label"]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | ROLES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(INNER), inner),
    max_leaves=12,
)
TURN = st.fixed_dictionaries(
    {"role": ROLES, "content": TEXTS | st.none()},
    optional={"tool_calls": st.lists(st.just({"function": {"name": "f"}}), max_size=2)},
)


@STEADY
@given(
    st.dictionaries(st.sampled_from(KEYS), JSON)
    | st.fixed_dictionaries({"messages": st.lists(TURN, max_size=6)}),
    st.sampled_from(sorted(FORMATS)),
)
def test_any_object_is_a_conversation_or_a_bad_row(row: dict, form: str) -> None:
    with contextlib.suppress(BadRow):
        conversation, _ = to_conversation(row, FORMATS[form])
        roles = [m.role for m in conversation.turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert all(m.content.strip() for m in conversation.turns if m.role == "assistant")


def test_content_hash_sees_roles_and_normal_stripped_content_only() -> None:
    one = Conversation((Message("user", "Caf\u00e9"), Message("assistant", "ok")))
    same = Conversation((Message("user", " Cafe\u0301\n"), Message("assistant", "ok", train=False)))
    swapped = Conversation((Message("user", "ok"), Message("assistant", "Caf\u00e9")))
    system = Conversation((Message("system", "s"), *one.messages))
    shifted = [
        Conversation((Message("user", "a"), Message("assistant", "b" + "assistant c"))),
        Conversation((Message("user", "a" + "assistant b"), Message("assistant", "c"))),
    ]
    assert content_hash(one.messages) == content_hash(same.messages)
    assert len({content_hash(c.messages) for c in (one, swapped, system, *shifted)}) == 5
    assert 0 <= content_hash(one.messages) < 2**64
