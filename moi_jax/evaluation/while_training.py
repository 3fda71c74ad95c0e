"""Benchmarks on a few of their items while a model is trained (eval.generate)."""

from collections.abc import Callable
from contextlib import closing
from pathlib import Path

from moi_jax import config
from moi_jax.evaluation.answering import AnswerLog, evenly_spaced
from moi_jax.evaluation.chat_model import ChatModel
from moi_jax.evaluation.options import Options
from moi_jax.evaluation.results import summarize
from moi_jax.evaluation.runner import run_task
from moi_jax.evaluation.tasks import make_task
from moi_jax.models.parameters import Tree


def make_benchmark(
    settings: config.Generate,
    out: Path,
    make_chat: Callable[[Tree], ChatModel],
) -> Callable[[Tree, Callable[[], bool]], dict[str, float]]:
    """A function (parameters, whether to give up) -> eval/<task>/score, 0 to 100, of each task.

    Args:
      out: where a task keeps what it needs for itself.

    Raises:
      UserError: a task is unknown, may not run here, or its data is missing or damaged.
    """
    options = Options(
        data=settings.data,
        out=out,
        max_new_tokens=settings.max_new_tokens,
        allow_code_execution=settings.allow_code_execution,
    )
    tasks = [make_task(name, options) for name in settings.tasks]
    asked = [(task, evenly_spaced(task.load(), settings.limit)) for task in tasks]

    def benchmark(parameters: Tree, give_up: Callable[[], bool]) -> dict[str, float]:
        model = make_chat(parameters)
        scores: dict[str, float] = {}
        for task, items in asked:
            if give_up():
                return {}
            with closing(AnswerLog(None, {})) as log:
                scored, skipped = run_task(task, items, model, options, log)
            summary = summarize(task, scored, skipped, whole=False)
            if summary["score"] is not None:
                scores[f"eval/{task.name}/score"] = summary["score"]
        return scores

    return benchmark
