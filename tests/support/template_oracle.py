"""What the samples of a conversation must be, by transformers' renderings of its prefixes alone."""

import re
from collections import Counter
from collections.abc import Sequence
from functools import partial

import jinja2
import numpy as np

from moi_jax.text.conversations import BadRow, Conversation, Message
from moi_jax.text.instructions import Instruction, label_mask
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.rendering import render
from moi_jax.text.tokenizer import Tokenizer

from support.chat_templates import Reference
from support.made_up_chats import made_up

SENTINEL = re.compile(r"«(\w+)|(\w+)»")


class TemplateOracle:
    """Checks what `render` gives under the own template of a tokenizer."""

    def __init__(self, tokenizer: Tokenizer):
        self.own = JinjaTemplate(tokenizer)
        self.tokenizer, self.reference = tokenizer, Reference(tokenizer)

    def check(self, conversation: Conversation, found: Sequence[Instruction]) -> None:
        """Checks text, ids and labels of the samples of a conversation.

        Raises:
          AssertionError: one of them is not what it must be.
        """
        ends = [n + 1 for n, m in enumerate(conversation.messages) if m.role == "assistant"]
        texts = {self._finished(conversation, end - 1): end for end in ends}
        shown = [self.tokenizer.decode(sample.tokens) for sample in found]
        assert all(text in texts for text in shown), (shown, list(texts))
        lengths = [texts[text] for text in shown]
        assert lengths == sorted(set(lengths))
        assert lengths[-1] == len(conversation.messages)
        trained: list[int] = []
        for sample, length, text in zip(found, lengths, shown, strict=True):
            assert sample.tokens.tolist() == self._ids(text)
            here = self._sentinels(sample)
            trained += here
            self._check_contents(conversation, sample, here)
            if self.own.marks:
                self._check_marks(conversation, sample, length, alone=len(found) == 1)
            else:
                self._check_prefixes(conversation, sample, text, here)
        assert sorted(trained) == [end - 1 for end in ends]  # each turn is trained once

    def check_refused(self, conversation: Conversation) -> None:
        """transformers' rendering of the conversation, or of a part of it, fails as ours does."""
        parts = [conversation.messages[:n] for n in range(1, len(conversation.messages) + 1)]
        assert not all(map(partial(self._renders, conversation.tools), parts))

    def _renders(self, tools: Sequence[str], messages: Sequence[Message]) -> bool:
        generate = messages[-1].role != "assistant"
        try:
            self.reference.text(messages, tools, add_generation_prompt=generate)
        except jinja2.TemplateError:
            return False
        return True

    def _ids(self, text: str) -> list[int]:
        return self.reference.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _finished(self, conversation: Conversation, turn: int) -> str:
        """The text up to the end of a turn, as the model writes the turn after its prompt."""
        messages, tools = conversation.messages, conversation.tools
        text = self.reference.text(messages[: turn + 1], tools)
        if self.own.marks:
            return text
        prompt = self._prompt(conversation, turn, text)
        if text.startswith(prompt):
            return text
        # The template leaves out the thought that its prompt begins.
        unthinking = Message("assistant", messages[turn].content, calls=messages[turn].calls)
        answer = self.reference.text((*messages[:turn], unthinking), tools)
        stem = prompt.rpartition("<think>")[0]
        return f"{prompt}{messages[turn].thinking}\n</think>\n\n{answer[len(stem) :]}"

    def _prompt(self, conversation: Conversation, turn: int, text: str) -> str:
        before, tools = conversation.messages[:turn], conversation.tools
        for more in ({}, {"enable_thinking": True}, {"enable_thinking": False}):
            prompt = self.reference.text(before, tools, add_generation_prompt=True, **more)
            if text.startswith(prompt):
                return prompt
        return self.reference.text(before, tools, add_generation_prompt=True)

    def _sentinels(self, sample: Instruction) -> set[int]:
        """The messages of which a text stands among the labels."""
        marks = SENTINEL.findall(self._labelled(sample))
        return {int((begin or end)[1:]) for begin, end in marks}

    def _labelled(self, sample: Instruction) -> str:
        mask = label_mask(sample, "assistant")
        return self.tokenizer.decode(sample.tokens[mask])

    def _check_contents(
        self, conversation: Conversation, sample: Instruction, turns: set[int]
    ) -> None:
        """The labels hold whole texts of the assistant, and nothing else's."""
        begun, ended = (
            {mark for pair in SENTINEL.findall(self._labelled(sample)) if (mark := pair[side])}
            for side in (0, 1)
        )
        assert begun == ended
        assert all(conversation.messages[turn].role == "assistant" for turn in turns)
        for turn in turns:
            text = self.reference.text(conversation.messages[: turn + 1], conversation.tools)
            for mark in (f"a{turn}", f"c{turn}"):  # some templates drop what stands beside calls
                assert (mark in begun) == (f"«{mark} " in text)

    def _check_marks(
        self, conversation: Conversation, sample: Instruction, length: int, *, alone: bool
    ) -> None:
        """The labels are what transformers' mask has: all of it, or whole runs of it."""
        messages = conversation.messages[:length]
        theirs = np.array(self.reference.assistant_mask(messages, conversation.tools), bool)
        ours = label_mask(sample, "assistant")
        if alone:
            assert ours.tolist() == theirs.tolist()
            return
        assert not np.any(ours & ~theirs)
        borders = np.flatnonzero(np.diff(ours.astype(np.int8))) + 1
        inside = [border if not ours[border] else border - 1 for border in borders]
        assert not np.any(theirs[inside])

    def _check_prefixes(
        self, conversation: Conversation, sample: Instruction, text: str, turns: set[int]
    ) -> None:
        """The labels of each turn reach from the end of its prompt to the end of its text."""
        encoded = self.reference.tokenizer(
            text, add_special_tokens=False, return_offsets_mapping=True
        )
        starts, stops = np.array(encoded["offset_mapping"]).T
        expected = np.zeros(len(starts), bool)
        for turn in turns:
            finished = self._finished(conversation, turn)
            begin = len(self._prompt(conversation, turn, finished))
            last = self.own.specials.findall(finished)[-1]
            end = finished.rindex(last) + len(last)
            assert text.startswith(finished[:end])
            expected |= (starts < end) & (stops > begin)
        assert label_mask(sample, "assistant").tolist() == expected.tolist()


