"""The input and the output of a sampler: requests and completions."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

# Why a completion ended. stop: a stop token or string. length: max_new_tokens or the context's end.
# too_long: the prompt alone fills the context, so there are no tokens. not_finite: the model gave
# logits that are NaN or infinite.
Finish = Literal["stop", "length", "too_long", "not_finite"]


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationConfig:
    """How a completion is generated.

    Attributes:
      temperature: 0 is greedy decoding, which ignores top_k, top_p and seed.
      top_k: sample from this many of the likeliest ids; 0 means all of them.
      top_p: sample from the fewest likeliest ids whose probabilities reach this sum.
      seed: of the request's own random stream, which does not depend on other requests.
      stop_strings: texts that end a completion; they are not part of it.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0
    stop_strings: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Request(GenerationConfig):
    """One prompt, int token ids, to be completed."""

    prompt: Sequence[int]


@dataclass(frozen=True, slots=True)
class Completion:
    """The completion of a request: ids without the stop token, text up to a stop string."""

    tokens: tuple[int, ...]
    text: str
    finish: Finish
