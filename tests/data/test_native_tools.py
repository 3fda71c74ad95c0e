"""Tools and thinking that stand apart in the messages, as a chat template with tools takes them."""

import contextlib
import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moi_jax.data.sources import formats
from moi_jax.data.sources.formats import FORMATS, Typing, to_chat, to_conversation
from moi_jax.data.sources.tools import unlisted
from moi_jax.text.conversations import BadRow, Conversation, Message, ToolCall
from moi_jax.text.templates import ChatML

from support.sources import chat, run, section, texts, write

PAGE = (Path(__file__).parents[2] / "docs" / "data_format.md").read_text(encoding="utf-8")
STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
NATIVE, THINKING = Typing(tools=True, thinking=True), Typing(tools=False, thinking=True)

USER, GPT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
QUESTION, ANSWER = Message("user", "2 + 2?"), Message("assistant", "4")
ARGUMENTS = {"a": 2, "b": 2}
FUNCTION = {"name": "add", "arguments": json.dumps(ARGUMENTS)}
SCHEMA = {"type": "object", "properties": {"a": {"type": "number"}}, "required": ["a"]}
ADD = {"name": "add", "description": "Adds é.", "parameters": SCHEMA}
ADD_TOOL = json.dumps({"type": "function", "function": ADD}, ensure_ascii=False)


def read(row: dict[str, Any], typing: Typing = NATIVE) -> Conversation:
    name = formats.detect(row)
    assert name is not None
    return to_conversation(row, FORMATS[name], typing)[0]


def turns(*given: Any, typing: Typing = NATIVE, **keys: Any) -> tuple[Message, ...]:
    return read({"messages": [USER, *given], **keys}, typing).messages[1:]


def calling(*names: str, content: Any = None, **keys: Any) -> dict[str, Any]:
    """A turn that calls each tool; the id of a call is the letter of its number."""
    calls = [
        {"id": "abc"[n], "type": "function", "function": {"name": name, "arguments": {}}}
        for n, name in enumerate(names)
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls, **keys}


def tool(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **keys}


def part(kind: str, text: str) -> dict[str, str]:
    return {"type": kind, "value": text}


MADE_UP = "8d6b49b2d"  # the id of a call to which the row gives none
SHAREGPT = [
    {"from": "human", "value": "2 + 2?"},
    {"from": "function_call", "value": json.dumps({"name": "add", "arguments": ARGUMENTS})},
    {"from": "observation", "value": "4"},
    {"from": "gpt", "value": "4"},
]
FINISH = {
    "name": "Finish",
    "arguments": json.dumps({"return_type": "give_answer", "final_answer": "4"}),
}
TOOLBENCH = [
    {"role": "system", "content": "You are AutoGPT"},
    {"role": "user", "content": "\n2 + 2?\nBegin!\n"},
    {"role": "assistant", "content": None, "function_call": FUNCTION},
    {"role": "function", "name": "add", "content": "4"},
    {"role": "assistant", "content": None, "function_call": FINISH},
]


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [
            {"type": "function", "function": FUNCTION}]}, tool("4"), GPT],
         "tools": [{"type": "function", "function": ADD}]},
        {"messages": [USER, {"role": "assistant", "content": "", "tool_calls": [
            {"function": {"name": "add", "arguments": ARGUMENTS}}]}, tool("4"), GPT],
         "tools": json.dumps([{"type": "function", "function": ADD}])},
        {"messages": [USER, {"role": "assistant", "function_call": FUNCTION},
                      {"role": "function", "name": "add", "content": "4"}, GPT],
         "functions": [ADD]},
        {"messages": [USER, {"role": "assistant", "content": [
            part("tool_call", json.dumps(FUNCTION))]}, tool("4"), GPT],
         "tools": json.dumps([ADD])},
        {"conversations": SHAREGPT, "tools": json.dumps([ADD])},
        {"answer_generation": {"train_messages": [TOOLBENCH[:2], TOOLBENCH],
                               "function": [ADD, {"name": "Finish"}]}},
    ],
    ids=["openai", "object", "function_call", "parts", "sharegpt", "toolbench"],
)  # fmt: skip
def test_every_form_of_calls_becomes_the_same_typed_messages(row: dict[str, Any]) -> None:
    assert read(row) == Conversation(
        (
            QUESTION,
            Message("assistant", "", calls=(ToolCall("add", '{"a": 2, "b": 2}', MADE_UP),)),
            Message("tool", "4", call_id=MADE_UP, name="add"),
            ANSWER,
        ),
        (ADD_TOOL,),
    )


