"""Answers are read back as thinking, content and calls, in the form of any chat template."""

import json

import pytest

from moi_jax.text.answers import answer_lines, message_object, read_answer, split_thinking
from moi_jax.text.conversations import Message, ToolCall
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.jinja.tool_formats import describe_template, tool_format
from moi_jax.text.rendering import render_prompt

from support.tool_templates import TEMPLATES, WEATHER, with_calls

QUESTION = Message("user", "How is the weather?")
ARGUMENTS = (
    {"city": "Oslo", "days": 3},
    {"city": "Bern, \"the\" city = {'x': [1]}\n(near 世界)"},
    {},
)


@pytest.fixture(scope="module")
def tokenizers():
    return {name: with_calls(name) for name in TEMPLATES}


def written(template: JinjaTemplate, answer: Message) -> str:
    """What a model has to write for the answer, with the end of its turn."""
    before = template.chat_text((QUESTION,), (WEATHER,), generate=True)
    return template.chat_text((QUESTION, answer), (WEATHER,)).removeprefix(before)


@pytest.mark.parametrize("name", TEMPLATES)
def test_calls_are_read_as_they_were_written(tokenizers, name):
    template = tokenizers[name].template
    for arguments in ([each] for each in ARGUMENTS):
        check(template, arguments)
    if name != "llama3_json":
        check(template, ARGUMENTS[:2])


def check(template, arguments):
    text = json.dumps
    calls = tuple(
        ToolCall("weather", text(each, ensure_ascii=False), f"abcdefgh{n}")
        for n, each in enumerate(arguments)
    )
    answer = written(template, Message("assistant", "", calls=calls))
    for shown in (answer, answer.removesuffix("<|im_end|>\n")):  # a sampler gives no stop token
        read = read_answer(shown, template, [WEATHER])
        assert [(c.name, json.loads(c.arguments)) for c in read.calls] == [
            ("weather", each) for each in arguments
        ]
        assert read.content == ""


def test_thinking_and_text_before_the_calls_stand_apart(tokenizers):
    template = tokenizers["hermes"].template
    calls = (ToolCall("weather", '{"city": "Oslo"}'),)
    answer = Message("assistant", "Let me look.", thinking="Which city?\nOslo.", calls=calls)
    text = written(template, answer)
    assert read_answer(text, template, [WEATHER]) == answer
    assert split_thinking("<think>\nnever ended") == ("never ended", "")
    assert split_thinking("plain") == ("", "plain")
    lines = answer_lines(text, template, [WEATHER]).splitlines()
    assert lines[-1] == '{"name": "weather", "arguments": {"city": "Oslo"}}'
    assert "Let me look." in lines
    assert message_object(answer) == {
        "role": "assistant",
        "content": "Let me look.",
        "reasoning_content": "Which city?\nOslo.",
        "tool_calls": [
            {
                "type": "function",
                "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
            }
        ],
    }


def test_a_thought_is_one_only_where_it_was_begun(tokenizers):
    mention = "The tag </think> ends a thought."
    for name in ("hermes", "llama3_json"):
        assert read_answer(mention, tokenizers[name].template).content == mention
    off = "<think>\n\n</think>"  # what the prompt has where thinking is off
    begins = TEMPLATES["hermes"].replace("{% if enable", "<think>\n{% if enable")
    begins = begins.replace(off, off.removeprefix("<think>\n"))
    template = with_calls("hermes", **{"chat_template.jinja": begins}).template
    thoughtful = Message("assistant", "Cold.", thinking="Cold?")
    assert read_answer("Cold?\n</think>\n\nCold.", template) == thoughtful
    assert read_answer("Cold.", template).content == "Cold."
    assert read_answer(mention, template, thinking=False).content == mention


@pytest.mark.parametrize("name", TEMPLATES)
def test_text_after_the_calls_is_kept(tokenizers, name):
    template = tokenizers[name].template
    calls = (ToolCall("weather", '{"city": "Oslo"}'),)
    text = written(template, Message("assistant", "Let me look.", calls=calls))
    text = text.removesuffix("<|im_end|>\n")
    if name == "llama3_json":  # nothing announces a call there, so it must come first
        text = text.removeprefix("Let me look.")
    read = read_answer(f"{text}\nThat is all.", template, [WEATHER])
    assert [call.name for call in read.calls] == ["weather"]
    assert read.content.removeprefix("Let me look.\n") == "That is all."


def test_an_answer_in_json_is_no_call_where_nothing_announces_calls(tokenizers):
    template = tokenizers["llama3_json"].template
    for text in (
        '{"name": "Ada", "age": 36}',
        '{"name": "weather", "age": 36}',
        '{"name": "Ada", "parameters": {"age": 36}}',
    ):
        assert read_answer(text, template, [WEATHER]) == Message("assistant", text)
    unlisted = '<tool_call>\n{"name": "Ada", "arguments": {}}\n</tool_call>'
    assert read_answer(unlisted, tokenizers["hermes"].template, [WEATHER]).calls


def test_white_space_in_a_call_is_free(tokenizers):
    loose = '<tool_call>{ "name":"weather",\n "arguments":{"city":"Oslo"} }</tool_call>'
    read = read_answer(loose, tokenizers["hermes"].template, [WEATHER])
    assert read.calls == (ToolCall("weather", '{"city": "Oslo"}'),)


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "weather", "arguments": {"city": \n</tool_call>',
        '<tool_call>\n{"name": 7, "arguments": {}}\n</tool_call>',
        '<tool_call>\n{"name": "weather", "arguments": [1]}\n</tool_call>',
        '<tool_call>\n{"name": "a", "arguments": {}}\n</tool_call>\n<tool_call>\n{"na',
        "The tag <tool_call> is only mentioned.",
        '{"name": "weather", "arguments": {}}',
    ],
)
def test_a_call_that_cannot_be_read_stays_text(tokenizers, text):
    template = tokenizers["hermes"].template
    assert read_answer(text, template, [WEATHER]) == Message("assistant", text)


def test_calls_are_looked_for_only_where_there_are_tools(tokenizers):
    template = tokenizers["llama3_json"].template
    text = '{"name": "weather", "parameters": {"city": "Oslo"}}'
    assert read_answer(text, template).content == text
    assert read_answer(text, template, [WEATHER]).calls


def test_forms_have_the_names_that_servers_know_them_by(tokenizers):
    names = {}
    for name, tokenizer in tokenizers.items():
        known = tool_format(tokenizer.template)
        names[name] = known and (known.name, known.vllm, known.sglang)
    assert names == {
        "hermes": ("hermes", "hermes", "qwen"),
        "llama3_json": ("llama3_json", "llama3_json", "llama3"),
        "mistral": ("mistral", "mistral", "mistral"),
        "named": None,
        "qwen3_coder": ("qwen3_coder", "qwen3_coder", "qwen3_coder"),
        "pythonic": ("pythonic", "pythonic", "pythonic"),
    }
    assert describe_template(tokenizers["hermes"].template) == (
        "the checkpoint's own, with tools (hermes), thinking or not, as asked"
    )


def test_a_prompt_asks_for_thinking_where_the_template_has_the_choice(tokenizers):
    tokenizer = tokenizers["hermes"]
    on, off = (
        tokenizer.decode(render_prompt([QUESTION], tokenizer, None, thinking=choice))
        for choice in (True, False)
    )
    assert off == on + "<think>\n\n</think>\n\n"
