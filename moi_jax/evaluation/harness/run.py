"""Tasks of lm-evaluation-harness by their names, run on a checkpoint, results in its own layout."""

import difflib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moi_jax.common.errors import UserError, cannot_write
from moi_jax.common.fingerprint import json_fingerprint
from moi_jax.evaluation.options import Options
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

NEAR = 5  # names shown beside one that is not known


def open_tasks(names: Sequence[str], include: Path | None = None) -> list[Any]:
    """The tasks, groups and tags of the harness by their names, their data read.

    Args:
      include: a directory of further tasks' YAML files.

    Raises:
      UserError: nothing has that name, its data or code is not to be had, or it cannot be run.
    """
    manager = TaskManager(include_path=include)
    for name in names:
        if name not in manager.task_index:
            near = ", ".join(difflib.get_close_matches(name, manager.all_tasks, NEAR))
            hint = f"near it are {near}" if near else "python -m lm_eval ls tasks shows all"
            raise UserError(f"lm-eval has no task {name!r}; {hint}; --include-path adds your own")
    return [task for name in names for task in _load(manager, name)]


def _load(manager: TaskManager, name: str) -> list[Any]:
    try:
        loaded = manager.load([name])
    except Exception as error:  # a task is a program and a download, and may raise anything
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"lm-eval cannot load the task {name} ({type(error).__name__}: {reason}); its data and "
            f"metrics come from the Hugging Face hub, without a network from the cache in HF_HOME"
        ) from None
    for task_name, task in loaded["tasks"].items():
        if getattr(task, "UNSAFE_CODE", False):
            raise UserError(
                f"the lm-eval task {task_name} runs generated code unprotected, so it is not run; "
                f"--tasks humaneval,mbpp have a sandbox"
            )
        if getattr(task, "MULTIMODAL", False):
            raise UserError(f"the lm-eval task {task_name} has pictures, which no model here reads")
    return [loaded["groups"][name]] if name in loaded["groups"] else [*loaded["tasks"].values()]


def run_lm_eval(tasks: Sequence[Any], model: ChatModel, made_by: Json, options: Options) -> Json:
    """Runs tasks of the harness through the chat template, and prints its table.

    Its results and samples go to options.out/lm_eval, in its own layout. Greedy answers and
    likelihoods are kept there as they come, and a run that was killed goes on.

    Args:
      tasks: see `open_tasks`.
      made_by: what stands for the model: its name, parameters, prompts, template.
      options: limit (the first of each task, as everywhere in the harness), shots,
        max_new_tokens, temperature, top_p and seed; None are the task's own.

    Returns:
      The harness's results.

    Raises:
      UserError: a task asks for what cannot be done, logits are not finite, or options.out cannot
        be written.
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
        task_manager=TaskManager(include_defaults=False),  # nothing is left to be found
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
    """Raises UserError where the harness could not write: it only warns."""
    tracker.save_results_aggregated(results=results, samples=samples)
    for name in samples:
        tracker.save_results_samples(task_name=name, samples=samples[name])
    folder /= tracker.general_config_tracker.model_name_sanitized
    names = [f"results_{tracker.date_id}.json"]
    names += [f"samples_{name}_{tracker.date_id}.jsonl" for name in samples]
    for name in names:
        if not (folder / name).exists():
            raise UserError(f"cannot write {folder / name}; its answers are kept, so run it again")
