"""Instructions: conversations as tokens, and which of the tokens carry loss."""

import re
from dataclasses import dataclass
from typing import Literal

import numpy as np

ASSISTANT, QWEN_OFFICIAL = 1, 2
TARGETS = {"assistant": ASSISTANT, "qwen_official": QWEN_OFFICIAL}

# In a trajectory, which calls tools in ReAct form, the model writes "Observation:" and the tool
# writes what follows, up to the model's next thought, call or answer. The answer comes last.
FINAL_ANSWER = "\nFinal Answer:"
OBSERVATION = re.compile(r"\nObservation:(.*?)(?=\nThought:|\nAction:|\Z)", re.DOTALL)

Span = tuple[int, int, int]
Thinking = Literal["keep", "drop", "last"]
History = Literal["split", "last", "refuse"]


@dataclass(frozen=True, slots=True)
class Instruction:
    """A conversation as tokens.

    Attributes:
      tokens: int32[n].
      system_length: tokens before the first turn: the template's opening and the system block.
      spans: int32[m, 3] of (start, end, targets): tokens [start, end) are labels for those values
        of loss.targets whose bits are set in `targets`. Sorted; spans never overlap.
      row_system: the row's own system text, "" if it has none.
      weights: float32[m], the weight of the labels in each span; None if all are 1.
      conversation: what must be rendered anew under another system prompt, as JSON; "" where
        `tokens` can be given another system block. `system_length` is 0 then.
    """

    tokens: np.ndarray
    system_length: int
    spans: np.ndarray
    row_system: str
    weights: np.ndarray | None = None
    conversation: str = ""


@dataclass(frozen=True)
class Rendering:
    """How conversations become samples where a template rewrites their history.

    Attributes:
      thinking: keep; drop: no thinking at all; last: only that of the last exchange.
      rewritten_history: split the conversation into samples, take the last one, or refuse it.
    """

    thinking: Thinking = "keep"
    rewritten_history: History = "split"


def label_mask(instruction: Instruction, targets: str) -> np.ndarray:
    """bool[n]: True if a token is a label under loss.targets; token 0 never is."""
    mask = np.zeros(len(instruction.tokens), bool)
    for start, end, bits in instruction.spans.tolist():
        if bits & TARGETS[targets]:
            mask[start:end] = True
    return mask


def token_weights(instruction: Instruction, targets: str) -> np.ndarray:
    """float32[n]: the weight of each token as a label under loss.targets; 0 if it is none."""
    weights = np.zeros(len(instruction.tokens), np.float32)
    of_span = instruction.weights
    for number, (start, end, bits) in enumerate(instruction.spans.tolist()):
        if bits & TARGETS[targets]:
            weights[start:end] = 1 if of_span is None else of_span[number]
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


def observed(content: str) -> list[tuple[int, int]]:
    """The half-open character ranges of what tools wrote in the text of a trajectory."""
    steps = content.partition(FINAL_ANSWER)[0]
    return [found.span(1) for found in OBSERVATION.finditer(steps)]
