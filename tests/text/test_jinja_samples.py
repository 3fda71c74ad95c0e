"""Samples under small templates of our own: shapes, rewritten history, weights, other prompts."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moi_jax.text.conversations import BadRow, Conversation, Message, ToolCall
from moi_jax.text.instructions import Instruction, Rendering, token_weights
from moi_jax.text.jinja import rendering as jinja_rendering
from moi_jax.text.jinja.samples import Sampler
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.rendering import first_exchanges, render, render_prompt, with_system_prompt
from moi_jax.text.tokenizer import Tokenizer, load_tokenizer

from support.tokenizers import SAMPLES, with_specials

CHATML = load_tokenizer(SAMPLES / "tokenizer")
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
# Thinking only of the last message, calls in braces, results in a turn of the user.
THINKING = (
    "{% if tools %}<|im_start|>tools\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ 'user' if m.role == 'tool' else m.role }}\n"
    "{% if loop.last and m.reasoning_content %}<think>{{ m.reasoning_content }}</think>{% endif %}"
    "{{ m.content }}{% for c in m.tool_calls or [] %}"
    "{{ '{' + c.function.name + c.function.arguments | tojson + '}' }}{% endfor %}<|im_end|>\n"
    "{% endfor %}" + PROMPT
)
# What stands before a turn, how many special tokens it has, and what is left of it later, depend on
# the words of the chat.
WORDY = {
    "questions before the answer": (
        "{% for m in messages %}{% if m.role == 'user' %}{{ 'Q: ' + m.content + ' A: ' }}"
        "{% else %}{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    ),
    "a token for each line": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% for line in m.content.split('\n') %}{{ line }}<|endoftext|>{% endfor %}<|im_end|>"
        "{% endfor %}" + PROMPT
    ),
    "thinking in the text": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and '</think>' in m.content and not loop.last %}"
        "{{ m.content.split('</think>')[-1] }}"
        "{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}" + PROMPT
    ),
}
# A system text in the last question only, and ids of nine letters, as Mistral's templates have it.
LAST_QUESTION = (
    "{% set system = messages[0].content if messages[0].role == 'system' else '' %}{{ bos_token }}"
    "{% if tools %}[TOOLS]{{ tools | tojson }}[/TOOLS]{% endif %}"
    "{% for m in messages if m.role != 'system' %}"
    "{% if m.role == 'user' %}[INST]"
    "{% if loop.last and system %}{{ system + '\n\n' }}{% endif %}{{ m.content }}[/INST]"
    "{% elif m.role == 'tool' %}[RESULT]{{ m.tool_call_id + m.content }}[/RESULT]"
    "{% elif m.tool_calls %}{% for c in m.tool_calls %}"
    "{% if c.id | length != 9 %}{{ raise_exception('ids have nine letters') }}{% endif %}"
    "[CALL]{{ c.id + c.function | tojson }}{% endfor %}</s>"
    "{% else %}{{ m.content }}</s>{% endif %}{% endfor %}"
)
TOOL = json.dumps({"type": "function", "function": {"name": "weather", "parameters": {}}})


def thinking(template: str = THINKING) -> Tokenizer:
    files = {**CHATML.files, "tokenizer_config.json": json.dumps({"chat_template": template})}
    return Tokenizer.from_files(files)


def last_question() -> Tokenizer:
    specials = ("<s>", "</s>", "[INST]", "[/INST]", "[CALL]", "[RESULT]", "[/RESULT]", "[TOOLS]")
    chosen = {"bos_token": "<s>", "eos_token": "</s>", "chat_template": LAST_QUESTION}
    files = {"tokenizer.json": with_specials(*specials, "[/TOOLS]")}
    return Tokenizer.from_files({**files, "tokenizer_config.json": json.dumps(chosen)})


def user(text: str) -> Message:
    return Message("user", text)


def answer(text: str, thought: str = "", weight: float = 1.0) -> Message:
    return Message("assistant", text, thinking=thought, weight=weight)


def texts(samples: list[Instruction] | BadRow, tokenizer: Tokenizer) -> list[str]:
    """The samples, with what is trained in double angle brackets."""
    assert not isinstance(samples, BadRow), samples
    shown = []
    for sample in samples:
        ids, at, text = sample.tokens.tolist(), 0, ""
        for start, end, _ in sample.spans.tolist():
            text += tokenizer.decode(ids[at:start]) + f"«{tokenizer.decode(ids[start:end])}»"
            at = end
        shown.append(text + tokenizer.decode(ids[at:]))
    return shown


def test_a_system_text_in_the_last_question_stands_in_a_sample_of_each_turn() -> None:
    tokenizer = last_question()
    chats = [
        Conversation((user(f"a{n}"), answer(f"b{n}"), user(f"c{n}"), answer(f"d{n}")))
        for n in range(3)  # from the second on their shape is known
    ]
    for n, samples in enumerate(render(chats, tokenizer, "Hi.", "append")):
        assert texts(samples, tokenizer) == [
            f"<s>[INST]Hi.\n\na{n}[/INST]«b{n}</s>»",
            f"<s>[INST]a{n}[/INST]b{n}</s>[INST]Hi.\n\nc{n}[/INST]«d{n}</s>»",
        ]
    (alone,) = render(chats[:1], tokenizer, None, "append")
    assert texts(alone, tokenizer) == ["<s>[INST]a0[/INST]«b0</s>»[INST]c0[/INST]«d0</s>»"]


def test_ids_of_calls_become_what_the_template_takes() -> None:
    tokenizer = last_question()
    call = Message("assistant", "", calls=(ToolCall("weather", "{}", "call_7"),))
    result = Message("tool", "3", call_id="call_7", name="weather")
    chat = Conversation((user("a"), call, result, answer("b")), (TOOL,))
    (samples,) = render([chat], tokenizer, None, "append")
    (text,) = texts(samples, tokenizer)
    made = text.partition("«[CALL]")[2][:9]
    assert made.isalnum()
    assert f"[RESULT]{made}3[/RESULT]«b</s>»" in text
    own = replace(call, calls=(call.calls[0]._replace(id="abcdefghi"),))
    (samples,) = render([Conversation((user("a"), own), (TOOL,))], tokenizer, None, "append")
    assert "[CALL]abcdefghi{" in texts(samples, tokenizer)[0]


WORDS = st.sampled_from(["ab", "cd e", "y\nz", "e</think>d", " é"])
TURN = st.tuples(WORDS, WORDS, st.sampled_from(["", "why"]))
# Of two turns each, so that many chats have the same shape and other words.
CHATS = st.lists(st.tuples(TURN, TURN), min_size=8, max_size=16)


TEMPLATES = {name: thinking(text).template for name, text in {"": THINKING, **WORDY}.items()}


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@settings(deadline=None, max_examples=50)
@given(chats=CHATS)
def test_samples_of_a_known_shape_are_those_of_whole_renderings(
    template: JinjaTemplate, chats: list
) -> None:
    sampler = Sampler(template, "keep", "split")
    for turns in chats:
        messages: list[Message] = []
        for question, said, thought in turns:
            messages += [user(question), answer(said, thought)]
        chat = Conversation(tuple(messages))
        assert sampler.samples(chat) == sampler.exact_samples(chat)


def test_each_thought_is_trained_in_a_sample_of_its_own() -> None:
    tokenizer = thinking()
    chat = Conversation((user("a"), answer("b", "1"), user("c"), answer("d", "2")))
    begun = "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    second = "b<|im_end|>\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n"
    expected = {
        ("keep", "split"): [
            begun + "«<think>1</think>b<|im_end|>»\n",
            begun + second + "«<think>2</think>d<|im_end|>»\n",
        ],
        ("keep", "last"): [begun + second + "«<think>2</think>d<|im_end|>»\n"],
        ("last", "split"): [
            begun + f"«{second[:11]}»{second[11:]}" + "«<think>2</think>d<|im_end|>»\n"
        ],
        ("drop", "split"): [begun + f"«{second[:11]}»{second[11:]}" + "«d<|im_end|>»\n"],
    }
    for (kept, history), wanted in expected.items():
        (samples,) = render([chat], tokenizer, None, "append", Rendering(kept, history))
        assert texts(samples, tokenizer) == wanted, (kept, history)
    (refused,) = render([chat], tokenizer, None, "append", Rendering("keep", "refuse"))
    assert isinstance(refused, BadRow)
    assert refused.reason == "rewritten_history"


def test_another_system_prompt_gives_the_same_samples_and_weights() -> None:
    tokenizer = thinking()
    chat = Conversation((user("a"), answer("b", "1", 0.5), user("c"), answer("d", "2", 3.0)))
    (before,) = render([chat], tokenizer, "One.", "append")
    (wanted,) = render([chat], tokenizer, "Two words.", "append")
    assert not isinstance(before, BadRow)
    assert not isinstance(wanted, BadRow)
    for sample, other in zip(before, wanted, strict=True):
        found = with_system_prompt(sample, tokenizer, "Two words.", "append")
        assert found.tokens.tolist() == other.tokens.tolist()
        assert found.spans.tolist() == other.spans.tolist()
        assert found.conversation == other.conversation
    weights = [set(token_weights(sample, "assistant").tolist()) - {0} for sample in before]
    assert weights == [{0.5}, {3.0}]


def test_a_conversation_is_cut_after_whole_exchanges() -> None:
    tokenizer = thinking()
    result = Message("tool", "3", name="weather")
    call = Message("assistant", "", calls=(ToolCall("weather", "{}"),))
    chat = Conversation((user("a"), call, result, answer("b"), user("c"), answer("d")), (TOOL,))
    ((whole,),) = render([chat], tokenizer, "Hi.", "append")
    ((first,),) = render([chat.first_exchanges(1)], tokenizer, "Hi.", "append")
    limit = len(whole.tokens) - 1
    found, count = first_exchanges(chat, whole, tokenizer, "Hi.", "append", limit)
    assert count == 1
    assert found.tokens.tolist() == first.tokens.tolist()
    assert first_exchanges(chat, whole, tokenizer, "Hi.", "append", 5)[1] == 0


def test_special_tokens_in_a_question_are_text_in_a_prompt() -> None:
    tokenizer = thinking()
    ids = render_prompt([user("a <|im_end|> b")], tokenizer, None)
    assert tokenizer.decode(ids) == (
        "<|im_start|>user\na <|im_end|> b<|im_end|>\n<|im_start|>assistant\n"
    )
    assert np.sum(np.array(ids) == tokenizer.template.end) == 1


def test_special_tokens_stay_in_their_texts_where_a_template_moves_them() -> None:
    tokenizer = last_question()
    chat = [Message("system", "s </s>"), user("a <s>"), answer("b"), user("c")]
    text = "<s>[INST]a <s>[/INST]b</s>[INST]s </s>\n\nc[/INST]"
    assert tokenizer.decode(render_prompt(chat, tokenizer, None)) == text


def test_what_is_left_of_a_long_conversation_is_trained_under_history_last() -> None:
    tokenizer = thinking()
    chat = Conversation((user("a"), answer("b", "1"), user("c"), answer("d", "2")))
    options = Rendering("keep", "last")
    ((whole,),) = render([chat], tokenizer, None, "append", options)
    limit = len(whole.tokens) - 1
    found, count = first_exchanges(chat, whole, tokenizer, None, "append", limit, options)
    assert count == 1
    assert texts([found], tokenizer)[0].endswith("«<think>1</think>b<|im_end|>»\n")


def test_marks_without_the_end_of_a_turn_never_hold_a_question() -> None:
    template = (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{% if loop.last %}<think></think>{% endif %}{{ m.content }}"
        "{% endgeneration %}{% else %}{{ m.content }}{% endif %}<|im_end|>{% endfor %}" + PROMPT
    )
    tokenizer = thinking(template)
    chat = Conversation((user("a"), answer("b"), user("secret"), answer("d")))
    for kept in ("keep", "last", "drop"):
        (samples,) = render([chat], tokenizer, None, "append", Rendering(kept))
        trained = [text.partition("«")[2] for text in texts(samples, tokenizer)]
        assert trained == ["<think></think>b»<|im_end|>", "<think></think>d»<|im_end|>"]


def test_a_sample_is_kept_as_json_without_a_loss() -> None:
    call = Message("assistant", "", calls=(ToolCall("weather", '{"a": "世界"}', "1"),), weight=0.5)
    chat = Conversation(
        (Message("system", "s"), user("a"), call, Message("tool", "3", call_id="1"), answer("b")),
        (TOOL,),
    )
    assert jinja_rendering.from_json(jinja_rendering.to_json(chat, "last")) == (chat, "last")


@pytest.mark.parametrize("text", ["<|im_end|>", "<|endoftext|>"])
def test_the_templates_own_tokens_in_a_row_are_refused(text: str) -> None:
    (refused,) = render(
        [Conversation((user("a"), answer(f"b {text}")))], thinking(), None, "append"
    )
    assert isinstance(refused, BadRow)
    assert refused.reason == "control_tokens"
