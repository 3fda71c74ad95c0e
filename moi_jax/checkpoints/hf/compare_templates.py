"""Compares what is trained on with transformers' rendering of a directory's own chat template."""

import importlib.util
import json
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, time
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax.text.conversations import BadRow, Conversation, Message, ToolCall
from moi_jax.text.instructions import ASSISTANT, Instruction, label_mask
from moi_jax.text.jinja.chat import Style, tool_objects
from moi_jax.text.jinja.environment import TODAY
from moi_jax.text.jinja.rendering import from_json
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.rendering import render
from moi_jax.text.tokenizer import Tokenizer

Report = dict[str, Any]

CONVERSATIONS = 200
TEXTS = (
    "What is the weather in Zürich?", "今天天气怎么样？", "def f(x):\n\treturn {'x': [x]}",
    "Explain <b>tags</b> & \"quotes\", please.", "Grüße 😀, naïve café", "1. one\n2. two",
    "请把这句话翻译成英文：我们明天去北京。", "{\"a\": {{ b }}, \"c\": {% d %}}",
)  # fmt: skip
TOOLS = tuple(
    json.dumps(
        {
            "type": "function",
            "function": {
                "name": name,
                "description": f"Looks up {name}: 查询.",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "city": {"type": "string", "description": "The city."},
                        "days": {"type": "integer"},
                    },
                    "required": ["city"],
                },
            },
        },
        ensure_ascii=False,
    )
    for name in ("weather", "get_air_quality")
)


def why_not_compared(directory: Path) -> str | None:
    """Why the template of a directory cannot be compared; "" if it has none; None if it can."""
    settings = directory / "tokenizer_config.json"
    if not (directory / "chat_template.jinja").is_file() and not (
        settings.is_file() and "chat_template" in json.loads(settings.read_text(encoding="utf-8"))
    ):
        return ""
    if importlib.util.find_spec("transformers") is None:
        return "transformers is not installed (pip install 'moi_jax[parity]')"
    if not (directory / "tokenizer.json").is_file():
        return "there is no tokenizer.json for transformers"
    return None


def compare_templates(tokenizer: Tokenizer, default: str | None, directory: Path) -> Report:
    """Renders conversations through both, and compares ids and labels.

    Args:
      tokenizer: with the template that is trained on.
      default: the default system prompt.

    Returns:
      conversations, samples, refused (by the template), different (samples), labels (what they were
      compared with), first (the first difference, "" if there is none).
    """
    template = tokenizer.template
    own = template if isinstance(template, JinjaTemplate) else None
    adds = own is not None and default is None and own.default_prompt is not None
    theirs = Reference.open(directory, own.style if own else Style(thinking=False))
    made = list(_conversations(own, with_system=adds))
    report: Report = {
        "conversations": len(made), "samples": 0, "refused": 0, "different": 0, "first": "",
        "labels": "its masks" if own and own.marks else "renderings of the prompts",
    }  # fmt: skip
    for conversation, found in zip(made, render(made, tokenizer, default, "keep"), strict=True):
        if isinstance(found, BadRow):
            report["refused"] += 1
            continue
        for instruction in found:
            report["samples"] += 1
            difference = theirs.difference(conversation, instruction, tokenizer)
            if difference:
                report["different"] += 1
                report["first"] = report["first"] or difference
    return report


@dataclass(frozen=True)
class Reference:
    """The template of a directory, as transformers renders it.

    Attributes:
      render: (messages, whether the prompt of an answer follows, other variables) -> the encoding.
    """

    render: Callable[..., Any]
    style: Style

    @classmethod
    def open(cls, directory: Path, style: Style) -> "Reference":
        """Raises OSError or ValueError: transformers cannot read the tokenizer."""
        from transformers import PreTrainedTokenizerFast

        # AutoTokenizer would look for the class of the model, and may ask to run its code.
        tokenizer = PreTrainedTokenizerFast.from_pretrained(directory, local_files_only=True)

        def render(messages: Sequence[Message], tools: Sequence[str], **options: Any) -> Any:
            described: Any = tool_objects(tools)
            with _same_day():
                return tokenizer.apply_chat_template(
                    style.messages(messages), tools=described, return_dict=True, **options
                )

        return cls(render, style)

    def difference(
        self, conversation: Conversation, instruction: Instruction, tokenizer: Tokenizer
    ) -> str:
        """How a sample differs from this template's rendering, in one line; "" if not at all."""
        template = tokenizer.template
        if instruction.conversation:  # the part of the conversation that the sample holds
            conversation, _ = from_json(instruction.conversation)
        messages, tools = conversation.messages, conversation.tools
        marks = isinstance(template, JinjaTemplate) and template.marks
        found = self.render(messages, tools, return_assistant_tokens_mask=marks)
        if not marks and (difference := self._prompts(conversation, instruction, tokenizer)):
            return difference
        theirs, ours = found["input_ids"], instruction.tokens.tolist()
        if theirs != ours:
            begin = int(instruction.spans[-1][0])
            if marks or theirs[:begin] == ours[:begin]:  # else no model writes what is there
                return _apart("the text", theirs, ours, tokenizer)
        return self._masks(found, instruction, messages) if marks else ""

    def _masks(self, found: Any, instruction: Instruction, messages: Sequence[Message]) -> str:
        """Compares labels with masks; a sample of several may train on fewer turns."""
        ours, theirs = (
            label_mask(instruction, "assistant"),
            np.array(found["assistant_masks"], bool),
        )
        whole = all(message.train for message in messages if message.role == "assistant")
        equal = np.array_equal(ours, theirs) if whole else not np.any(ours & ~theirs)
        places = np.flatnonzero(ours != theirs)
        return "" if equal else f"the labels differ from the masks at tokens {places[:5].tolist()}"

    def _prompts(
        self, conversation: Conversation, instruction: Instruction, tokenizer: Tokenizer
    ) -> str:
        """Whether each span begins after the prompt of its turn, and ends where the turn does."""
        messages, tools = conversation.messages, conversation.tools
        turns = [n for n, m in enumerate(messages) if m.role == "assistant" and m.train]
        spans = [span for span in instruction.spans.tolist() if span[2] & ASSISTANT]
        if len(spans) != len(turns):
            return f"{len(spans)} spans of labels for {len(turns)} turns"
        ours = instruction.tokens.tolist()
        for turn, (start, end, _) in zip(turns, spans, strict=True):
            prompts = (
                self._ids(messages[:turn], tools, add_generation_prompt=True, **choice)
                for choice in ({}, {"enable_thinking": True}, {"enable_thinking": False})
            )
            if not any(_begins(prompt, ours, start, tokenizer) for prompt in prompts):
                prompt = self._ids(messages[:turn], tools, add_generation_prompt=True)
                return _apart(f"the prompt of message {turn + 1}", prompt, ours[:start], tokenizer)
            turns_end = self._ids(messages[: turn + 1], tools)
            if turns_end[:start] != ours[:start]:  # it writes a finished turn otherwise
                continue
            ends_later = set(turns_end[end:]) & set(tokenizer.template.controls)
            if turns_end[:end] != ours[:end] or ends_later:
                return _apart(f"message {turn + 1}", turns_end, ours[:end], tokenizer)
        return ""

    def _ids(self, messages: Sequence[Message], tools: Sequence[str], **options: Any) -> list[int]:
        return self.render(messages, tools, **options)["input_ids"]


