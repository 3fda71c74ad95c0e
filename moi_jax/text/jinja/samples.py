"""Samples: the texts that a conversation is trained on under a chat template, and what in them.

A template may write a turn otherwise once other turns follow it: Qwen3 leaves out the thinking of
all answers before the last question. Such a conversation has several samples. Each turn is trained
in a text that begins with the prompt after which the model writes the turn.
"""

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from moi_jax.text.conversations import BadRow, Conversation, Message
from moi_jax.text.instructions import History, Thinking
from moi_jax.text.jinja.chat import THINK, THOUGHT, shared_length, texts_of
from moi_jax.text.jinja.environment import BEGIN, END, split_marks
from moi_jax.text.jinja.template import JinjaTemplate

MOST_SHAPES = 4096
OTHER = "\uf8e3"  # an answer that no conversation has


class Span(NamedTuple):
    """What the model writes in a turn, or a part of it: characters [start, end) of a sample."""

    start: int
    end: int
    turn: int


@dataclass(frozen=True)
class Sample:
    """A text to train on.

    Attributes:
      messages: how many messages of the conversation it holds.
      spans: of the trained turns, in their order.
    """

    messages: int
    text: str
    spans: tuple[Span, ...]


class _Place(NamedTuple):
    """Where a span is in the texts of a shape, counted in special tokens.

    Attributes:
      after: special tokens before the span.
      prefix: the text between the last of these and the span.
      ends: the number of the special token that ends it.
    """

    after: int
    prefix: str
    ends: int


class _Layout(NamedTuple):
    """What the texts of a shape have in common.

    Attributes:
      turns: the trained turn of each span.
      places: of the spans; empty where the template marks them itself.
      marks: how many marks the template makes, and which of them are the spans.
    """

    messages: int
    specials: tuple[str, ...]
    turns: tuple[int, ...]
    places: tuple[_Place, ...]
    marks: tuple[int, tuple[int, ...]]


