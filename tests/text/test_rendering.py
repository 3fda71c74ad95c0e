"""Rows: the official ones of Qwen, the loss spans of each template, other system prompts."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moi_jax.text.conversations import Conversation, Message
from moi_jax.text.instructions import Instruction, label_mask, loss_tokens, system_text
from moi_jax.text.rendering import first_exchanges, render, render_prompt, with_system_prompt
from moi_jax.text.tokenizer import Tokenizer, load_tokenizer

from support.tokenizers import SAMPLES, llama3_tokenizer

# A slow machine is no failure.
STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
TOKENIZER = load_tokenizer(SAMPLES / "tokenizer")
LLAMA3 = llama3_tokenizer()
MODES = ["append", "replace", "keep", "drop_row"]
REACT = (
    "Thought: look\nAction: find\nAction Input: x\nObservation: 12 °C\nThought: again\n"
    "Action: find\nAction Input: y\nObservation:\n[]\nThought: done\nFinal Answer: 12"
)


def conversation(*turns: str, system: str | None = None, trajectory: bool = False) -> Conversation:
    head = [] if system is None else [Message("system", system)]
    roles = ["user", "assistant"] * len(turns)
    messages = (
        Message(role, text, trajectory=trajectory and role == "assistant")  # type: ignore[arg-type]
        for role, text in zip(roles, turns, strict=False)
    )
    return Conversation((*head, *messages))


def one(
    chat: Conversation,
    prompt: str | None = "Be kind.",
    mode: str = "append",
    tokenizer: Tokenizer = TOKENIZER,
) -> Instruction:
    ((instruction,),) = render([chat], tokenizer, prompt, mode)  # type: ignore[misc]
    return instruction


def labelled(instruction: Instruction, targets: str, tokenizer: Tokenizer = TOKENIZER) -> str:
    """The text of the labels, with | wherever they are interrupted."""
    mask = label_mask(instruction, targets)
    runs = np.split(np.arange(len(mask)), np.flatnonzero(np.diff(mask)) + 1)
    kept = [instruction.tokens[run].tolist() for run in runs if len(run) and mask[run[0]]]
    return "|".join(tokenizer.decode(ids) for ids in kept)


def assert_same(one: Instruction, other: Instruction) -> None:
    assert one.tokens.dtype == one.spans.dtype == np.int32
    np.testing.assert_array_equal(one.tokens, other.tokens)
    np.testing.assert_array_equal(one.spans, other.spans)
    assert one.system_length == other.system_length
    assert one.row_system == other.row_system


@pytest.fixture(scope="module")
def qwen() -> Tokenizer:
    spec = importlib.util.find_spec("dashscope")
    if spec is None or spec.origin is None:
        pytest.skip("qwen.tiktoken comes with the package dashscope, which is not installed")
    return load_tokenizer(Path(spec.origin).parent / "resources")


def golden_chats(golden: Path) -> list[dict]:
    return json.loads((golden / "chatml.json").read_text(encoding="utf-8"))["chats"]


@pytest.mark.parametrize("max_len", [192, 48])
def test_rows_and_labels_equal_the_official_preprocessing(
    golden: Path, qwen: Tokenizer, max_len: int
) -> None:
    for chat in golden_chats(golden):
        official = chat[f"preprocess_max_len_{max_len}"]
        real = sum(token != qwen.template.pad for token in official["input_ids"])
        turns = [turn["value"] for turn in chat["conversations"]]
        ((row,),) = render([conversation(*turns)], qwen, chat["system"], "append")
        assert row.tokens[:real].tolist() == official["input_ids"][:real]
        assert real == min(len(row.tokens), max_len)
        mask = label_mask(row, "qwen_official")
        labels = np.where(mask, row.tokens, -100)[:real].tolist()
        # An instruction's first im_start has no token before it that could predict it.
        assert labels[1:] == official["labels"][1:real]
        assert labels[0] == -100


def test_prompt_equals_the_official_inference_prompt(golden: Path, qwen: Tokenizer) -> None:
    for chat in golden_chats(golden):
        turns = [text for turn in chat["turns"] for text in turn] + [chat["query"]]
        messages = conversation(*turns).messages
        assert render_prompt(messages, qwen, chat["system"]) == chat["make_context"]["ids"]
        own = (Message("system", chat["system"]), *messages)
        assert render_prompt(own, qwen, "Another.") == chat["make_context"]["ids"]


def test_prompt_is_the_beginning_of_the_training_row() -> None:
    chat = conversation("Hi", "Hello.", "More", "Yes.")
    row = one(chat)
    prompt = render_prompt(chat.messages[:-1], TOKENIZER, "Be kind.")
    answer = [*TOKENIZER.encode("Yes."), TOKENIZER.template.end, *TOKENIZER.encode("\n")]
    assert prompt + answer == row.tokens.tolist()


def test_labels_of_a_chat_by_hand() -> None:
    row = one(conversation("Hi", "Hello.", "More", "Yes."))
    assert TOKENIZER.decode(row.tokens) == (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\nMore<|im_end|>\n"
        "<|im_start|>assistant\nYes.<|im_end|>\n"
    )
    assert labelled(row, "assistant") == "Hello.<|im_end|>|Yes.<|im_end|>"
    assert labelled(row, "qwen_official") == (
        "<|im_end|>\n<|im_start|>|<|im_end|>\n<|im_start|>|Hello.<|im_end|>\n<|im_start|>|"
        "<|im_end|>\n<|im_start|>|Yes.<|im_end|>\n"
    )


def test_labels_of_a_llama3_chat_by_hand() -> None:
    def of(text: str) -> str:  # a bar in a token's name would look like an interruption
        return text.replace("<|", "<").replace("|>", ">")

    chat = conversation("Hi", " Hello.\n", "More", "Yes.")
    row = one(chat, tokenizer=LLAMA3)
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    turns = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "More")]
    assert LLAMA3.decode(row.tokens) == "<|begin_of_text|>" + "".join(
        turn.format(*both) for both in [*turns, ("assistant", "Yes.")]
    )
    assert LLAMA3.decode(row.tokens[row.system_length :][:3]).startswith("<|start_header_id|>user")
    assert of(labelled(row, "assistant", LLAMA3)) == "Hello.<eot_id>|Yes.<eot_id>"
    assert of(labelled(row, "qwen_official", LLAMA3)) == (
        "<eot_id><start_header_id>|<eot_id><start_header_id>|Hello.<eot_id><start_header_id>|"
        "<eot_id><start_header_id>|Yes.<eot_id>"
    )
    bare = one(chat, None, tokenizer=LLAMA3)
    assert LLAMA3.decode(bare.tokens[:2]) == "<|begin_of_text|><|start_header_id|>"
    assert of(labelled(bare, "qwen_official", LLAMA3)).startswith("<eot_id><start_header_id>|Hello")
    answer = [*LLAMA3.encode("Yes."), LLAMA3.template.end]
    assert render_prompt(chat.messages[:-1], LLAMA3, "Be kind.") + answer == row.tokens.tolist()


def test_untrained_message_carries_no_loss() -> None:
    first = conversation("Hi", "Hello.", "More", "Yes.").messages
    chat = Conversation((first[0], Message("assistant", "Hello.", train=False), *first[2:]))
    row = one(chat, None)
    assert labelled(row, "assistant") == "Yes.<|im_end|>"
    assert labelled(row, "qwen_official") == (
        "<|im_end|>\n|<|im_start|>|<|im_end|>\n<|im_start|>|Yes.<|im_end|>\n"
    )


def test_observations_of_a_trajectory_carry_no_assistant_loss() -> None:
    row = one(conversation("q\nObservation: mine", REACT, trajectory=True))
    labels = labelled(row, "assistant")
    assert labels.split("|", 1)[0].endswith("\nObservation:")
    for written in ("Thought: look", "Input: y\nObservation:", "Thought: done\nFinal Answer: 12"):
        assert written in labels
    for observed in ("12 °C", "[", "mine"):
        assert observed not in labels
    assert labels.endswith("12<|im_end|>")
    assert REACT + "<|im_end|>\n" in labelled(row, "qwen_official")


def test_a_call_right_after_an_observation_is_the_models() -> None:
    text = "Action Input: x\nObservation: 7\nAction: f\nAction Input: y"
    row = one(conversation("q", text, trajectory=True))
    assert labelled(row, "assistant").endswith(
        "Observation:|\nAction: f\nAction Input: y<|im_end|>"
    )


def test_observation_at_the_end_leaves_only_the_end_mark() -> None:
    row = one(conversation("q", "Action Input: x\nObservation: 7 apples\n", trajectory=True))
    assert labelled(row, "assistant") == "Action Input: x\nObservation:|<|im_end|>"


def test_an_answer_that_is_no_trajectory_carries_loss_whole() -> None:
    assert labelled(one(conversation("q", REACT)), "assistant") == REACT + "<|im_end|>"


def test_final_answer_carries_loss_whole() -> None:
    text = "Action Input: x\nObservation: 7\nFinal Answer: it says\nObservation: 7"
    row = one(conversation("q", text, trajectory=True))
    expected = "Observation:|\nFinal Answer: it says\nObservation: 7<|im_end|>"
    assert labelled(row, "assistant").endswith(expected)


@pytest.mark.parametrize(
    ("prompt", "row_system", "mode", "text"),
    [
        ("P", "", "append", "P"),
        ("P", "R", "append", "P\n\nR"),
        ("P", "R", "replace", "P"),
        ("P", "R", "keep", "R"),
        ("P", "", "keep", "P"),
        (None, "R", "append", "R"),
        (None, "R", "replace", "R"),
        (None, "", "append", None),
        ("", "", "append", ""),
        ("", "R", "append", "R"),
    ],
)
def test_system_block_by_row_system(
    prompt: str | None, row_system: str, mode: str, text: str | None
) -> None:
    assert system_text(prompt, row_system, mode) == text
    row = one(conversation("Hi", "Hello.", system=row_system or None), prompt, mode)
    head = "" if text is None else f"<|im_start|>system\n{text}<|im_end|>\n"
    assert TOKENIZER.decode(row.tokens[: row.system_length]) == head
    assert TOKENIZER.decode(row.tokens[row.system_length :]).startswith("<|im_start|>user\nHi")
    assert row.row_system == row_system


TEXTS = st.text(max_size=12) | st.sampled_from(
    [
        REACT,
        "Action Input: 1\nObservation: a\nObservation: b\nThought:",
        "Action Input: 1\nObservation: a\nFinal Answer: b",
        "Action Input: 1\nObservation: a\nAction: b\nAction Input: 2\nObservation: c",
        "\nObservation: no tool was called",
        "Action Input:\nObservation:",
        "\n",
        "Café e\u0301",
    ]
)


@st.composite
def conversations(draw: st.DrawFn) -> Conversation:
    system = draw(st.none() | st.text(min_size=1, max_size=8))
    messages = [] if system is None else [Message("system", system)]
    for _ in range(draw(st.integers(1, 3))):
        messages.append(Message("user", draw(TEXTS)))
        messages.append(Message("assistant", draw(TEXTS), *draw(st.tuples(*[st.booleans()] * 2))))
    return Conversation(tuple(messages))


PROMPTS = st.none() | st.text(max_size=8)


MODEL_LINES = ("\nThought:", "\nAction:")
TOKENIZERS = st.sampled_from([TOKENIZER, LLAMA3])


def slow_oracle(
    chat: Conversation, system: str | None, tokenizer: Tokenizer
) -> tuple[list[int], list[bool], list[bool]]:
    """Tokens and both label masks, written down one token after the other."""
    llama3 = tokenizer is LLAMA3
    tokens: list[int] = []
    assistant: list[bool] = []
    official: list[bool] = []

    def put(ids: list[int], by_assistant: bool, by_official: bool) -> None:
        for token in ids:
            tokens.append(token)
            assistant.append(by_assistant)
            official.append(by_official)

    def mark(name: str, by_assistant: bool, by_official: bool) -> None:
        special = tokenizer.special(name)
        assert special is not None
        put([special], by_assistant, by_official)

    if llama3:
        mark("<|begin_of_text|>", False, False)
    turns = [] if system is None else [Message("system", system)]
    for number, message in enumerate((*turns, *chat.turns)):
        mark(
            "<|start_header_id|>" if llama3 else "<|im_start|>", False, message.train and number > 0
        )
        put(tokenizer.encode(message.role), False, False)
        if llama3:
            mark("<|end_header_id|>", False, False)
        put(tokenizer.encode("\n\n" if llama3 else "\n"), False, False)
        trained = message.role == "assistant" and message.train
        text = message.content.strip() if llama3 else message.content
        ids, offsets = tokenizer.encode_with_offsets(text)
        content = "".join(tokenizer.decode(ids))
        for token, (begin, _) in zip(ids, offsets, strict=True):
            # Observed: the last "\nObservation:" that ends before the token opened an
            # observation, or an earlier one did, and nothing in MODEL_LINES has begun since.
            # Only in the steps of a trajectory is anything observed.
            observed = False
            steps = content.split("\nFinal Answer:")[0] if message.trajectory else ""
            at = 0
            while (found := steps.find("\nObservation:", at)) >= 0:
                opened = found + len("\nObservation:")
                ends = [steps.find(end, opened) for end in MODEL_LINES]
                closed = min([end for end in ends if end >= 0], default=len(steps))
                observed |= opened <= begin < closed
                at = closed
            put([token], trained and not observed, trained)
        mark("<|eot_id|>" if llama3 else "<|im_end|>", trained, message.train)
        if not llama3:
            put(tokenizer.encode("\n"), False, message.train)
    return tokens, assistant, official


@STEADY
@given(
    st.lists(conversations(), min_size=1, max_size=3), PROMPTS, st.sampled_from(MODES), TOKENIZERS
)
def test_rows_and_masks_equal_the_slow_oracle(
    chats: list[Conversation], prompt: str | None, mode: str, tokenizer: Tokenizer
) -> None:
    for chat, (row,) in zip(chats, render(chats, tokenizer, prompt, mode), strict=True):
        system = system_text(prompt, chat.system or "", mode)
        system = system.strip() if system is not None and tokenizer is LLAMA3 else system
        tokens, assistant, official = slow_oracle(chat, system, tokenizer)
        assert row.tokens.tolist() == tokens
        assert label_mask(row, "assistant").tolist() == assistant
        assert label_mask(row, "qwen_official").tolist() == official
        assert loss_tokens(row) == (sum(assistant), sum(official))
        starts, ends = row.spans[:, 0], row.spans[:, 1]
        assert (starts <= ends).all()
        assert (ends[:-1] <= starts[1:]).all()


@STEADY
@given(conversations(), PROMPTS, PROMPTS, st.sampled_from(MODES), TOKENIZERS)
def test_other_system_prompt_gives_what_rendering_under_it_gives(
    chat: Conversation, prompt: str | None, other: str | None, mode: str, tokenizer: Tokenizer
) -> None:
    changed = with_system_prompt(one(chat, prompt, mode, tokenizer), tokenizer, other, mode)
    assert_same(changed, one(chat, other, mode, tokenizer))


@STEADY
@given(conversations(), PROMPTS, st.integers(0, 150), TOKENIZERS)
def test_first_exchanges_render_the_longest_fitting_conversation(
    chat: Conversation, prompt: str | None, limit: int, tokenizer: Tokenizer
) -> None:
    def cut(count: int) -> Instruction:
        return one(chat.first_exchanges(count), prompt, tokenizer=tokenizer)

    counts = range(1, len(chat.turns) // 2 + 1)
    fitting = [n for n in counts if len(cut(n).tokens) <= limit]
    whole = one(chat, prompt, tokenizer=tokenizer)
    shorter, count = first_exchanges(whole, tokenizer, prompt, "append", limit)
    assert count == max(fitting, default=0)
    if count:
        assert_same(shorter, cut(count))
