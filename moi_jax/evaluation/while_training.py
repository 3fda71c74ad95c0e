"""Benchmarks on a few of their items while a model is trained (eval.generate)."""

from collections.abc import Callable
from pathlib import Path

from moi_jax.common.errors import UserError
from moi_jax.config import schema as config
from moi_jax.evaluation.answering import AnswerLog, evenly_spaced
from moi_jax.evaluation.options import Options
from moi_jax.evaluation.results import summarize
from moi_jax.evaluation.runner import run_task
from moi_jax.evaluation.tasks import open_task
from moi_jax.models.parameters import Tree
from moi_jax.sampling.chat_model import ChatModel

# Those whose score needs the whole benchmark, or a judge.
NO_SLICE = {"mt_bench", "teval"}


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
    for name in NO_SLICE.intersection(settings.tasks):
        raise UserError(
            f"eval.generate.tasks names {name}, which has no score of a few items; run it by "
            f"python -m moi_jax.evaluate"
        )
    options = Options(
        data=settings.data,
        out=out,
        max_new_tokens=settings.max_new_tokens,
        allow_code_execution=settings.allow_code_execution,
    )
    opened = [open_task(name, options) for name in settings.tasks]
    asked = [(task, evenly_spaced(items, settings.limit)) for task, items in opened]

    def benchmark(parameters: Tree, give_up: Callable[[], bool]) -> dict[str, float]:
        def after_each() -> None:
            if give_up():
                raise GivenUp

        model = make_chat(parameters)
        scores: dict[str, float] = {}
        try:
            for task, items in asked:
                after_each()
                log = AnswerLog(None, {})
                scored, skipped = run_task(task, items, model, options, log, after_each)
                summary = summarize(task, scored, skipped, whole=False)
                scores[f"eval/{task.name}/score"] = summary["score"]
        except GivenUp:
            return {}
        return scores

    return benchmark


class GivenUp(Exception):
    """Raised where someone waits for the run to stop."""
