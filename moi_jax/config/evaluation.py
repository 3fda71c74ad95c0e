"""The section `eval`: what is measured while a model is trained."""

from pathlib import Path

from moi_jax.config.section import Count, Positive, Section


class Generate(Section):
    """Benchmarks on a few of their items while training, see docs/evaluation.md."""

    tasks: tuple[str, ...] = ()  # such as gsm8k, humaneval
    data: Path = Path("data/benchmarks")  # the directory of their files
    every: Positive = 1000
    limit: Positive = 20  # items of each task, evenly spaced
    max_new_tokens: Positive = 256
    allow_code_execution: bool = False  # for humaneval and mbpp


class Eval(Section):
    every: Count = 200  # 0: before and after training only
    generate: Generate = Generate()
