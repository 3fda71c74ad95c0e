"""The section `eval`: what is measured while a model is trained."""

from pathlib import Path
from typing import Literal

from moi_jax.config.section import Count, Positive, Section


class Benchmarks(Section):
    """Benchmarks that run on a few of their items during training, see docs/evaluation.md."""

    tasks: tuple[str, ...] = ()  # for example gsm8k, humaneval
    data: Path = Path("data/benchmarks")  # the directory of their files
    every: Positive = 1000
    limit: Positive = 20  # items of each task, evenly spaced
    max_new_tokens: Positive = 256
    allow_code_execution: bool = False  # for humaneval and mbpp
    mmlu_method: Literal["generate", "likelihood"] = "generate"


class Eval(Section):
    """The held-out losses, and the benchmarks beside them."""

    every: Count = 200  # 0: before and after training only
    benchmarks: Benchmarks = Benchmarks()
