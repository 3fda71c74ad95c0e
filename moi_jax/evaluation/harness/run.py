"""Runs tasks of lm-evaluation-harness on a checkpoint; results have the harness's layout."""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moi_jax.common.errors import UserError, cannot_write
from moi_jax.common.fingerprint import json_fingerprint
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.sampling.chat_model import ChatModel

try:
    from lm_eval import simple_evaluate
    from lm_eval.loggers import EvaluationTracker
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import make_table
except ImportError as error:
    raise UserError(
        f"lm-evaluation-harness is not installed ({error}); pip install 'moi_jax[eval]'"
    ) from None
from moi_jax.evaluation.harness.adapter import CheckpointLM

log = logging.getLogger(__name__)


Json = dict[str, Any]

NEAR = 5  # similar names that are shown for an unknown one


def open_tasks(names: Sequence[str], include: Path | None = None) -> list[Any]:
    """Loads tasks, groups and tags of the harness by name, with their data.

    Args:
      include: a directory of further tasks' YAML files.

    Raises:
      UserError: a name is unknown, its data or code cannot be loaded, or it must not run here.
    """
    manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.task_index:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, NEAR))
            hint = f"similar names are {near}" if near else "python -m lm_eval ls tasks lists all"
            raise UserError(
                f"lm-eval has no task {name!r}; {hint}; --include-path adds your own tasks"
            )
    return [task for name in names for task in _load(manager, name)]


def _load(manager: TaskManager, name: str) -> list[Any]:
    try:
        loaded = manager.load([name])
    except Exception as error:  # a task is a program and a download, and may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"lm-eval cannot load the task {name} ({type(error).__name__}: {reason}); its data and "
            f"metrics come from the Hugging Face hub, or from the cache in HF_HOME"
        ) from None
    for task_name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"the lm-eval task {task_name} runs generated code without a sandbox, so it is "
                f"refused; use --tasks humaneval,mbpp, which have one"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(
                f"the lm-eval task {task_name} has pictures, which our models cannot read"
            )
    return [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]


def run_lm_eval(
    tasks: Sequence[Any], model: ChatModel, made_by: Json, options: BenchmarkOptions
) -> Json:
    """Runs tasks of the harness with the chat template, and logs its table.

    Results and samples go to options.out/lm_eval in the harness's layout. Greedy answers and
    likelihoods are stored there as they arrive, so that an evaluation that was killed continues.

    Args:
      tasks: see `open_tasks`.
      made_by: what identifies the model: its name, parameters, system prompt, template.
      options: limit (the first items of each task, as always in the harness), shots,
        max_new_tokens, temperature, top_p and seed are used; None is the task's own.

    Returns:
      The harness's results.

    Raises:
      UserError: a task needs what the sampler cannot do, logits are not finite, or options.out
        cannot be written.
    """
    folder = options.out / "lm_eval"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from None
    generation: Json = {}
    if options.max_new_tokens is not None:
        generation["max_gen_toks"] = options.max_new_tokens
    if options.temperature is not None:
        generation |= {"temperature": options.temperature, "do_sample": options.temperature > 0}
    if options.top_p < 1:
        generation["top_p"] = options.top_p
    kept = json_fingerprint([made_by, model.scorer.context])
    tracker = EvaluationTracker(output_path=str(folder))
    results = simple_evaluate(
        model=CheckpointLM(model, options.seed),
        model_args={"path": made_by["name"]},  # which also names the directory
        tasks=list(tasks),
        task_manager=TaskManager(include_defaults=False),  # all tasks are loaded already
        num_fewshot=options.shots,
        limit=options.limit,
        gen_kwargs=generation or None,
        apply_chat_template=True,
        use_cache=str(folder / f"answers-{kept}"),
        evaluation_tracker=tracker,
    )
    samples = results.pop("samples")
    results["config"]["checkpoint"] = made_by
    _save(tracker, folder, results, samples)
    log.info(make_table(results))
    if results.get("groups"):
        log.info(make_table(results, "groups"))
    return results


def _save(tracker: EvaluationTracker, folder: Path, results: Json, samples: Json) -> None:
    """Raises UserError where the harness could not write, because it only warns."""
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in samples:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    folder /= tracker.general_config_tracker.model_name_sanitized
    names = [f"results_{tracker.date_id}.json"]
    names += [f"samples_{name}_{tracker.date_id}.jsonl" for name in samples]
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"cannot write {folder / name}; the answers are kept, so run it again")
