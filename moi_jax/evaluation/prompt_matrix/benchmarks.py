"""Benchmarks under each system prompt of a checkpoint, and under some that it never saw."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moi_jax.evaluation.benchmarks import run_benchmarks
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.prompt_matrix.prompts import distinct_prompts
from moi_jax.evaluation.protocol import Item, Task
from moi_jax.evaluation.provenance import Session
from moi_jax.evaluation.reports.report import write_report
from moi_jax.evaluation.tasks import make_task
from moi_jax.parallel import hosts
from moi_jax.sampling.chat_model import ChatModel

log = logging.getLogger(__name__)


def run_under_prompts(
    tasks: Sequence[tuple[Task, Sequence[Item]]],
    model: ChatModel,
    prompts: Mapping[str, Any],
    made_by: dict[str, Any],
    options: BenchmarkOptions,
    session: Session | None = None,
) -> Path:
    """Runs the tasks under each prompt and writes a report that compares the prompts.

    The results of a prompt are in options.out/prompts/NAME, the report is beside them, and the
    pages of all items are in options.out/prompt_items.

    Args:
      tasks: each with all of its items.
      prompts: the prompts item of the checkpoint, see text/prompts.py.
      made_by: what identifies the model in the results.
      session: see `run_benchmarks`.

    Returns:
      The path of the report.
    """
    directories = []
    for name, prompt in distinct_prompts(prompts, model.tokenizer).items():
        log.info(f"{name}: {'no system block' if prompt is None else prompt}")
        own_options = dataclasses.replace(
            options, out=options.out / "prompts" / name.replace(" ", "_")
        )
        # New tasks: a task may keep files of its own beside the results.
        own_tasks = [(make_task(task.name, own_options), items) for task, items in tasks]
        own_model = dataclasses.replace(model, system_prompt=prompt)
        own_made_by = {**made_by, "system_prompt": prompt}
        run_benchmarks(own_tasks, own_model, own_made_by, own_options, session)
        directories.append(own_options.out)
    report = options.out / "prompts" / "report.html"
    if hosts.is_main():
        write_report(directories, report, items="../prompt_items")
    log.info(f"report {report}")
    return report
