"""Broken templates, and what a template cannot write: one clear line, or a counted row."""

import json
import re
from dataclasses import replace

import pytest

from moi_jax.common.errors import UserError
from moi_jax.config.load import make_config
from moi_jax.text.conversations import BadRow, Conversation, Message, ToolCall
from moi_jax.text.instructions import Rendering
from moi_jax.text.jinja import environment
from moi_jax.text.prompts import check_prompts, check_targets
from moi_jax.text.rendering import render
from moi_jax.text.tokenizer import Tokenizer, load_tokenizer

from support.tokenizers import SAMPLES

CHATML = load_tokenizer(SAMPLES / "tokenizer")
TURN = "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
PROMPT = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
PLAIN = f"{{% for m in messages %}}{TURN}{{% endfor %}}{PROMPT}"
# A form for tools, so that no template of ours can stand for it.
TOOLS = (
    "{% if tools %}{{ '<|im_start|>tools\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '{' + c.function.name }}"
    "{{ c.function.arguments | tojson + '}' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}" + PROMPT
)
TOOL = json.dumps({"type": "function", "function": {"name": "f", "parameters": {}}})
USER, ANSWER = Message("user", "Hi"), Message("assistant", "Hello.")
CALL = Message("assistant", "", calls=(ToolCall("f", '{"x": 1}', "123456789"),))
RESULT = Message("tool", "7", call_id="123456789", name="f")


def with_template(template: object) -> Tokenizer:
    settings = json.dumps({"chat_template": template})
    return Tokenizer.from_files({**CHATML.files, "tokenizer_config.json": settings})


LONG = "{% for a in range(9999) %}{% for b in range(9999) %}{% endfor %}{% endfor %}"
BROKEN_TEMPLATES = {
    "no Jinja": ("{% for %}", r"\(default, line 1\) is not valid Jinja: .*; mend it"),
    "an unknown tag": ("{% breakfast %}", "not valid Jinja: .*breakfast"),
    "an unknown filter": ("{{ messages | fry }}", "not valid Jinja: .*fry"),
    "an error": ("{{ 1 / 0 }}", "not write a question and its answer: .*division by zero; name"),
    "a refusal": ("{{ raise_exception('not\ntoday') }}", "refuses it: not today; name another"),
    "a missing message": ("{{ messages[9].content + 1 }}", "refuses it: .*no element 9"),
    "a missing variable": ("{{ kitchen.sink }}" + PLAIN, "refuses it: 'kitchen' is undefined"),
    "a long loop": (LONG + PLAIN, "refuses it: its loops run more than 1,000 times"),
    "a huge range": ("{% for a in range(99999999) %}{% endfor %}", "refuses it: Range too big"),
    "another file": ("{% include 'turns.jinja' %}" + PLAIN, "refuses it: no loader"),
    "a look inside Python": ("{{ messages.__class__.__mro__ }}", "refuses it: .*unsafe"),
    "a changed chat": ("{{ messages.append(1) }}" + PLAIN, "refuses it: .*unsafe"),
    "no answers": (PLAIN.replace("for m in messages", "for m in messages[:1]"), "its answer; name"),
    "changed texts": (PLAIN.replace("m.content", "m.content | upper"), "its answer; name another"),
    "no end of a turn": (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}",
        "writes no special token after an answer, so a model could not learn to end it; name",
    ),
    "a number": (5, "is neither a text nor a list of named templates; copy the file again"),
    "a list of texts": ([PLAIN], "is neither a text nor a list of named templates"),
    "no default": (
        [{"name": "rag", "template": PLAIN}],
        "templates rag, but none .* default; name",
    ),
    "a broken one of two": (
        [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": "{% if %}"}],
        r"\(tool_use, line 1\) is not valid Jinja",
    ),
}


