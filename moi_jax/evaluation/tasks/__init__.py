"""The benchmarks by name. Each is imported when it is asked for."""

import importlib
from typing import TYPE_CHECKING

from moi_jax.errors import UserError

if TYPE_CHECKING:
    from moi_jax.evaluation.options import Options
    from moi_jax.evaluation.protocol import Task

# Name: the module and its class. The mean of all seven is the overall figure.
TASKS = {
    "gsm8k": ("gsm8k", "GSM8K"),
    "math": ("competition_math", "CompetitionMath"),
    "humaneval": ("humaneval", "HumanEval"),
    "mbpp": ("mbpp", "MBPP"),
    "mmlu": ("mmlu", "MMLU"),
    "mt_bench": ("mt_bench", "MTBench"),
    "teval": ("teval", "TEval"),
}


def make_task(name: str, options: "Options") -> "Task":
    """Raises UserError where there is no such task, or it cannot run here."""
    if name not in TASKS:
        raise UserError(f"there is no benchmark {name!r}; choose among {', '.join(TASKS)}")
    module, kind = TASKS[name]
    return getattr(importlib.import_module(f"{__name__}.{module}"), kind)(options)
