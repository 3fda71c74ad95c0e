"""Evaluations during training: held-out losses, benchmarks and sample answers."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from jax.sharding import Mesh

from moi_jax import config
from moi_jax.checkpoints.experiment import Experiment
from moi_jax.common.errors import UserError
from moi_jax.data.dataset import Dataset
from moi_jax.evaluation.benchmarks import run_task
from moi_jax.evaluation.held_out import HeldOut
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Json, evenly_spaced
from moi_jax.evaluation.results import summarize
from moi_jax.evaluation.row_sums import make_row_sums
from moi_jax.evaluation.tasks import open_task
from moi_jax.models.decoder import Bind, Tree
from moi_jax.parallel import hosts
from moi_jax.parallel.placing import batch_shards
from moi_jax.sampling.chat_model import ChatModel, make_chat_model
from moi_jax.sampling.response_log import ResponseLog
from moi_jax.sampling.sample_completions import make_sample_completions

log = logging.getLogger(__name__)


ShouldStop = Callable[[], bool]
Evaluate = Callable[[Tree, ShouldStop], dict[str, float]]


@dataclass(frozen=True)
class TrainingEvaluations:
    """The evaluations of a run, see `moi_jax.training.run.Evaluations`."""

    held_out: Evaluate
    benchmarks: Evaluate | None
    samples: Callable[[Tree], list[dict[str, str]]] | None


def make_evaluations(
    experiment: Experiment, dataset: Dataset, bind: Bind, mesh: Mesh, run_dir: Path
) -> TrainingEvaluations:
    """Makes the evaluations that the config asks for.

    Args:
      bind: parameters -> model.

    Raises:
      UserError: a benchmark is unknown or cannot run here, or its data is missing or damaged.
    """
    config = dataset.config
    train = config.train
    held_out = HeldOut(
        dataset.caches,
        dataset.selections,
        config.data,
        config.loss.targets,
        dataset.tokenizer,
        train.microbatch_rows or train.global_batch_rows,
        batch_shards(mesh),
    )
    row_sums = make_row_sums(bind, mesh)
    samples = None
    if train.sample_prompts:
        samples = make_sample_completions(
            train.sample_prompts,
            train.sample_max_new_tokens,
            config.data,
            dataset.tokenizer,
            bind,
            experiment.model,
            mesh,
        )
    benchmarks = None
    if config.eval.benchmarks.tasks:
        make_chat = make_chat_model(
            bind,
            experiment.model,
            dataset.tokenizer,
            config.data.default_system_prompt,
            mesh=mesh,
        )
        benchmarks = make_benchmark(config.eval.benchmarks, run_dir / "benchmarks", make_chat)
    return TrainingEvaluations(
        held_out=lambda parameters, should_stop: held_out.losses(
            partial(row_sums, parameters), should_stop
        ),
        benchmarks=benchmarks,
        samples=samples,
    )


def make_benchmark(
    settings: config.Benchmarks,
    out: Path,
    make_chat: Callable[[Tree], ChatModel],
) -> Evaluate:
    """Returns a function (parameters, should_stop) -> {"eval/<task>/score": 0 to 100}.

    A task without a score on a few items gives each of its metrics instead, for example
    "eval/teval.review_str.answer/score". The result is {} once should_stop() returns True.

    Args:
      out: the directory for files that a task keeps for itself.

    Raises:
      UserError: a task is unknown or cannot run here, or its data is missing or damaged.
    """
    if "mt_bench" in settings.tasks:
        raise UserError(
            "eval.benchmarks.tasks names mt_bench, whose answers a judge has to rate, call by "
            "call; run it with python -m moi_jax.evaluate"
        )
    options = BenchmarkOptions(
        data=settings.data,
        out=out,
        max_new_tokens=settings.max_new_tokens,
        allow_code_execution=settings.allow_code_execution,
        mmlu_method=settings.mmlu_method,
    )
    opened = [open_task(name, options) for name in settings.tasks]
    asked = [(task, evenly_spaced(items, settings.limit)) for task, items in opened]
    told: set[str] = set()

    def benchmark(parameters: Tree, should_stop: ShouldStop) -> dict[str, float]:
        def after_each() -> None:
            if should_stop():
                raise StopRequested

        model = make_chat(parameters)
        scores: dict[str, float] = {}
        try:
            for task, items in asked:
                after_each()
                answers = ResponseLog(None, {})
                scored, skipped = run_task(task, items, model, options, answers, after_each)
                summary = hosts.from_main(
                    "the results of a task",
                    partial(summarize, task, scored, skipped, all_items=False),
                )
                scores.update(_scores(task.name, summary))
                _tell_once(f"eval.benchmarks: {task.name}", summary["notes"], told)
        except StopRequested:
            return {}
        return scores

    return benchmark


def _tell_once(what: str, notes: Sequence[str], told: set[str]) -> None:
    """Logs notes, such as what cannot be scored here and why, when they first come up."""
    for line in (f"{what}: {note}" for note in notes):
        if line not in told:
            told.add(line)
            log.info(line)


def _scores(name: str, summary: Json) -> dict[str, float]:
    if summary["score"] is not None:
        return {f"eval/{name}/score": summary["score"]}
    return {
        f"eval/{name}.{metric.replace('/', '.')}/score": 100 * values["mean"]
        for metric, values in summary["metrics"].items()
    }


class StopRequested(Exception):
    """The run was asked to stop, so the benchmarks end early."""