@contextmanager
def _same_day() -> Iterator[None]:
    """Lets a template that asks transformers for the date write `TODAY`, as ours do."""
    from transformers.utils import chat_template_utils

    class Clock:
        @staticmethod
        def now() -> datetime:
            return datetime.combine(TODAY, time())

    theirs = vars(chat_template_utils)
    clock = theirs["datetime"]
    theirs["datetime"] = Clock
    try:
        yield
    finally:
        theirs["datetime"] = clock


def _begins(prompt: list[int], ours: list[int], start: int, tokenizer: Tokenizer) -> bool:
    """Whether a span begins where the prompt ends.

    Its first token may begin in the white space at the end of the prompt, as "\n\n" may.
    """
    if prompt[:start] != ours[:start]:
        return False
    return len(prompt) == start or tokenizer.decode(ours[: start + 1]).startswith(
        tokenizer.decode(prompt)
    )


def _conversations(template: JinjaTemplate | None, with_system: bool) -> Iterator[Conversation]:
    """Conversations with what the template can express."""
    rng = random.Random(0)
    tools = template is not None and template.renders_tools
    thinks = template is not None and template.style.thinking
    takes_system = template is None or template.takes_system
    for number in range(CONVERSATIONS):
        messages: list[Message] = []
        if takes_system and (with_system or rng.random() < 0.3):
            messages.append(Message("system", rng.choice(TEXTS)))
        called = tools and rng.random() < 0.6
        for _ in range(rng.randint(1, 3)):
            messages.append(Message("user", f"{rng.choice(TEXTS)} ({number})"))
            if called and rng.random() < 0.8:
                messages += _called(rng, rng.choice((1, 1, 2)), thinks)
            messages.append(_thoughtful(rng, Message("assistant", rng.choice(TEXTS)), thinks))
        yield Conversation(tuple(messages), TOOLS if called else ())


def _called(rng: random.Random, count: int, thinks: bool) -> list[Message]:
    """A message that calls tools together, and their results."""
    calls = []
    for _ in range(count):
        arguments = {"city": rng.choice(("Zürich", "北京", "Oslo")), "days": rng.randint(1, 9)}
        name = rng.choice(("weather", "get_air_quality"))
        identifier = f"c{rng.randrange(10**8):08}"  # of nine characters, as Mistral's wants them
        calls.append(ToolCall(name, json.dumps(arguments, ensure_ascii=False), identifier))
    content = rng.choice(("", "", "Let me look. 我来查一下。"))
    calling = _thoughtful(rng, Message("assistant", content, calls=tuple(calls)), thinks)
    results = [
        Message(
            "tool", f'{{"sky": "晴", "degrees": {rng.randint(-9, 30)}}}', call_id=c.id, name=c.name
        )
        for c in calls
    ]
    return [calling, *results]


def _thoughtful(rng: random.Random, message: Message, thinks: bool) -> Message:
    if not thinks or rng.random() < 0.4:
        return message
    return replace(message, thinking=f"The user asks. 我想一想。 Step {rng.randint(1, 99)}.")


def _apart(what: str, theirs: Sequence[int], ours: Sequence[int], tokenizer: Tokenizer) -> str:
    place = next(
        (n for n, (a, b) in enumerate(zip(theirs, ours, strict=False)) if a != b),
        min(len(theirs), len(ours)),
    )
    shown = slice(max(0, place - 8), place + 8)
    there, here = (tokenizer.decode(ids[shown]) for ids in (theirs, ours))
    return f"{what} is {there!r} there, {here!r} here"