class Sampler:
    """Makes the samples of conversations under one template.

    The template is asked for the prompt and the finished turn of every trained turn. The time this
    takes grows with the square of the number of turns, so it is done once for each shape of
    conversation: which roles, calls and thoughts it has, and which of the texts that the template
    compares with it contains. A conversation of a known shape is rendered once for each sample;
    its special tokens must be those of the shape, and they show where the spans are.

    Attributes:
      thinking: keep; drop: no thinking at all; last: only that of the last exchange.
      history: of a conversation whose history the template rewrites: split it into samples, take
        the last, or refuse it.
    """

    def __init__(self, template: JinjaTemplate, thinking: Thinking, history: History):
        self._template, self._thinking, self._history = template, thinking, history
        self._layouts: dict[tuple[object, ...], tuple[_Layout, ...] | None] = {}

    def samples(self, conversation: Conversation) -> list[Sample]:
        """The samples of a conversation.

        Raises:
          BadRow: the template refuses it, or its turns cannot be told from the text around them.
        """
        conversation = _without_thinking(conversation, self._thinking)
        self._refuse_specials(conversation)
        shape = self._shape(conversation)
        if layouts := self._layouts.get(shape):
            quick = [self._by_layout(conversation, layout) for layout in layouts]
            if all(quick):
                return [sample for sample in quick if sample]
        samples = self.exact_samples(conversation)
        if shape not in self._layouts:
            if len(self._layouts) >= MOST_SHAPES:
                self._layouts.clear()
            found = [self._layout(conversation, sample) for sample in samples]
            usable = tuple(layout for layout in found if layout)
            self._layouts[shape] = usable if len(usable) == len(samples) else None
        return samples

    def exact_samples(self, conversation: Conversation) -> list[Sample]:
        """The samples, from the template's own text of every prompt and every finished turn."""
        messages = conversation.messages
        trained = [n for n, m in enumerate(messages) if m.role == "assistant" and m.train]
        finished = {turn: self._finished(conversation, turn) for turn in trained}
        samples: list[Sample] = []
        if not trained:
            return [
                Sample(len(messages), self._template.chat_text(messages, conversation.tools), ())
            ]
        while trained:
            last = finished[trained[-1]]
            together = [turn for turn in trained if self._is_in(finished[turn], last)]
            spans = [span for turn in together for span in finished[turn].spans]
            if self._thinking == "last":
                spans = [self._as_written(span, finished[span.turn], last.text) for span in spans]
            samples.append(replace(last, spans=tuple(spans)))
            trained = [turn for turn in trained if turn not in together]
        if len(samples) > 1 and self._history == "refuse":
            raise BadRow(
                "rewritten_history",
                f"the chat template writes turn {samples[1].messages} otherwise when others follow",
            )
        return samples[:1] if self._history == "last" else samples[::-1]

    def _is_in(self, turn: Sample, text: Sample) -> bool:
        """Whether a text holds the turn as the model writes it, after the prompt that it gets."""
        whole = self._thinking != "last" or len(turn.spans) > 1
        end = turn.spans[-1].end if whole else turn.spans[0].start
        return text.text.startswith(turn.text[:end])

    def _as_written(self, span: Span, turn: Sample, text: str) -> Span:
        """The span of a turn in a text that holds its prompt, and perhaps other words of it."""
        if text.startswith(turn.text[: span.end]):
            return span
        own = self._template.specials.findall(turn.text, span.start, span.end)
        ends = [found.end() for found in self._template.specials.finditer(text, span.start)]
        return span._replace(end=ends[len(own) - 1])

    def _finished(self, conversation: Conversation, turn: int) -> Sample:
        """The text up to a turn, with the spans of that turn."""
        messages, tools = conversation.messages, conversation.tools
        marked = self._template.marked_chat(messages[: turn + 1], tools)
        text, marks = split_marks(marked)
        if self._template.marks:
            return Sample(turn + 1, text, self._marked(conversation, turn, text, marks))
        prompt, text = self._prompt(conversation, turn, text)
        start = len(prompt)
        ends = [found.end() for found in self._template.specials.finditer(text, start)]
        if not ends:
            raise unmaskable(turn, "it ends without a special token")
        return Sample(turn + 1, text, (Span(start, ends[-1], turn),))

    def _prompt(self, conversation: Conversation, turn: int, text: str) -> tuple[str, str]:
        """The prompt of a turn, and the text up to its end, which begins with the prompt.

        A template that has two prompts, with thinking and without, may have either as its default.
        Two kinds of templates write a finished turn otherwise than its prompt: one that has a
        system text only in the last question, as Mistral's, and one that leaves thinking out of
        finished turns. The text is then written as the model gets and writes it.
        """
        message = conversation.messages[turn]
        before, tools = conversation.messages[:turn], conversation.tools
        thoughtful = bool(message.thinking)
        for choice in (None, thoughtful, not thoughtful):
            prompt = self._template.chat_text(before, tools, generate=True, thinking=choice)
            if text.startswith(prompt):
                return prompt, text
        prompt = self._template.chat_text(before, tools, generate=True)
        if before[0].role == "system" and (body := self._body(before[1:], message, tools)):
            return prompt, prompt + body
        stem, think, space = prompt.rpartition(THINK)
        text = self._template.chat_text((*before, replace(message, thinking="")), tools)
        answer = text[len(stem) :]
        if not think or space.strip() or not text.startswith(stem) or THINK in answer:
            raise unmaskable(turn, "it does not begin with the prompt of its answer")
        return prompt, f"{prompt}{message.thinking}\n{THOUGHT}\n\n{answer}"

    def _body(
        self, before: Sequence[Message], message: Message, tools: Sequence[str]
    ) -> str | None:
        """The text of a turn without the prompt; None if it does not begin with the prompt."""
        prompt = self._template.chat_text(before, tools, generate=True)
        text = self._template.chat_text((*before, message), tools)
        return text[len(prompt) :] if text.startswith(prompt) else None

    def _marked(
        self,
        conversation: Conversation,
        turn: int,
        text: str,
        marks: Sequence[tuple[int, int]],
    ) -> tuple[Span, ...]:
        """The spans of a turn: what {% generation %} marks beyond the marks of earlier turns.

        A text with another answer in the turn's place is the same up to the turn.
        """
        before, tools = conversation.messages[:turn], conversation.tools
        earlier = split_marks(self._template.marked_chat(before, tools))[1]
        other = self._template.chat_text((*before, Message("assistant", OTHER)), tools)
        begin = shared_length(text, other)
        own = [Span(start, end, turn) for start, end in marks if end > begin]
        is_empty = all(span.start == span.end for span in own)
        if is_empty or len(own) != len(marks) - len(earlier):
            raise unmaskable(turn, "what the template marks in it cannot be told from other turns")
        return tuple(own)

    def _layout(self, conversation: Conversation, sample: Sample) -> _Layout | None:
        """Where the spans of a sample are; None if special tokens do not tell it."""
        found = list(self._template.specials.finditer(sample.text))
        ends = [match.end() for match in found]
        places = []
        for span in () if self._template.marks else sample.spans:
            after = bisect_right(ends, span.start)
            prefix = sample.text[ends[after - 1] if after else 0 : span.start]
            if span.end not in ends[after:]:
                return None
            places.append(_Place(after, prefix, ends.index(span.end)))
        marked = self._template.marked_chat(
            conversation.messages[: sample.messages], conversation.tools
        )
        text, marked_parts = split_marks(marked)
        if text != sample.text:
            return None
        number = {mark: n for n, mark in enumerate(marked_parts)}
        own = [number.get((span.start, span.end)) for span in sample.spans] if number else []
        if self._template.marks and None in own:
            return None
        turns = tuple(span.turn for span in sample.spans)
        names = tuple(match.group() for match in found)
        marks = len(number), tuple(n for n in own if n is not None)
        return _Layout(sample.messages, names, turns, tuple(places), marks)

    def _by_layout(self, conversation: Conversation, layout: _Layout) -> Sample | None:
        """The sample of a conversation of a known shape; None if it does not have that shape."""
        messages = conversation.messages[: layout.messages]
        text, marks = split_marks(self._template.marked_chat(messages, conversation.tools))
        found = list(self._template.specials.finditer(text))
        if tuple(match.group() for match in found) != layout.specials:
            return None
        spans: list[Span] = []
        if self._template.marks:
            if len(marks) != layout.marks[0]:
                return None
            own = zip(layout.marks[1], layout.turns, strict=True)
            spans = [Span(*marks[number], turn) for number, turn in own]
            return Sample(layout.messages, text, tuple(spans))
        for place, turn in zip(layout.places, layout.turns, strict=True):
            begin = found[place.after - 1].end() if place.after else 0
            if not text.startswith(place.prefix, begin):
                return None
            spans.append(Span(begin + len(place.prefix), found[place.ends].end(), turn))
        return Sample(layout.messages, text, tuple(spans))

    def _shape(self, conversation: Conversation) -> tuple[object, ...]:
        """All that a template's choices may depend on, apart from lengths of texts."""
        tools = "\n".join(conversation.tools)
        return (
            len(conversation.tools) > 0,
            self._compared(tools),
            *(
                (m.role, m.train, len(m.calls), *(self._text_shape(t) for t in texts_of(m)))
                for m in conversation.messages
            ),
        )

    def _text_shape(self, text: str) -> tuple[object, ...]:
        if not text:
            return ()
        core = text.strip()
        return bool(core), text[0].isspace(), text[-1].isspace(), self._compared(text)

    def _compared(self, text: str) -> tuple[object, ...]:
        """Which of the template's constants the text contains, and begins or ends with."""
        return tuple(
            (n, text.startswith(constant), text.endswith(constant))
            for n, constant in enumerate(self._template.constants)
            if constant in text
        )

    def _refuse_specials(self, conversation: Conversation) -> None:
        """Refuses texts that the tokenizer would take for the template's own tokens."""
        texts = [*conversation.tools, *(t for m in conversation.messages for t in texts_of(m))]
        for text in texts:
            if found := self._template.specials.search(text):
                raise BadRow("control_tokens", f"the text contains {found.group()}")
            if BEGIN in text or END in text:
                raise BadRow("control_tokens", "the text contains U+F8E0 or U+F8E1")


def unmaskable(turn: int, why: str) -> BadRow:
    """The error for a turn whose text cannot be told from the text around it."""
    return BadRow("unmaskable", f"the chat template's text of message {turn + 1}: {why}")


def _without_thinking(conversation: Conversation, thinking: Thinking) -> Conversation:
    """The conversation with the thinking that is kept."""
    messages = conversation.messages
    first = 0 if thinking == "keep" else len(messages)
    if thinking == "last":
        first = max((n for n, m in enumerate(messages) if m.role == "user"), default=0)
    if not any(message.thinking for message in messages[:first]):
        return conversation
    kept = [replace(m, thinking="") if n < first else m for n, m in enumerate(messages)]
    return replace(conversation, messages=tuple(kept))