def test_calls_without_an_id_get_different_ones_as_mistral_wants_them() -> None:
    called = {"role": "function_call", "content": json.dumps([FUNCTION, FUNCTION])}
    given = [called, tool("1"), tool("2"), called, tool("3"), tool("4"), GPT]
    messages = turns(*given)
    ids = [call.id for message in messages for call in message.calls]
    assert len({*ids}) == 4
    assert all(re.fullmatch("[a-zA-Z0-9]{9}", id_) for id_ in ids)
    assert [message.call_id for message in messages if message.role == "tool"] == ids
    assert turns(*given) == messages


def shown(message: Message) -> str:
    text = f"{message.role:<10} {message.content}"
    text += "".join(f" calls: {c.name}({c.arguments}) as {c.id}" for c in message.calls)
    return text + (f" from: {message.name} as {message.call_id}" if message.name else "")


def test_row_of_the_page_becomes_the_messages_of_the_page() -> None:
    rows = re.findall(r"```json\n(.*?)```", PAGE, re.S)
    (row,) = [json.loads(text) for text in rows if "I look it up." in text]
    block = "".join(shown(message) + "\n" for message in read(row).messages)
    assert f"```text\n{block}```" in PAGE


@pytest.mark.parametrize(
    "results",
    [
        [tool("A", tool_call_id="a"), tool("B", tool_call_id="b"), tool("C", tool_call_id="c")],
        [tool("C", tool_call_id="c"), tool("A", tool_call_id="a"), tool("B", tool_call_id="b")],
        [tool("A"), tool("B"), tool("C")],
        [tool("B", tool_call_id="b"), tool("A"), tool("C")],
    ],
)
def test_results_stand_in_the_order_of_their_calls_and_know_them(results: list) -> None:
    called, *returned, answer = turns(calling("f", "g", "f", content="All."), *results, GPT)
    calls = (ToolCall("f", "{}", "a"), ToolCall("g", "{}", "b"), ToolCall("f", "{}", "c"))
    assert called == Message("assistant", "All.", calls=calls)
    assert returned == [
        Message("tool", "A", call_id="a", name="f"),
        Message("tool", "B", call_id="b", name="g"),
        Message("tool", "C", call_id="c", name="f"),
    ]
    assert answer == ANSWER


def test_calls_after_results_are_a_message_of_their_own() -> None:
    chain = [calling("f"), tool("1"), calling("g", content="Then."), tool("2"), GPT, USER, GPT]
    roles = [(m.role, m.content, len(m.calls)) for m in turns(*chain)]
    assert roles == [
        ("assistant", "", 1), ("tool", "1", 0), ("assistant", "Then.", 1), ("tool", "2", 0),
        ("assistant", "4", 0), ("user", "2 + 2?", 0), ("assistant", "4", 0),
    ]  # fmt: skip


def test_turns_of_calls_in_a_row_are_calls_made_together() -> None:
    row = {"conversations": [SHAREGPT[0], *SHAREGPT[1:2] * 2, *SHAREGPT[2:3] * 2, SHAREGPT[3]]}
    assert [len(message.calls) for message in read(row).messages] == [0, 2, 0, 0, 0]
    said = {"role": "assistant", "content": "I add."}
    (called, *_) = turns(said, calling("add"), tool("4"), GPT)
    assert (called.content, len(called.calls)) == ("I add.", 1)


@pytest.mark.parametrize("names", ["f", "fg"])
def test_calls_at_the_end_may_have_no_result(names: str) -> None:
    assert len(turns(calling(*names))[-1].calls) == len(names)
    assert len(turns(calling("f"), tool("1"), calling(*names))[-1].calls) == len(names)
    row = {"messages": [USER, calling(*names), USER]}
    with pytest.raises(BadRow, match="call_without_observation"):
        read(row)