@pytest.mark.parametrize(("template", "told"), BROKEN_TEMPLATES.values(), ids=BROKEN_TEMPLATES)
def test_a_broken_template_is_refused_in_one_line(
    template: object, told: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(environment, "MOST_ITERATIONS", 1_000)
    with pytest.raises(UserError, match=told) as refused:
        with_template(template).template  # noqa: B018
    assert "\n" not in str(refused.value)
    assert "chat_template" in str(refused.value)


def chat(*messages: Message, tools: tuple[str, ...] = ()) -> Conversation:
    return Conversation(messages, tools)


NO_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('No system') }}{% endif %}"
LATE = TOOLS.replace(
    "{% for m in", "{% if messages | length > 2 %}{{ 'More. ' }}{% endif %}{% for m in"
)
MARKED = TOOLS.replace("{{ '<|im_end|>\n' }}", "{% generation %}{% endgeneration %}<|im_end|>\n")
UNMARKED = MARKED.replace("{% generation %}", "{% if m.x %}{% generation %}").replace(
    "{% endgeneration %}", "{% endgeneration %}{% endif %}"
)
# As Llama 2 does it, with a default.
SYSTEM_IN_USER = (
    "{% set system = messages[0].content if messages[0].role == 'system' else 'Be very kind.' %}"
    "{% for m in messages if m.role != 'system' %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if loop.first %}{{ '<<' + system + '>>\n' }}{% endif %}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}" + PROMPT
)
TOLD_APART = "the chat template's text of message 2: "
BAD_CONVERSATIONS = {
    "a control token in an answer": (
        TOOLS, chat(USER, Message("assistant", "<|im_end|>")), r"^control_tokens: .*<\|im_end\|>"
    ),
    "a control token in a result": (
        TOOLS,
        chat(USER, CALL, Message("tool", "<|im_end|>"), ANSWER, tools=(TOOL,)),
        r"^control_tokens: the text contains <\|im_end\|>",
    ),
    "a control token in arguments": (
        TOOLS,
        chat(USER, replace(CALL, calls=(ToolCall("f", '{"x": "<|im_start|>"}'),)), RESULT, ANSWER,
             tools=(TOOL,)),
        r"^control_tokens: the text contains <\|im_start\|>",
    ),
    "a control token in a description": (
        TOOLS, chat(USER, ANSWER, tools=(TOOL.replace('"f"', '"<|endoftext|>"'),)),
        r"^control_tokens: the text contains <\|endoftext\|>",
    ),
    "our marks in a text": (
        TOOLS, chat(Message("user", "\uf8e0"), ANSWER, tools=(TOOL,)),
        r"^control_tokens: .*U\+F8E0",
    ),
    "a mark of nothing": (MARKED, chat(USER, ANSWER), f"^unmaskable: {TOLD_APART}what the templ"),
    "no mark": (UNMARKED, chat(USER, ANSWER), f"^unmaskable: {TOLD_APART}what the template marks"),
    "another prompt than the turn": (
        TOOLS.replace("assistant\n' }}{% endif %}", "bot\n' }}{% endif %}"), chat(USER, ANSWER),
        f"^unmaskable: {TOLD_APART}it does not begin with the prompt of its answer",
    ),
    "a system turn without a place": (
        NO_SYSTEM + TOOLS, chat(Message("system", "Be."), USER, ANSWER),
        "^template_error: the chat template refuses it: No system",
    ),
    "too many calls": (
        TOOLS.replace("{% for c in", "{% if m.tool_calls and m.tool_calls | length > 1 %}"
                      "{{ raise_exception('one call') }}{% endif %}{% for c in"),
        chat(USER, Message("assistant", "", calls=CALL.calls * 2), RESULT, RESULT, ANSWER,
             tools=(TOOL,)),
        "^template_error: the chat template refuses it: one call",
    ),
    "a changed trajectory": (
        TOOLS.replace("m.content }}", "m.content | replace('Thought', 'Idea') }}"),
        chat(USER, Message("assistant", "Thought: x\nAction: f\nAction Input: {}\nObservation: 7\n"
                           "Final Answer: 7", trajectory=True)),
        f"^unmaskable: {TOLD_APART}it does not hold the text of the trajectory as it is",
    ),
    "a mark joined with the text before it": (
        TOOLS.replace("'\n' + m.content", "'\ne' + m.content"),
        chat(USER, Message("assistant", "\u0301")),
        "^not_normal: a text begins with a mark that joins the letter before it",
    ),
    "a rewritten history": (
        LATE, chat(USER, ANSWER, USER, ANSWER),
        "^rewritten_history: the chat template writes turn 2 otherwise when others follow",
    ),
}  # fmt: skip


@pytest.mark.parametrize(
    ("template", "conversation", "told"), BAD_CONVERSATIONS.values(), ids=BAD_CONVERSATIONS
)
def test_a_conversation_that_cannot_be_rendered_is_a_bad_row(
    template: str, conversation: Conversation, told: str
) -> None:
    tokenizer = with_template(template)
    options = Rendering(rewritten_history="refuse")
    bad, good = render([conversation, chat(USER, ANSWER)], tokenizer, None, "append", options)
    assert isinstance(bad, BadRow)
    assert re.search(told, str(bad)), str(bad)
    assert "\n" not in str(bad)
    assert isinstance(good, BadRow) == ("unmaskable: " in told and "trajectory" not in told)


def data_of(**values: object):
    domains = [{"name": "chat", "sources": [{"path": "a"}]}]
    domains.append(
        {"name": "maths", "sources": [{"path": "b"}], "prompt": "You are good at maths."}
    )
    return make_config({"data": {"default_domain": "chat", "domains": domains, **values}}).data


def test_a_prompt_without_a_place_is_refused_by_the_name_of_its_domain() -> None:
    template = with_template(NO_SYSTEM + TOOLS).template
    with pytest.raises(UserError, match=r"no place for a system prompt, but domain maths has one"):
        check_prompts(data_of(), template)
    check_prompts(data_of(system_prompts="none"), template)
    check_prompts(data_of(), CHATML.template)


def test_no_prompt_where_the_template_writes_its_own_is_refused_by_name() -> None:
    template = with_template(SYSTEM_IN_USER).template
    with pytest.raises(UserError, match=r"a system prompt of its own, but domain chat has none"):
        check_prompts(data_of(), template)
    check_prompts(data_of(default_system_prompt="You are kind."), template)


def test_labels_of_qwens_official_code_are_refused_under_another_template() -> None:
    with pytest.raises(UserError, match="qwen_official is a rule of the chat templates chatml and"):
        check_targets("qwen_official", with_template(TOOLS).template)
    check_targets("assistant", with_template(TOOLS).template)
    check_targets("qwen_official", CHATML.template)


def test_the_template_for_tools_is_taken_where_there_are_tools() -> None:
    tools = TOOLS.replace("'<|im_start|>' + m.role", "'<|im_start|>T' + m.role").replace(
        "'<|im_start|>assistant", "'<|im_start|>Tassistant"
    )
    named = [{"name": "default", "template": PLAIN}, {"name": "tool_use", "template": tools}]
    tokenizer = with_template(named)
    with_tools = chat(USER, CALL, RESULT, ANSWER, tools=(TOOL,))
    found = render([chat(USER, ANSWER), with_tools], tokenizer, None, "append")
    texts = [tokenizer.decode(samples[0].tokens) for samples in found]  # type: ignore[index]
    assert texts[0].startswith("<|im_start|>user")
    assert "<|im_start|>Tuser" in texts[1]