def check_all(oracle: TemplateOracle, conversations: Sequence[Conversation]) -> Counter[str]:
    """Renders the conversations and checks them.

    Returns:
      How many have one sample or several (`whole`, `split`), and how many were refused, by reason.
    """
    counts: Counter[str] = Counter()
    made = render(conversations, oracle.tokenizer, None, "append")
    for conversation, found in zip(conversations, made, strict=True):
        if isinstance(found, BadRow):
            counts[found.reason] += 1
            if found.reason == "template_error":
                oracle.check_refused(conversation)
            continue
        oracle.check(conversation, found)
        counts["whole" if len(found) == 1 else "split"] += 1
    return counts


def conversations_for(oracle: TemplateOracle, seeds: range) -> list[Conversation]:
    """Made-up conversations with all that the template has a form for, and a few without.

    Each comes twice, with other texts: the second one has a shape that is known already.
    """
    template, typed = oracle.own, oracle.tokenizer.template.typed
    return [
        made_up(
            seed,
            more=more,
            spaced=typed,  # ours encodes contents apart, so white space joins no token of its own
            tools=template.renders_tools and seed % 3 > 0,
            parallel=seed % 2 > 0,
            thinking=typed and seed % 4 > 1,
            # transformers cannot leave out a template's own system prompt
            system=template.takes_system and (template.default_prompt is not None or seed % 5 > 2),
        )
        for seed in seeds
        for more in ("", "and more ")
    ]
