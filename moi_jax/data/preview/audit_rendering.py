"""The audit's rendering: a conversation as tokens, and the weight of each token as a label.

Under a template of ours it shares nothing with the loader but the tokenizer. Under a checkpoint's
own template each conversation is rendered by Jinja anew, from the template's text of every prompt
and every finished turn. That checks what the loader has instead: the faster template of ours, what
is remembered of conversations of one shape, and how samples are kept and read. It does not check
the Jinja program, nor how a span of its text becomes tokens: tests compare those with other
libraries.
"""

from collections.abc import Callable, Sequence
from functools import cache

from moi_jax.config import Data
from moi_jax.text.conversations import BadRow, Conversation, Message
from moi_jax.text.jinja.chat import normalized
from moi_jax.text.jinja.samples import Sample, Sampler
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.tokenizer import Tokenizer

# Tokens, and the weight of each as a label; 0 if it is none.
Rendered = tuple[list[int], list[float]]
# A function of the turns, the tools and the system text: the samples; [] if there are none.
Render = Callable[[Sequence[Message], Sequence[str], str | None], list[Rendered]]

# The text before the first turn, before a role, between role and content, and after a content.
_LLAMA3 = ("<|begin_of_text|>",), "<|start_header_id|>", ("<|end_header_id|>", "\n\n")
LAYOUTS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], tuple[str, ...]]] = {
    "chatml": ((), "<|im_start|>", ("\n",), ("<|im_end|>", "\n")),
    "llama3": (*_LLAMA3, ("<|eot_id|>",)),
}


def renderer(tokenizer: Tokenizer, data: Data, targets: str) -> Render:
    """A function that renders turns as ids, and tells which are labels under loss.targets."""
    if isinstance(tokenizer.template, JinjaTemplate):
        return _by_jinja(tokenizer, tokenizer.template, data)
    return _by_layout(tokenizer, targets)


def _by_layout(tokenizer: Tokenizer, targets: str) -> Render:
    official = targets == "qwen_official"
    opening, begin, middle, ends = LAYOUTS[tokenizer.template.name]
    strip = str.strip if tokenizer.template.name == "llama3" else str

    @cache  # roles and fixed texts are repeated often
    def fixed(*texts: str) -> list[int]:
        ids: list[int] = []
        for text in texts:
            special = tokenizer.special(text)
            ids += tokenizer.encode(text) if special is None else [special]
        return ids

    def render(
        turns: Sequence[Message], tools: Sequence[str], system: str | None
    ) -> list[Rendered]:
        tokens: list[int] = []
        labels: list[float] = []

        def add(ids: Sequence[int], label: bool, weight: float = 1.0) -> None:
            for token in ids:
                tokens.append(token)
                labels.append(weight * label)

        add(fixed(*opening), False)
        if system is not None:
            add(fixed(begin, "system", *middle), False)
            add(tokenizer.encode(strip(system)), False)
            add(fixed(*ends), official)
        for number, message in enumerate(turns):
            answer = message.role == "assistant" and message.train
            weight = message.weight if answer else 1.0
            trained = official and (message.role == "user" or message.train)
            add(fixed(begin), trained and (number > 0 or system is not None))
            add(fixed(message.role, *middle), False)
            content = strip(message.content)
            ids, offsets = tokenizer.encode_with_offsets(content)
            by_tool = _by_tool(message, tokenizer.normalize(content))
            for token, (first, _) in zip(ids, offsets, strict=True):
                observed = not official and any(first in part for part in by_tool)
                add([token], answer and not observed, weight)
            add(fixed(ends[0]), answer or trained, weight)
            add(fixed(*ends[1:]), trained)
        return [(tokens, labels)]

    return render


def _by_tool(message: Message, text: str) -> list[range]:
    """Where the text of a trajectory holds what a tool wrote."""
    observations: list[range] = []
    if not message.trajectory:
        return observations
    position, answer = 0, text.find("\nFinal Answer:")
    last = answer if answer >= 0 else len(text)
    while 0 <= (at := text.find("\nObservation:", position)) < last:
        begin = at + len("\nObservation:")
        ends = [text.find(mark, begin) for mark in ("\nThought:", "\nAction:")]
        position = min([end for end in ends if end >= 0], default=last)
        observations.append(range(begin, min(position, last)))
    return observations


def _by_jinja(tokenizer: Tokenizer, template: JinjaTemplate, data: Data) -> Render:
    def render(
        turns: Sequence[Message], tools: Sequence[str], system: str | None
    ) -> list[Rendered]:
        head = () if system is None else (Message("system", system),)
        whole = normalized(Conversation((*head, *turns), tuple(tools)), tokenizer.normalize)
        # A new sampler remembers no shapes.
        sampler = Sampler(template, data.thinking, data.rewritten_history)
        try:
            samples = sampler.samples(whole)
        except BadRow:
            return []
        if any(tokenizer.normalize(sample.text) != sample.text for sample in samples):
            return []
        return [_labelled(sample, whole, tokenizer) for sample in samples]

    return render


def _labelled(sample: Sample, conversation: Conversation, tokenizer: Tokenizer) -> Rendered:
    """The tokens of a sample, and the weights of those that hold what the model writes."""
    ((ids, _),) = tokenizer.encode_rendered([sample.text], [[]])
    labels = [0.0] * len(ids)
    for span in sample.spans:
        message = conversation.messages[span.turn]
        begin = sample.text.find(message.content, span.start)
        borders = [span.start]  # of what the model writes between the observations
        for observed in _by_tool(message, message.content):
            borders += [begin + observed.start, begin + observed.stop]
        written = list(zip(borders[::2], [*borders[1::2], span.end], strict=True))
        ((_, ranges),) = tokenizer.encode_rendered([sample.text], [written])
        for first, last in ranges:
            for token in range(max(first, 1), last):
                labels[token] = labels[token] or message.weight
    return ids, labels
