"""Formats: what each becomes, tool calls in ReAct form, and the page that documents them."""

import json
import math
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from moi_jax.data.sources import formats, rows
from moi_jax.data.sources.formats import FORMATS, to_conversation
from moi_jax.data.sources.readers import SourceFile
from moi_jax.text import rendering
from moi_jax.text.conversations import BadRow, Conversation, Message
from moi_jax.text.instructions import OBSERVATION, label_mask
from moi_jax.text.tokenizer import load_tokenizer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "data_format.md").read_text(encoding="utf-8")
USER, GPT = {"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "4"}
PLAIN = (Message("user", "2 + 2?"), Message("assistant", "4"))
CALL = {"name": "add", "arguments": '{"a": 2,\n "b": 2}'}
STEP = 'Thought: {}\nAction: add\nAction Input: {{"a": 2, "b": 2}}\nObservation:{}'
STOCK = "I need to call add."
END = "\nThought: I now know the final answer.\nFinal Answer: 4"


def chat(*turns: Any, **keys: Any) -> dict[str, Any]:
    return {"messages": [USER, *turns], **keys}


def calling(*calls: dict[str, Any], content: str | None = None, **keys: Any) -> dict[str, Any]:
    listed = [{"id": str(n), "type": "function", "function": c} for n, c in enumerate(calls)]
    return {"role": "assistant", "content": content, "tool_calls": listed, **keys}


def tool(text: str, **keys: Any) -> dict[str, Any]:
    return {"role": "tool", "content": text, **keys}


def turns_of(row: dict[str, Any]) -> tuple[Message, ...]:
    name = formats.detect(row)
    assert name is not None
    return to_conversation(row, FORMATS[name])[0].messages


def answer(row: dict[str, Any]) -> str:
    (question, message) = turns_of(row)
    assert question == PLAIN[0]
    return message.content


@pytest.mark.parametrize(
    "row",
    [
        {"messages": json.dumps([USER, GPT])},
        {"messages": [{**USER, "role": "User"}, {**GPT, "role": "ASSISTANT"}]},
        {"messages": [{**USER, "content": [{"type": "text", "text": "2 + 2?"}]}, GPT]},
        {"messages": [USER, {**GPT, "content": [{"type": "text", "value": "4"}]}]},
        {"messages": [USER, {**GPT, "tool_calls": None, "function_call": None}]},
        {"messages": [USER, {**GPT, "tool_calls": [], "reasoning_content": " "}]},
        {"messages": [USER, GPT], "tools": None, "functions": []},
        {"messages": [USER, GPT], "tools": " ", "system": ""},
        {"messages": [USER, GPT], "id": 7, "unknown": {"nested": [None]}},
        {"conversations": [{"from": "Human", "value": "2 + 2?"}, {"from": "GPT", "value": "4"}]},
        {"instruction": "2 + 2?", "output": "4", "history": []},
        {"instruction": "2 + 2?", "input": None, "output": "4", "history": None},
        {"instruction": "2 + 2?", "input": "", "output": "4", "history": " "},
        {"prompt": json.dumps([USER]), "completion": json.dumps([GPT])},
    ],
)
def test_ragged_rows_that_are_whole_are_read(row: dict[str, Any]) -> None:
    assert turns_of(row) == PLAIN


def test_long_rows_text_of_several_parts_and_odd_letters_come_through() -> None:
    text = "\u2028\u0085é\ud7ff😀\t" * 3000
    parts = [{"type": "text", "text": text}, {"type": "text", "text": "end"}]
    assert answer(chat({"role": "assistant", "content": parts})) == f"{text}\nend"


def test_system_text_stands_first_wherever_the_row_has_it() -> None:
    system = {"role": "system", "content": "S"}
    assert turns_of(chat(GPT, system="S")) == (Message("system", "S"), *PLAIN)
    assert turns_of({"messages": [system, USER, GPT]}) == (Message("system", "S"), *PLAIN)


def test_alpaca_history_is_the_earlier_turns() -> None:
    row = {"instruction": "2 + 2?", "output": "4", "history": [["1 + 1?", "2"], ["So?", "Yes."]]}
    earlier = [("user", "1 + 1?"), ("assistant", "2"), ("user", "So?"), ("assistant", "Yes.")]
    assert turns_of(row) == (*(Message(*turn) for turn in earlier), *PLAIN)
    assert turns_of({**row, "history": json.dumps(row["history"])}) == turns_of(row)
    with pytest.raises(BadRow, match="bad_history"):
        turns_of({**row, "history": "What was before?"})


@pytest.mark.parametrize("text", ["[1, 2]", "[]", '[{"a": 1}]', "[the list", '["role"]'])
def test_json_that_is_no_list_of_turns_stays_the_text_of_a_completion(text: str) -> None:
    assert turns_of({"prompt": "2 + 2?", "completion": text})[1] == Message("assistant", text)


def test_reasoning_without_tools_is_a_think_block() -> None:
    expected = "<think>\nTwo and two.\n</think>\n\n4"
    parts = [{"type": "reasoning", "value": "Two and two."}, {"type": "text", "value": "4"}]
    for key in ("reasoning_content", "reasoning", "thinking"):
        assert answer(chat({**GPT, key: "Two and two."})) == expected
    assert answer(chat({**GPT, "content": parts})) == expected


def test_reasoning_under_two_keys_is_used_once_if_it_is_equal() -> None:
    both = {**GPT, "reasoning": "Add.", "reasoning_content": "Add."}
    assert answer(chat(both)) == "<think>\nAdd.\n</think>\n\n4"
    both["reasoning"] = "Then check."
    assert answer(chat(both)) == "<think>\nAdd.\n\nThen check.\n</think>\n\n4"


NOVEL = "Emma is a novel by Jane Austen."
CHOICES = {"question": "2 + 2?", "choices": ["3", "4", "22"]}
LETTERS = "2 + 2?\n\nA. 3\nB. 4\nC. 22"
LABELLED = {"text": ["3", "4"], "label": ["1", "2"]}


@pytest.mark.parametrize(
    ("row", "question", "expected"),
    [
        ({"instruction": "Who?", "context": NOVEL, "response": "Jane", "category": "closed_qa"},
         f"Who?\n\n{NOVEL}", "Jane"),
        ({"instruction": "Who?", "context": "", "response": "Jane"}, "Who?", "Jane"),
        ({"instruction": "Who?", "input": " \n", "output": "Jane"}, "Who?", "Jane"),
        ({"instruction": "Who?", "input": "Say.", "context": NOVEL, "output": "Jane"},
         f"Who?\n\nSay.\n\n{NOVEL}", "Jane"),
        ({"context": NOVEL, "question": "Who?", "answer": "Jane"}, f"{NOVEL}\n\nWho?", "Jane"),
        ({"question": "Who?", "answer": None, "response": "Jane"}, "Who?", "Jane"),
        ({"question": "Who?", "output": "Jane"}, "Who?", "Jane"),
        ({**CHOICES, "answer": 1, "subject": "maths"}, LETTERS, "B. 4"),
        ({**CHOICES, "answer": "C"}, LETTERS, "C. 22"),
        ({**CHOICES, "answer": " 22"}, LETTERS, "C. 22"),
        ({**CHOICES, "answer": "0"}, LETTERS, "A. 3"),
        ({**CHOICES, "choices": '["3", "4", "22"]', "answer": "4"}, LETTERS, "B. 4"),
        ({**CHOICES, "choices": ["1", "2", "0"], "answer": "0"},
         "2 + 2?\n\nA. 1\nB. 2\nC. 0", "C. 0"),
        ({**CHOICES, "choices": LABELLED, "answerKey": "2"}, "2 + 2?\n\n1. 3\n2. 4", "2. 4"),
        ({"question": "2 + 2?", "options": {"X": "3", "Y": "4"}, "answer": "4"},
         "2 + 2?\n\nX. 3\nY. 4", "Y. 4"),
        ({"question": "2 + 2?", "options": ["3", "4", "22"], "answer": "B", "context": "Add."},
         f"Add.\n\n{LETTERS}", "B. 4"),
        ({"question": "Who?", "options": " ", "answer": "Jane"}, "Who?", "Jane"),
        ({"question": "Who?", "choices": "", "answerKey": "Jane", "context": NOVEL},
         f"{NOVEL}\n\nWho?", "Jane"),
        ({"question": "Who?", "answer": "Jane", "context": {"title": ["Emma"]}}, "Who?", "Jane"),
        ({"instruction": "Who?", "output": "Jane", "context": [["Emma"]]}, "Who?", "Jane"),
        ({"prompt": "2 + 2 =", "completion": " 4"}, "2 + 2 =", " 4"),
        ({"prompt": "2 + 2?", "response": "4"}, "2 + 2?", "4"),
    ],
)  # fmt: skip
def test_row_of_a_known_form_is_its_question_and_answer(
    row: dict[str, Any], question: str, expected: str
) -> None:
    assert turns_of(row) == (Message("user", question), Message("assistant", expected))


@pytest.mark.parametrize("keys", ["instruction output", "question response", "prompt completion"])
def test_system_prompt_of_a_row_is_its_system_text(keys: str) -> None:
    row = dict(zip(keys.split(), ["2 + 2?", "4"], strict=True))
    assert turns_of({**row, "system_prompt": "Be brief."}) == (
        Message("system", "Be brief."), *PLAIN,
    )  # fmt: skip
    assert turns_of({**row, "system_prompt": "", "system": None}) == PLAIN
    both = {**row, "system_prompt": "Be brief.", "system": "Be brief."}
    assert turns_of(both) == (Message("system", "Be brief."), *PLAIN)
    with pytest.raises(BadRow, match="system_not_first: 'system' and 'system_prompt' hold differ"):
        turns_of({**row, "system_prompt": "One.", "system": "Two."})


@pytest.mark.parametrize(
    "row",
    [
        {**CHOICES, "answer": 3},
        {**CHOICES, "answer": -1},
        {**CHOICES, "answer": True},
        {**CHOICES, "answer": None},
        {**CHOICES, "answer": "D"},
        {**CHOICES, "choices": None, "answer": 0},
        {**CHOICES, "choices": [], "answer": 0},
        {**CHOICES, "choices": {}, "answer": 0},
        {**CHOICES, "choices": [3, 4], "answer": 0},
        {**CHOICES, "choices": "3, 4", "answer": 0},
        {**CHOICES, "choices": {"text": ["3", "4"], "label": ["A"]}, "answer": 0},
        {**CHOICES, "choices": [str(n) for n in range(27)], "answer": 0},
        {**CHOICES, "choices": '["1", "2", "0"]', "answer": "0"},
        {**CHOICES, "answer": "9" * 5000},
    ],
)
def test_answer_that_is_none_of_the_choices_is_bad(row: dict[str, Any]) -> None:
    with pytest.raises(BadRow, match="bad_choices"):
        turns_of(row)


def test_prompt_and_completion_of_turns_train_the_completion_alone() -> None:
    row = {"prompt": [USER, GPT, USER], "completion": [GPT, USER, GPT]}
    untrained = Message("assistant", "4", train=False)
    assert turns_of(row) == (PLAIN[0], untrained, *PLAIN, *PLAIN)
    called = chat(calling(CALL), tool("4"), {**GPT, "content": "It is 4."}, USER)["messages"]
    (_, trajectory, _, last) = turns_of({"prompt": called, "completion": "4"})
    assert (trajectory.train, last) == (False, PLAIN[1])


@pytest.mark.parametrize("length", [2, 3])
def test_turn_that_prompt_and_completion_divide_is_bad_and_says_so(length: int) -> None:
    turns = chat(calling(CALL), tool("4"), GPT)["messages"]
    with pytest.raises(BadRow, match=r"split_turn: .* write all turns as 'messages'"):
        turns_of({"prompt": turns[:length], "completion": turns[length:]})
    assert len(turns_of({"prompt": turns[:1], "completion": turns[1:]})) == 2


@pytest.mark.parametrize("key", ["weight", "loss_weight"])
def test_turn_with_a_weight_of_zero_is_not_trained(key: str) -> None:
    row = chat({**GPT, key: 0.0}, {**USER, key: 0.0}, {**GPT, key: 1.0}, {**USER, key: 1}, GPT)
    trained = [m.train for m in turns_of(row) if m.role == "assistant"]
    assert trained == [False, True, True]
    with pytest.raises(BadRow, match=f"bad_weight: {key} -0.5; a weight is a number from 0"):
        turns_of(chat({**GPT, key: -0.5}))


@pytest.mark.parametrize(
    "turns",
    [
        [calling(CALL), tool("4"), GPT],
        [calling({**CALL, "arguments": {"a": 2, "b": 2}}, content=""), tool(" 4\n"), GPT],
        [{"role": "assistant", "content": None, "function_call": CALL},
         {"role": "function", "name": "add", "content": "4"}, GPT],
        [{"role": "function_call", "content": json.dumps(CALL)},
         {"role": "observation", "content": "4"}, GPT],
        [{"role": "assistant", "content": [{"type": "tool_call", "value": json.dumps(CALL)}]},
         tool([{"type": "text", "text": "4"}]), GPT],
    ],
)  # fmt: skip
def test_call_observation_and_answer_are_one_assistant_turn(turns: list[dict[str, Any]]) -> None:
    assert answer(chat(*turns)) == STEP.format(STOCK, " 4") + END


def test_sharegpt_calls_are_read_like_those_of_messages() -> None:
    turns = [("human", "2 + 2?"), ("function_call", json.dumps([CALL])), ("observation", "4")]
    row = {"conversations": [{"from": f, "value": v} for f, v in [*turns, ("gpt", "4")]]}
    assert answer(row) == STEP.format(STOCK, " 4") + END


@pytest.mark.parametrize(
    ("turns", "thought"),
    [
        ([calling(CALL, content="Add.")], "Add."),
        ([calling(CALL, content="Thought: Add.\n")], "Add."),
        ([calling(CALL, content="Add.", reasoning_content="Hm.")], "Hm.\n\nAdd."),
        ([{"role": "assistant", "content": "Add."}, calling(CALL)], "Add."),
        ([calling(CALL, content=" ")], STOCK),
    ],
)
def test_text_beside_a_call_is_its_thought(turns: list, thought: str) -> None:
    assert answer(chat(*turns, tool("4"), GPT)) == STEP.format(thought, " 4") + END


def test_calls_made_together_are_written_one_after_another_with_their_own_results() -> None:
    other = {"name": "subtract", "arguments": ""}
    first = STEP.format("Both.", " 4")
    second = "Thought: I need to call subtract.\nAction: subtract\nAction Input: {}\nObservation: 0"
    both = calling(CALL, other, content="Both.")
    assert answer(chat(both, tool("4"), tool("0"), GPT)) == f"{first}\n{second}{END}"
    # Results in another order belong to the calls that they name.
    named = [tool("0", tool_call_id="1"), tool("4", tool_call_id="0")]
    assert answer(chat(both, *named, GPT)) == f"{first}\n{second}{END}"


def test_numbers_are_ids_of_calls_too() -> None:
    both = calling(CALL, {"name": "subtract", "arguments": ""})
    for number, call in enumerate(both["tool_calls"]):
        call["id"] = number
    turns = [both, tool("0", tool_call_id=1), tool("4", tool_call_id=0), GPT]
    assert f"Action: subtract\nAction Input: {{}}\nObservation: 0{END}" in answer(chat(*turns))


def test_each_of_calls_made_together_keeps_the_thought_before_it() -> None:
    def part(number: int) -> dict[str, Any]:
        call = {"name": "add", "arguments": {"a": number}}
        return {"type": "tool_call", "value": json.dumps(call)}

    def step(thought: str, number: int, result: str) -> str:
        head = f'Thought: {thought}\nAction: add\nAction Input: {{"a": {number}}}'
        return f"{head}\nObservation: {result}\n"

    reasoning = {"type": "reasoning", "value": "Hm."}
    text = [{"type": "text", "value": value} for value in ("First.", "Then.", "Done.")]
    content = [reasoning, text[0], part(1), text[1], part(2), part(3), text[2]]
    turns = [{"role": "assistant", "content": content}, *map(tool, "123")]
    expected = step("Hm.\n\nFirst.", 1, "1") + step("Then.", 2, "2") + step("Done.", 3, "3")
    assert answer(chat(*turns, GPT)) == expected.removesuffix("\n") + END


DECLARED = "Use tools.\n\nAction: the tool to use, one of [weather, now]\nAction Input: JSON\n\n"
TRACE = (
    "Thought: Look.\nAction: weather\nAction Input: {}\nObservation: Action Input: cold\n"
    "Observation: snow\nThought: Now.\nAction: now\nAction Input:\n{}\nObservation: 12:00\n"
    "Thought: Done.\nFinal Answer: Cold at\nObservation: noon"
)


def is_trajectory(question: str, text: str, **keys: Any) -> bool:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return turns_of({"messages": turns, **keys})[-1].trajectory


@pytest.mark.parametrize(
    "text",
    [
        TRACE,
        "\n" + TRACE,
        TRACE.removeprefix("Thought: Look.\n"),
        "I will look.\n" + TRACE,
        "I will look.\n\n" + TRACE.removeprefix("Thought: Look.\n"),
        TRACE.partition("\nFinal Answer:")[0],
        TRACE.partition(" 12:00")[0],
        TRACE.partition("\nObservation: 12:00")[0],
    ],
)
def test_react_text_with_declared_tools_is_a_trajectory(text: str) -> None:
    assert is_trajectory(DECLARED + "Question: Is it cold?", text)
    assert is_trajectory("Is it cold?", text, system=DECLARED)
    assert is_trajectory("Is it cold?", text, tools=[{"name": "weather"}, {"name": "now"}])
    assert not is_trajectory("What is ReAct?", text)


@pytest.mark.parametrize(
    "text",
    [
        f"This is how it looks:\n\n{TRACE}",
        TRACE.replace("Action: now", "Action: calendar"),
        TRACE.replace("Action: now", "Action: the tool to use"),
        TRACE.replace("Action Input: {}\nObs", "Obs"),
        TRACE.replace("\nAction: weather", ""),
        TRACE.replace("\nObservation: 12:00", ""),
        TRACE.replace("\n", "\n> "),
        "Thought: each step holds an Action Input:, and then comes\nObservation: its text",
    ],
)
def test_answer_that_only_explains_the_form_is_no_trajectory(text: str) -> None:
    assert not is_trajectory(DECLARED + "Question: What is ReAct?", text)


def test_answer_may_go_on_with_the_thought_that_ends_the_question() -> None:
    text = TRACE.removeprefix("Thought:").replace("Look.", "Look:")
    assert is_trajectory(DECLARED + "Question: Is it cold?\nThought:", text)
    assert not is_trajectory(DECLARED + "Question: Is it cold?", text)


def test_tools_may_be_declared_with_their_parameters() -> None:
    declared = DECLARED.replace("[weather,", "[weather (city, day),")
    assert is_trajectory(declared + "Question: Is it cold?", TRACE)


def test_calls_are_a_trajectory_without_any_declared_tool() -> None:
    (_, first, _, second) = turns_of(chat(calling(CALL), tool("4"), GPT, USER, GPT))
    assert (first.trajectory, second.trajectory) == (True, False)


def test_trajectories_of_the_samples_are_recognised() -> None:
    lines = (ROOT / "moi_jax" / "data" / "samples" / "tools.jsonl").read_text(encoding="utf-8")
    answers = [turns_of(json.loads(line))[-1] for line in lines.splitlines()]
    assert len(answers) > 100
    for message in answers:
        assert message.trajectory == ("\nObservation:" in message.content)


def test_last_call_may_stay_unanswered_and_ends_where_generation_stops() -> None:
    assert answer(chat(calling(CALL))) == STEP.format(STOCK, "")
    row = chat(calling(CALL), tool("3"), calling(CALL, content="Again."))
    assert answer(row) == STEP.format(STOCK, " 3") + "\n" + STEP.format("Again.", "")


def test_tools_and_form_stand_before_the_first_question_alone() -> None:
    parameters = {"type": "object", "properties": {"a": {"type": "number"}}}
    listed = [
        {"type": "function",
         "function": {"name": "add", "description": "Adds é.", "parameters": parameters}},
        {"name": "now"},
    ]  # fmt: skip
    row = chat(GPT, {"role": "user", "content": "Sure?"}, GPT, tools=listed)
    first, *rest = turns_of(row)
    assert rest == [PLAIN[1], Message("user", "Sure?"), PLAIN[1]]
    assert f"\n\nadd: Adds é. Parameters: {json.dumps(parameters)}\nnow: Parameters: {{}}\n\n" in (
        first.content
    )
    assert "one of [add, now]\n" in first.content
    assert first.content.endswith("\n\nBegin!\n\nQuestion: 2 + 2?")
    del row["tools"]
    for same in ({"tools": json.dumps(listed)}, {"functions": listed}):
        assert turns_of({**row, **same}) == (first, *rest)


def test_reasoning_in_a_row_with_tools_is_the_last_thought() -> None:
    row = chat({**GPT, "reasoning_content": "Easy."}, tools=[{"name": "add"}])
    assert turns_of(row)[1].content == "Thought: Easy.\nFinal Answer: 4"


def test_words_of_the_form_inside_a_text_are_moved_off_the_line_start() -> None:
    forged = "a\nThought: b\nAction: c\nAction Input: d\nObservation: e\nFinal Answer: f"
    moved = "a\n Thought: b\n Action: c\n Action Input: d\n Observation: e\n Final Answer: f"
    row = chat(calling(CALL, content=forged), tool(forged), {**GPT, "content": forged})
    expected = STEP.format(moved, f" {moved}") + END.replace("4", moved)
    assert answer(row) == expected
    # The mask of observations sees the one there is, whole.
    (found,) = OBSERVATION.finditer(expected)
    assert found.group(1) == f" {moved}"


def test_trajectory_marked_untrained_is_untrained_as_a_whole() -> None:
    row = chat(calling(CALL, weight=0), tool("4"), {**GPT, "train": False}, USER, GPT)
    assert [m.train for m in turns_of(row)] == [True, False, True, True]


def toolbench(*prefixes: list[dict[str, Any]]) -> dict[str, Any]:
    functions = [{"name": "add"}, {"name": "Finish"}]
    return {"answer_generation": {"train_messages": list(prefixes), "function": functions}}


def test_toolbench_answer_is_its_longest_chat_with_finish_as_the_answer() -> None:
    head = [{"role": "system", "content": "You are AutoGPT"}]
    head += [{"role": "user", "content": "\n2 + 2?\nBegin!\n"}]
    step = [{"role": "assistant", "content": None, "function_call": CALL}]
    step += [{"role": "function", "name": "add", "content": "4"}]
    arguments = json.dumps({"return_type": "give_answer", "final_answer": "4"})
    finish = {"name": "Finish", "arguments": arguments}
    last = {"role": "assistant", "content": "Done.", "function_call": finish}
    question, message = turns_of(toolbench([*head, step[0]], [*head, *step, last]))
    assert "one of [add]\n" in question.content
    assert question.content.endswith("\n\nQuestion: 2 + 2?")
    assert message.content == STEP.format(STOCK, " 4") + "\nThought: Done.\nFinal Answer: 4"
    finish["arguments"] = '{"return_type": "give_up_and_restart"}'
    with pytest.raises(BadRow, match="gave_up"):
        turns_of(toolbench([*head, *step, last]))


@pytest.mark.parametrize("found", [None, {}, {"train_messages": []}, {"train_messages": [{}]}])
def test_toolbench_answer_without_a_chat_is_bad(found: Any) -> None:
    with pytest.raises(BadRow, match="missing_field"):
        turns_of({"answer_generation": found})


def node(text: str, rank: Any = None, *replies: dict[str, Any], **keys: Any) -> dict[str, Any]:
    role = "prompter" if text.endswith("?") else "assistant"
    return {"role": role, "text": text, "rank": rank, "replies": list(replies), **keys}


def test_oasst_tree_is_its_best_ranked_path_up_to_an_assistant() -> None:
    tree = node(
        "2 + 2?", None,
        node("22", None),
        node("5", 1, node("Really?", None, node("Yes.", 0))),
        node("3", 0, deleted=True),
        node("4", 0, node("Sure?", None, node("No.", None), node("Yes.", None)), node("Why?", 2)),
    )  # fmt: skip
    row = {"message_tree_id": "x", "prompt": tree}
    assert turns_of(row) == PLAIN  # a prompter's turn at the end is trimmed
    tree["replies"][3]["replies"].pop()
    assert [m.content for m in turns_of(row)] == ["2 + 2?", "4", "Sure?", "No."]


def flat(tree: dict[str, Any], parent: str | None = None) -> list[dict[str, Any]]:
    """The messages of a tree, one in each row, as OpenAssistant's flat files have them."""
    name = f"{parent or ''}/{tree['text']}"
    row = {"message_id": name, "parent_id": parent, "message_tree_id": "t", **tree}
    replies = row.pop("replies")
    return [row, *(message for reply in replies for message in flat(reply, name))]


def test_flat_messages_are_read_as_the_trees_that_they_form(tmp_path: Path) -> None:
    trees = [
        node("2 + 2?", None, node("22", 1), node("4", 0, node("Sure?", None, node("Yes.", None)))),
        node("Hi?", None, node("Bye.", math.nan), node("Hello.", 0), node("No.", 1, deleted=True)),
        node("Alone?"),
    ]
    nested = [
        to_conversation({"message_tree_id": "t", "prompt": tree}, FORMATS["oasst"])
        for tree in trees[:2]
    ]
    rows_ = [message for tree in trees for message in flat(tree)]
    lost = {"message_id": "x", "parent_id": "gone", "role": "assistant", "text": "Lost."}
    lines = [json.dumps(row).replace("NaN", "null") for row in [*rows_[:3], lost, *rows_[3:]]]
    (tmp_path / "a.jsonl").write_text("\n".join([*lines, "{oops"]))
    file = SourceFile("a.jsonl", tmp_path / "a.jsonl")
    assert rows.detect_format(file) == "oasst_messages"
    assert not rows.splittable(file, "oasst_messages")
    found = list(rows.source_rows(file, "oasst_messages"))
    kept = [
        (row.conversation, row.trimmed)
        for row in found
        if isinstance(row.conversation, Conversation)
    ]
    assert kept == nested
    bad = [
        (row.line, row.conversation.reason) for row in found if isinstance(row.conversation, BadRow)
    ]
    assert sorted(bad) == [(4, "unknown_parent"), (11, "no_assistant"), (12, "invalid_json")]
    assert sum(row.size for row in found) == file.size


def test_rank_that_pandas_wrote_as_nan_is_no_rank() -> None:
    tree = node("2 + 2?", None, node("22", math.nan), node("4", 0.0))
    assert turns_of({"message_tree_id": "x", "prompt": tree}) == PLAIN


def test_oasst_tree_of_any_depth_is_read() -> None:
    tree: dict[str, Any] = {}
    for depth in range(20_000, 0, -1):
        tree = node("a?" if depth % 2 else "b", 0, *([tree] if tree else []))
    assert len(turns_of({"message_tree_id": "x", "prompt": tree})) == 20_000


def test_seed_task_is_its_first_instance() -> None:
    instances = [{"input": "", "output": "4"}, {"input": "x", "output": "5"}]
    assert turns_of({"instruction": "2 + 2?", "instances": instances}) == PLAIN
    with pytest.raises(BadRow, match="missing_field"):
        turns_of({"instruction": "2 + 2?", "instances": []})


@cache
def tokenizer():
    return load_tokenizer(ROOT / "moi_jax" / "data" / "samples" / "tokenizer")


def rendered(conversation: Conversation) -> str:
    """The tokens as text, what carries loss between ⟦ and ⟧, as the page shows them."""
    prompt = "You are a helpful assistant."
    ((row,),) = rendering.render([conversation], tokenizer(), prompt, "append")
    labels = label_mask(row, "assistant").tolist()
    text, begin = "", 0
    for end in range(1, len(labels) + 1):
        if end == len(labels) or labels[end] != labels[begin]:
            piece = tokenizer().decode(row.tokens[begin:end])
            text += f"⟦{piece}⟧" if labels[begin] else piece
            begin = end
    return text


def test_observations_of_a_trajectory_carry_no_loss_and_an_explanation_carries_loss_whole() -> None:
    def of(question: str, text: str) -> str:
        row = {"question": question, "answer": text}
        conversation, _ = to_conversation(row, FORMATS["question_answer"])
        return rendered(conversation).partition("assistant\n")[2]

    masked = TRACE.replace(": Action Input: cold\nObservation: snow", ":")
    masked = masked.replace("12:00", "")
    found = of(DECLARED + "Question: Is it cold?", TRACE)
    labels = "".join(re.findall(r"⟦(.*?)⟧", found, re.S))
    assert labels == masked.replace(": \n", ":\n") + "<|im_end|>"
    for question in ("What is ReAct?", DECLARED + "Question: What is ReAct?"):
        assert of(question, f"So:\n{TRACE}") == f"⟦So:\n{TRACE}<|im_end|>⟧\n"


SECTIONS = re.findall(r"^### `(\w+)`(.*?)(?=^##)", PAGE, re.M | re.S)
EXAMPLES = [
    (name, row, text)
    for name, section in SECTIONS
    for row, text in re.findall(r"```json\n(.*?)```\n\n```text\n(.*?)```\n", section, re.S)
]


def test_page_has_a_row_of_every_format() -> None:
    assert {name for name, _, _ in EXAMPLES} == FORMATS.keys()


@pytest.mark.parametrize(("name", "row", "text"), EXAMPLES)
def test_row_of_the_page_is_read_as_the_page_says(
    tmp_path: Path, name: str, row: str, text: str
) -> None:
    (tmp_path / "row.json").write_text(row, encoding="utf-8")
    file = SourceFile("row.json", tmp_path / "row.json")
    assert rows.detect_format(file) == name
    (found,) = rows.source_rows(file, name)
    conversation = found.conversation
    assert isinstance(conversation, Conversation), conversation
    assert rendered(conversation) == text


def test_page_tells_every_reason() -> None:
    modules = [*(ROOT / "moi_jax" / "data").rglob("*.py")]
    code = "\n".join(path.read_text(encoding="utf-8") for path in modules)
    reasons = set(re.findall(r'BadRow\(\s*"(\w+)"', code))
    reasons |= set(re.findall(r'(?<!\.)(?:decode|compact|named_function)\(.*"(\w+)"\)', code))
    assert len(reasons) >= 30
    table = PAGE[PAGE.index("## What is dropped") :]
    assert [reason for reason in sorted(reasons) if f"`{reason}`" not in table] == []
