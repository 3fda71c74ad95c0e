r"""Rendering: conversations as tokens with their loss spans, and inference prompts.

In ChatML, the conversation (user: "2 + 2?", assistant: "4") under the prompt "Be brief." becomes

    <|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n2 + 2?<|im_end|>\n
    <|im_start|>assistant\n4<|im_end|>\n

and `4<|im_end|>` carries loss (loss.targets: assistant). The tokenizer's chat template gives the
text around the contents. Roles, fixed text and contents are encoded separately. In ChatML, tokens
and labels are those of Qwen's official fine-tuning code.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from moi_jax.text.conversations import Conversation, Message
from moi_jax.text.templates import Template
from moi_jax.text.tokenizer import Tokenizer

ASSISTANT, QWEN_OFFICIAL = 1, 2
TARGETS = {"assistant": ASSISTANT, "qwen_official": QWEN_OFFICIAL}

# In a trajectory, which calls tools in ReAct form, the model writes "Observation:" and the tool
# writes what follows, up to the model's next thought, call or answer. The answer comes last.
FINAL_ANSWER = "\nFinal Answer:"
OBSERVATION = re.compile(r"\nObservation:(.*?)(?=\nThought:|\nAction:|\Z)", re.DOTALL)

Span = tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Instruction:
    """A conversation as tokens.

    Attributes:
      tokens: int32[n].
      system_length: tokens before the first turn: the template's opening and the system block.
      spans: int32[m, 3] of (start, end, targets): tokens [start, end) are labels for those values
        of loss.targets whose bits are set in `targets`. Sorted; spans never overlap.
      row_system: the row's own system text, "" if it has none.
      weights: float32[m], the weight of each span's labels; None if all are 1.
      conversation: the conversation as JSON, where another system prompt needs a new rendering;
        else "".
    """

    tokens: np.ndarray
    system_length: int
    spans: np.ndarray
    row_system: str
    weights: np.ndarray | None = None
    conversation: str = ""


def label_mask(instruction: Instruction, targets: str) -> np.ndarray:
    """bool[n]: True if a token is a label under loss.targets; token 0 never is."""
    mask = np.zeros(len(instruction.tokens), bool)
    for start, end, bits in instruction.spans.tolist():
        if bits & TARGETS[targets]:
            mask[start:end] = True
    return mask


def span_weights(instruction: Instruction) -> np.ndarray:
    """float32[n]: the weight of the span that each token stands in; 1 outside of spans."""
    weights = np.ones(len(instruction.tokens), np.float32)
    if instruction.weights is not None:
        for (start, end, _), weight in zip(
            instruction.spans.tolist(), instruction.weights.tolist(), strict=True
        ):
            weights[start:end] = weight
    return weights


def loss_tokens(instruction: Instruction) -> tuple[int, int]:
    """The number of labels under loss.targets `assistant`, and under `qwen_official`."""
    counts = {ASSISTANT: 0, QWEN_OFFICIAL: 0}
    for start, end, bits in instruction.spans.tolist():
        for target in counts:
            counts[target] += (end - start) * bool(bits & target)
    return counts[ASSISTANT], counts[QWEN_OFFICIAL]


def system_text(prompt: str | None, row_system: str, mode: str) -> str | None:
    """The text of the system block under data.row_system (`mode`); None means no block."""
    if not row_system:
        return prompt
    if not prompt or mode == "keep":
        return row_system
    return prompt if mode == "replace" else f"{prompt}\n\n{row_system}"


def _head(template: Template, system: list[int] | None) -> tuple[list[int], list[Span]]:
    """Tokens and spans before the first turn; the span includes the token that begins the turn."""
    if system is None:
        return list(template.opening), []
    tokens = [*template.opening, *template.headers["system"], *system, *template.footer]
    return tokens, [(len(tokens) - len(template.footer), len(tokens) + 1, QWEN_OFFICIAL)]


def render(
    conversations: Sequence[Conversation], tokenizer: Tokenizer, prompt: str | None, row_system: str
) -> list[Instruction]:
    """Renders conversations as instructions under one domain's system prompt.

    Args:
      conversations: any number; the tokenizer encodes them as one batch.
      prompt: the system prompt; None means no system block, except for a row's own system text.
      row_system: data.row_system, which decides about a row's own system text.
    """
    template = tokenizer.template
    systems = [system_text(prompt, c.system or "", row_system) for c in conversations]
    distinct = list({text for text in systems if text is not None})
    contents = [message.content for c in conversations for message in c.turns]
    texts = [template.text(content) for content in (*distinct, *contents)]
    encoded = iter(tokenizer.encode_batch(texts))
    system_ids: dict[str | None, list[int] | None] = {None: None}
    system_ids.update((text, next(encoded)) for text in distinct)
    instructions = []
    for conversation, system in zip(conversations, systems, strict=True):
        tokens, spans = _head(template, system_ids[system])
        system_length = len(tokens)
        for number, message in enumerate(conversation.turns):
            # The fixed text around an answer that is not trained on is not trained on either.
            labels = message.role != "assistant" or message.train
            if number and labels:
                spans.append((len(tokens), len(tokens) + 1, QWEN_OFFICIAL))
            tokens += template.headers[message.role]
            start = len(tokens)
            tokens += next(encoded)
            end = len(tokens)
            tokens += template.footer
            if message.role == "assistant" and message.train:
                end += 1
                spans += _answer_spans(message, start, end, tokenizer)
            if labels and end < len(tokens):
                spans.append((end, len(tokens), QWEN_OFFICIAL))
        instructions.append(
            Instruction(
                np.array(tokens, np.int32),
                system_length,
                np.array(spans, np.int32),
                conversation.system or "",
            )
        )
    return instructions


def _answer_spans(message: Message, start: int, end: int, tokenizer: Tokenizer) -> list[Span]:
    """The spans of an answer at tokens [start, end), which include the token that ends the turn."""
    both = ASSISTANT | QWEN_OFFICIAL
    if not message.trajectory:
        return [(start, end, both)]
    content = tokenizer.template.text(message.content)
    steps = tokenizer.normalize(content).partition(FINAL_ANSWER)[0]
    begins = np.array([begin for begin, _ in tokenizer.encode_with_offsets(content)[1]])
    spans: list[Span] = []
    written = start  # up to here the spans are complete
    for observation in OBSERVATION.finditer(steps):
        first, last = (start + np.searchsorted(begins, observation.span(1))).tolist()
        spans += [(written, first, both), (first, last, QWEN_OFFICIAL)]
        written = last
    return [*spans, (written, end, both)]


def with_system_prompt(
    instruction: Instruction, tokenizer: Tokenizer, prompt: str | None, row_system: str
) -> Instruction:
    """The same turns under another system prompt, as `render` gives them for that prompt."""
    text = system_text(prompt, instruction.row_system, row_system)
    template = tokenizer.template
    content = None if text is None else tokenizer.encode(template.text(text))
    head, head_spans = _head(template, content)
    # The span of the system block includes the token that begins the first turn, so no span
    # begins or ends at the border.
    spans = instruction.spans[instruction.spans[:, 0] > instruction.system_length]
    spans = spans + np.array([len(head) - instruction.system_length] * 2 + [0], np.int32)
    return replace(
        instruction,
        tokens=np.concatenate(
            [np.array(head, np.int32), instruction.tokens[instruction.system_length :]]
        ),
        system_length=len(head),
        spans=np.concatenate([np.array(head_spans, np.int32).reshape(-1, 3), spans]),
    )


def first_exchanges(
    instruction: Instruction, tokenizer: Tokenizer, limit: int
) -> tuple[Instruction, int]:
    """Drops exchanges (a user and an assistant turn) from the end until the rest fits `limit`.

    Args:
      limit: tokens.

    Returns:
      The shorter instruction and the number of its exchanges; 0 if not even one fits.
    """
    tokens, system_length = instruction.tokens, instruction.system_length
    # This token never comes from text, so it marks the turns; every second one begins an exchange.
    turns = system_length + np.flatnonzero(tokens[system_length:] == tokenizer.template.turn)
    ends = np.append(turns[2::2], len(tokens))
    count = int(np.searchsorted(ends, limit, side="right"))
    end = int(ends[count - 1]) if count else system_length
    spans = instruction.spans[instruction.spans[:, 0] < end]
    return replace(instruction, tokens=tokens[:end], spans=spans), count


def render_prompt(
    messages: Sequence[Message], tokenizer: Tokenizer, prompt: str | None
) -> list[int]:
    """The tokens of a chat whose last message is the user's, up to where the model answers.

    Args:
      messages: a system message at the front replaces `prompt`.
      prompt: the system prompt; None means no system block.
    """
    template = tokenizer.template
    if messages[0].role == "system":
        prompt, messages = messages[0].content, messages[1:]
    system = None if prompt is None else tokenizer.encode(template.text(prompt))
    tokens, _ = _head(template, system)
    for message in messages:
        tokens += template.headers[message.role]
        tokens += tokenizer.encode(template.text(message.content)) + template.footer
    return tokens + template.headers["assistant"]