def test_chat_that_the_model_goes_on_with_may_end_with_results() -> None:
    row = {"messages": [USER, calling("f", "g"), tool("1"), tool("2")], "tools": [ADD]}
    found = to_chat(row, FORMATS["messages"], NATIVE)
    assert [message.role for message in found.messages] == ["user", "assistant", "tool", "tool"]
    assert found.tools == (ADD_TOOL,)
    with pytest.raises(BadRow, match="call_without_observation: g returned nothing"):
        to_chat({"messages": row["messages"][:3]}, FORMATS["messages"], NATIVE)


BAD = {
    "observation_without_call": [
        [tool("4"), GPT],
        [calling("f"), tool("1"), tool("2"), GPT],
        [calling("f"), tool("1", tool_call_id="b"), GPT],
        [calling("f", "g"), *[tool("1", tool_call_id="a")] * 2, GPT],
        [GPT, tool("4")],
    ],
    "call_without_observation": [
        [calling("f"), GPT],
        [calling("f"), USER, GPT],
        [calling("f", "g"), tool("1"), GPT],
        [calling("f", "g"), tool("1")],
        [calling("f", "g"), tool("2", tool_call_id="b")],
        [calling("f"), {**GPT, "reasoning": "Hm."}],
    ],
    "unanswered_observation": [
        [calling("f"), tool("1")],
        [calling("f"), tool("1"), USER, GPT],
    ],
    "empty_assistant": [
        [{"role": "assistant", "content": "", "reasoning_content": "Only thinking."}],
        [{"role": "assistant", "content": "<think>\nOnly thinking.\n</think>\n\n"}],
        [{"role": "assistant", "content": [part("reasoning", "Only thinking.")]}],
        [{"role": "assistant", "content": " ", "thinking": "First."}, USER, GPT],
        [calling("f"), tool("1"), {**GPT, "content": " "}],
        [calling("f"), tool("1"), {"role": "assistant", "content": [part("reasoning", "So.")]}],
    ],
    "control_tokens": [
        [calling("f"), tool("<|im_end|>"), GPT],
        [{**GPT, "thinking": "<|im_start|>"}],
        [calling("f<|im_end|>"), tool("1"), GPT],
        [calling("f", reasoning="<|endoftext|>"), tool("1"), GPT],
        [{"role": "function_call", "content": '{"name": "f", "arguments": {"a": "<|im_end|>"}}'}],
        [calling("f") | {"tool_calls": [{"id": "<|im_end|>", "function": FUNCTION}]}],
    ],
    "lone_surrogate": [
        [{"role": "function_call", "content": r'{"name": "f", "arguments": {"a": "\ud83d"}}'}],
        [{**GPT, "thinking": "\ud83d"}],
    ],
    "nul_character": [[{**GPT, "thinking": "a\0"}], [calling("f"), tool("\0"), GPT]],
    "roles_not_alternating": [
        [GPT, GPT],
        [USER, GPT],
        [calling("f"), tool("1"), GPT, GPT],
        [calling("f"), tool("1"), GPT, USER, USER, GPT],
    ],
    "bad_weight": [
        [{**GPT, "weight": -1}],
        [{**GPT, "weight": float("nan")}],
        [{**GPT, "weight": "0.5"}],
        [{**GPT, "weight": float("inf")}],
        [{**GPT, "loss_weight": [1]}],
        [{**GPT, "train": 0.5}],
        [{"role": "assistant", "content": "So.", "weight": 1}, calling("f", weight=2)],
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    ("reason", "given"), [(reason, row) for reason, rows in BAD.items() for row in rows]
)
def test_bad_row_is_named_by_its_reason(reason: str, given: list[dict[str, Any]]) -> None:
    with pytest.raises(BadRow) as bad:
        turns(*given)
    assert bad.value.reason == reason


NO_SCHEMA = [
    "type: object",
    ["a"],
    7,
    {"type": "array", "items": {}},
    {"type": ["object", "null"]},
    {"properties": ["a"]},
    {"properties": {"a": "number"}},
    {"properties": {"a": {"properties": "b"}}},
    {"required": "a"},
    {"required": [1]},
    {"properties": {"a": {"default": float("nan")}}},
]
SCHEMAS = [
    None,
    {},
    {"properties": {"a": {}, "b": True}},
    {"type": "object", "properties": {"type": {"type": "string"}}, "required": []},
    {"type": "dict", "properties": {"a": {"type": "float"}}},
    {"type": "object", "properties": {"a": {"properties": {"b": {"enum": [1, None]}}}}},
]


@pytest.mark.parametrize("parameters", NO_SCHEMA)
def test_tool_whose_parameters_are_no_schema_of_an_object_is_bad(parameters: Any) -> None:
    with pytest.raises(BadRow, match="bad_tools"):
        turns(GPT, tools=[{"name": "f", "parameters": parameters}])


@pytest.mark.parametrize("parameters", SCHEMAS)
def test_schema_of_an_object_is_kept_as_it_stands(parameters: Any) -> None:
    function = {"strict": True, "parameters": parameters, "name": "f"}
    (kept,) = read({"messages": [USER, GPT], "tools": [function]}).tools
    assert kept == json.dumps({"type": "function", "function": function})


def test_properties_that_a_table_fills_with_null_are_left_out() -> None:
    a = {"type": "string", "default": None, "items": None}
    given = {"required": None, "properties": {"a": a, "of_another_row": None}}
    (kept,) = read({"messages": [USER, GPT], "tools": [{"name": "f", "parameters": given}]}).tools
    (kept_properties,) = json.loads(kept)["function"]["parameters"].values()
    assert kept_properties == {"a": {"type": "string", "default": None}}


def test_tools_of_a_row_are_kept_without_a_call_and_control_tokens_in_them_are_refused() -> None:
    assert read({"messages": [USER, GPT], "tools": [ADD], "functions": [ADD]}) == Conversation(
        (QUESTION, ANSWER), (ADD_TOOL, ADD_TOOL)
    )
    with pytest.raises(BadRow, match="control_tokens"):
        turns(GPT, tools=[{"name": "f", "description": "Ends with <|im_end|>."}])


def test_call_of_a_tool_that_is_not_listed_is_told_and_the_row_is_kept() -> None:
    row = {"messages": [USER, calling("add", "now"), tool("4"), tool("5"), GPT], "tools": [ADD]}
    assert unlisted(read(row)) == "calls 'now', which is not among its tools"
    assert unlisted(read({**row, "tools": None})).startswith("calls 'add'")
    assert unlisted(read({**row, "tools": [ADD, {"name": "now"}]})) == ""
    assert unlisted(read({"messages": [USER, GPT], "tools": [ADD]})) == ""


@pytest.mark.parametrize("typing", [NATIVE, THINKING])
@pytest.mark.parametrize(
    "turn",
    [
        {**GPT, "reasoning_content": "Add."},
        {**GPT, "thinking": "Add.", "reasoning": "Add."},
        {**GPT, "content": [part("reasoning", "Add."), part("text", "4")]},
        {**GPT, "content": "<think>\nAdd.\n</think>\n\n4"},
        {**GPT, "content": "\n<think>Add.</think>4"},
        {**GPT, "content": "<think>Add.</think>\n4", "reasoning": "Add.\n"},
    ],
)
def test_thinking_stands_apart_wherever_the_row_has_it(turn: dict, typing: Typing) -> None:
    (message,) = turns(turn, typing=typing)
    assert message == Message("assistant", "4", thinking=message.thinking)
    assert message.thinking.strip() == "Add."


def test_thinking_of_questions_and_pairs_is_typed_and_an_empty_block_is_none() -> None:
    row = {"question": "<think>2 + 2?", "answer": "<think>\n\n</think>\n\n4"}
    assert read(row).messages == (Message("user", "<think>2 + 2?"), ANSWER)
    (message,) = turns({**GPT, "content": "<think>\nOne.\n</think>\n\n4", "thinking": "Two."})
    assert message.thinking == "Two.\n\nOne."
    (unclosed,) = turns({**GPT, "content": "<think>4"})
    assert (unclosed.content, unclosed.thinking) == ("<think>4", "")


def test_thinking_and_text_stand_beside_the_calls_that_follow_them() -> None:
    first = calling("f", content="Look.", reasoning_content="Hm.")
    content = [part("reasoning", "So."), part("tool_call", '{"name": "g"}'), part("text", "And")]
    content += [part("tool_call", '{"name": "h"}')]
    last = {"role": "assistant", "content": content}
    one, _, two, *_ = turns(first, tool("1"), last, tool("2"), tool("3"), GPT)
    assert (one.thinking, one.content) == ("Hm.", "Look.")
    assert (two.thinking, two.content, len(two.calls)) == ("So.", "And", 2)


def test_react_with_thinking_apart_writes_tools_as_text_and_nothing_else() -> None:
    thought = {**GPT, "reasoning": "Add."}
    (message,) = turns(calling("f", reasoning="Hm."), tool("1"), thought, typing=THINKING)
    assert message.content == (
        "Thought: Hm.\nAction: f\nAction Input: {}\nObservation: 1\nThought: Add.\nFinal Answer: 4"
    )
    assert (message.trajectory, message.thinking) == (True, "")
    called, other = turns(calling("f"), tool("1"), GPT, USER, thought, typing=THINKING)[::2]
    assert (called.trajectory, other) == (True, Message("assistant", "4", thinking="Add."))


def weights(*given: Any, typing: Typing = NATIVE, **keys: Any) -> list[float]:
    messages = turns(*given, typing=typing, **keys)
    return [m.train * m.weight for m in messages if m.role == "assistant"]


@pytest.mark.parametrize("typing", [Typing(), NATIVE])
def test_weights_of_messages_and_rows_are_multiplied(typing: Typing) -> None:
    given = [{**GPT, "weight": 0.5}, USER, {**GPT, "loss_weight": 2, "weight": 3}, USER, GPT]
    given += [USER, {**GPT, "weight": 0.25, "train": False}]
    assert weights(*given, typing=typing) == [0.5, 6, 1, 0]
    assert weights(*given, typing=typing, weight=0.5) == [0.25, 3, 0.5, 0]
    assert weights(*given, typing=typing, weight=0) == [0, 0, 0, 0]
    # Under this key of a row, only a number is surely a weight.
    for other in ("70 kg", None, True, [2]):
        assert weights(*given, typing=typing, weight=other) == [0.5, 6, 1, 0]
    for wrong in (-1, float("nan"), 1e300, 10**400):
        with pytest.raises(BadRow, match="bad_weight: the row's weight"):
            turns(GPT, typing=typing, weight=wrong)
    row = {"question": "2 + 2?", "answer": "4", "weight": 2.5}
    assert read(row, typing).messages[-1].weight == 2.5


def test_steps_of_an_answer_may_differ_in_weight_only_where_they_are_messages() -> None:
    given = [calling("f", weight=0), tool("1"), calling("g", weight=2), tool("2"), {**GPT}]
    assert weights(*given) == [0, 2, 1]
    with pytest.raises(BadRow, match="bad_weight: parts of a turn"):
        turns(*given, typing=Typing())
    for turn in given:
        turn["weight"] = 0.5
    (message,) = turns(*given, typing=Typing())
    assert (message.trajectory, message.weight) == (True, 0.5)


class WithTools(ChatML):
    """A template that takes everything apart."""

    renders_tools = typed = True


def test_template_decides_unless_the_config_says_react(tmp_path: Path) -> None:
    with_tools = WithTools.__new__(WithTools)
    assert Typing.of(section(tmp_path, "a"), with_tools) == NATIVE
    assert Typing.of(section(tmp_path, "a", tools="react"), with_tools) == THINKING
    assert Typing.of(section(tmp_path, "a"), ChatML.__new__(ChatML)) == Typing()


def test_cache_of_text_alone_is_found_as_before_and_another_one_is_made_of_typed_messages(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "data" / "a" / "1.jsonl", chat("2 + 2?", "4"))
    write(tmp_path / "data" / "b" / "1.jsonl", chat("2 + 2?", "4", thinking="Add."))
    data = section(tmp_path / "data", "a", "b")
    before = run(data)
    # The key that this row had before messages could be typed.
    assert before[0].key == "f2696f71728ddaafdf8599b55677c94c3a674fddaf4cc048c292ccecdc8aaca7"
    assert [cache.key for cache in run(data.model_copy(update={"tools": "react"}))] == [
        cache.key for cache in before
    ]
    monkeypatch.setattr(ChatML, "typed", True)
    after = run(data)
    assert len({cache.key for cache in (*before, *after)}) == 4
    # ChatML does not know thinking that stands apart.
    ((text,), (apart,)) = texts(before[1]), texts(after[1])
    assert ("<think>" in text, "<think>" in apart) == (True, False)


WORDS = st.text("ab é\n{}\"'", min_size=1, max_size=8).filter(str.strip)
NAMES = st.sampled_from(["f", "get_weather", "名"])
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | WORDS,
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(WORDS, inner, max_size=2),
    max_leaves=4,
)
OBJECTS = st.dictionaries(WORDS, VALUES, max_size=2)


