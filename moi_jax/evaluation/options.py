"""What an evaluation can be asked to do otherwise than by default; all of it stands in results."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal


@dataclass(frozen=True)
class Options:
    """The choices of `python -m moi_jax.evaluate`; each task reads those that concern it.

    Attributes:
      data: the directory of benchmark files, see docs/evaluation.md.
      out: where results, and what a task keeps for itself, are written.
      limit: that many items of each task, evenly spaced over the file; None is all.
      shots: worked examples before the question; None is the task's own number.
      samples: answers asked of each item; more than one needs a temperature.
      temperature: None is the protocol's own (0 but for MT-Bench).
      max_new_tokens: None is the task's own.
      too_long: items that do not fit the context count as wrong (fail) or are left out (skip).
    """

    data: Path
    out: Path
    limit: int | None = None
    shots: int | None = None
    samples: int = 1
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None
    too_long: Literal["fail", "skip"] = "fail"
    # HumanEval and MBPP
    allow_code_execution: bool = False
    sandbox: Literal["strict", "weak"] = "strict"
    # MMLU
    mmlu_method: Literal["generate", "likelihood"] = "generate"
    # MT-Bench
    judge: str | None = None  # the judging model's name at the endpoint
    judge_url: str | None = None
    judge_max_cost: float | None = None  # in US dollars
    judge_price: tuple[float, float] | None = None  # dollars per million tokens: prompts, judgments
    # T-Eval
    teval_system: Literal["default_then_user", "as_user", "as_system"] = "default_then_user"
    teval_compat: bool = False
    teval_embedder: str | None = None  # a name or path for sentence-transformers
