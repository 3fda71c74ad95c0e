"""What is asked of a sampler, and what it gives back."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Why an answer ended: a stop token or string; its length or the context's end; the prompt alone
# fills the context (there are no tokens then); the model gave logits that are not finite.
Finish = Literal["stop", "length", "too_long", "not_finite"]


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt to go on from.

    Attributes:
      prompt: its ids.
      temperature: 0 is greedy; top_k, top_p and seed play no part then.
      top_k: the choice is among so many of the likeliest ids; 0 is all.
      top_p: and among the fewest likeliest ids whose probabilities reach this sum.
      seed: of this request's own random stream: its draws do not depend on what is beside it.
      stop_strings: texts that end an answer; they are not part of it.
    """

    prompt: Sequence[int]
    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Completion:
    """The answer to a request: ids without the stop token, and their text up to a stop string."""

    tokens: tuple[int, ...]
    text: str
    finish: Finish