def one_line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


@st.composite
def answers(draw: Any, calls: list[ToolCall]) -> list[Message]:
    """What an assistant does between two questions; its calls are added to `calls`."""

    def assistant(content: str, *made: ToolCall) -> Message:
        weight = draw(st.sampled_from([1.0, 1.0, 0.0, 0.5, 2.0]))
        thinking = draw(st.just("") | WORDS)
        return Message(
            "assistant", content, weight > 0, thinking=thinking, calls=made, weight=weight or 1.0
        )

    messages = []
    for _ in range(draw(st.integers(0, 2))):
        made = []
        for _ in range(draw(st.integers(1, 3))):
            made.append(ToolCall(draw(NAMES), one_line(draw(OBJECTS)), f"id{len(calls)}"))
            calls.append(made[-1])
        messages.append(assistant(draw(st.just("") | WORDS), *made))
        messages += [Message("tool", draw(WORDS), call_id=c.id, name=c.name) for c in made]
    return [*messages, assistant(draw(WORDS))]


@st.composite
def conversations(draw: Any) -> Conversation:
    messages = draw(st.just([]) | WORDS.map(lambda text: [Message("system", text)]))
    calls: list[ToolCall] = []
    for _ in range(draw(st.integers(1, 3))):
        messages = [*messages, Message("user", draw(WORDS)), *draw(answers(calls))]
    functions = st.fixed_dictionaries({"name": NAMES}, optional={"description": WORDS})
    tools = [
        one_line({"type": "function", "function": f}) for f in draw(st.lists(functions, max_size=2))
    ]
    return Conversation(tuple(messages), tuple(tools))


