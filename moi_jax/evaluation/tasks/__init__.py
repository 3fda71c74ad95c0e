"""The benchmarks by name. A benchmark is imported when it is used."""

import importlib
from collections import Counter
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING

from moi_jax.common.errors import UserError
from moi_jax.common.fingerprint import json_fingerprint
from moi_jax.parallel import hosts

if TYPE_CHECKING:
    from moi_jax.evaluation.options import BenchmarkOptions
    from moi_jax.evaluation.protocol import Item, Task

# Name: the module and its class.
TASKS = {
    "gsm8k": ("gsm8k", "GSM8K"),
    "math": ("competition_math", "CompetitionMath"),
    "humaneval": ("humaneval", "HumanEval"),
    "mbpp": ("mbpp", "MBPP"),
    "mmlu": ("mmlu", "MMLU"),
    "mt_bench": ("mt_bench", "MTBench"),
    "teval": ("teval", "TEval"),
}
# The seven of the paper: the overall score is their mean. A new benchmark does not join them.
PAPER_TASKS = ("gsm8k", "math", "humaneval", "mbpp", "mmlu", "mt_bench", "teval")


def task_names(listed: Iterable[str]) -> list[str]:
    """The names of a list, each once; "all" is the seven of the paper."""
    return list(
        dict.fromkeys(name for one in listed for name in (PAPER_TASKS if one == "all" else [one]))
    )


def make_task(name: str, options: "BenchmarkOptions") -> "Task":
    """Makes a task; raises UserError where there is none of this name, or it cannot run here."""
    if name not in TASKS:
        raise UserError(f"there is no benchmark {name!r}; choose among {', '.join(TASKS)}")
    if not hosts.is_main():  # it does not score, so it needs no sandbox, judge or embedder
        options = replace(
            options,
            sandbox="weak",
            code_packages=(),
            judge=None,
            judge_url=None,
            teval_embedder=None,
        )
    module, kind = TASKS[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(options)


def open_task(name: str, options: "BenchmarkOptions") -> "tuple[Task, list[Item]]":
    """A task and all of its items.

    Raises:
      UserError: see `make_task` and `Task.load`; or two items have the same id.
    """
    task = make_task(name, options)
    items = task.load()
    twice = [item for item, count in Counter(item.id for item in items).items() if count > 1]
    if twice:
        raise UserError(
            f"{name}: {len(twice)} ids occur more than once in its files, the first is {twice[0]}; "
            f"keep one item of each id"
        )
    prompts = [str(replace(item, gold=None)) for item in items]
    hosts.check_same({f"{name} benchmark": json_fingerprint(prompts)})
    return task, items