def in_openai_form(message: Message, as_text: bool) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.role == "assistant":
        turn["weight"] = message.weight * message.train
    if message.thinking:
        turn["reasoning_content"] = message.thinking
    if message.role == "tool":
        turn |= {"tool_call_id": message.call_id, "name": message.name}
    if message.calls:
        turn["tool_calls"] = [
            {"id": id_, "type": "function", "function": {
                "name": name, "arguments": text if as_text else json.loads(text)}}
            for name, text, id_ in message.calls
        ]  # fmt: skip
    return turn


@settings(STEADY, max_examples=60)
@given(conversations(), st.booleans(), st.randoms())
def test_typed_conversation_in_openai_form_reads_back_equal(
    conversation: Conversation, as_text: bool, random: Any
) -> None:
    listed: list[dict[str, Any]] = []
    results: list[dict[str, Any]] = []
    for message in conversation.messages:
        turn = in_openai_form(message, as_text)
        if message.role == "tool":
            results.append(turn)
            continue
        random.shuffle(results)  # tools return in any order
        listed, results = [*listed, *results, turn], []
    tools: Any = [json.loads(description) for description in conversation.tools]
    row = {"messages": listed, "tools": json.dumps(tools) if as_text else tools}
    assert read(json.loads(json.dumps(row))) == conversation


TURN = st.fixed_dictionaries(
    {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": WORDS},
    optional={
        "tool_calls": st.lists(st.just({"id": "a", "function": {"name": "f"}}), max_size=2),
        "tool_call_id": st.sampled_from(["a", "b"]),
        "thinking": WORDS,
    },
)
# A user's message, then calls with their results, then an answer; only calls may stand last.
ORDER = re.compile("s?(u(ct+)*a)*(u(ct+)*[ac])")


@STEADY
@given(st.lists(TURN, max_size=7))
def test_any_turns_are_a_conversation_in_order_or_a_bad_row(listed: list[dict[str, Any]]) -> None:
    with contextlib.suppress(BadRow):
        messages = read({"messages": [USER, *listed]}).messages
        letters = ["c" if message.calls else message.role[0] for message in messages]
        assert ORDER.fullmatch("".join(letters))
        open_calls: list[ToolCall] = []
        for message in messages:
            if message.role == "tool":
                call = open_calls.pop(0)
                assert (message.call_id, message.name) == (call.id, call.name)
            else:
                assert not open_calls
                open_calls = [*message.calls]
        assert dataclasses.replace(messages[-1], calls=tuple(open_calls)) == messages[-1]
