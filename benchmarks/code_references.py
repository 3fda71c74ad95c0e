"""Checks the sandbox: python benchmarks/code_references.py DATA [--sandbox weak]

DATA holds humaneval/ and mbpp/ in the layout of the benchmarks. Every reference solution of
HumanEval and of all of MBPP (not only of the evaluated rows) must pass. Three programs made from
each solution must fail: a function with another result, one that returns nothing, and one that
returns an object equal to everything. Prints the items whose own tests accept such a program.
"""

import argparse
import time
from collections import Counter
from pathlib import Path

from moi_jax.cli.command import run_command
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Response
from moi_jax.evaluation.tasks import mbpp
from moi_jax.evaluation.tasks.code_task import CodeTask
from moi_jax.evaluation.tasks.humaneval import HumanEval

# Each is put behind the reference and takes the place of the function NAME.
WRONG = {
    "another result": """
def _wrong(right):
    def other(value):
        kind = type(value)
        if kind is bool:
            return not value
        if kind in (int, float, complex):
            return value + 1
        if kind is str:
            return value + "x"
        if kind in (list, tuple):
            return value + kind([0])
        if kind is dict:
            return {**value, "x": 0}
        if kind is set:
            return value ^ {"x"}
        return 0
    return lambda *args: other(right(*args))
NAME = _wrong(NAME)
""",
    "nothing": "NAME = lambda *args: None\n",
    "equals everything": """
class _Any:
    __eq__ = __lt__ = __gt__ = __contains__ = lambda self, other: True
    __ne__ = lambda self, other: False
    __hash__ = lambda self: 0
    __sub__ = __rsub__ = __abs__ = lambda self, *other: self
NAME = lambda *args: _Any()
""",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("--sandbox", choices=["strict", "weak"], default="strict")
    args = parser.parse_args()
    options = BenchmarkOptions(
        args.data, args.data, allow_code_execution=True, sandbox=args.sandbox
    )
    mbpp.EVALUATED = range(1, 975)
    for task in (HumanEval(options), mbpp.MBPP(options)):
        items = task.load()
        print(f"{task.name}: {len(items)} items, sandbox {task.sandbox.backend}")
        judge(task, "reference", [(item, reference(item)) for item in items])
        for kind, code in WRONG.items():
            judge(task, kind, [(item, wrong(item, code)) for item in items])


def judge(task: CodeTask, kind: str, answers: list[tuple[Item, str]]) -> None:
    start = time.perf_counter()
    answered = [(item, Response((f"```python\n{code}\n```",))) for item, code in answers]
    scores = list(task.score(answered))
    passed = [
        item.id for (item, _), score in zip(answered, scores, strict=True) if score.failure is None
    ]
    failures = Counter(score.failure for score in scores if score.failure)
    counts = "".join(f", {count} {failure}" for failure, count in failures.most_common())
    took = time.perf_counter() - start
    print(f"  {kind}: {len(passed)} of {len(scores)} pass{counts} ({took:.1f} s)")
    if kind == "reference":
        odd = [
            (item.id, score)
            for (item, _), score in zip(answered, scores, strict=True)
            if score.failure
        ]
    else:
        odd = [(item, "passes") for item in passed]
    for item, what in odd:
        print(f"    {item}: {what}")


def reference(item: Item) -> str:
    """Returns the published solution as a whole definition; HumanEval publishes only the body."""
    return item.gold.get("stub", "") + item.gold["reference"]


def wrong(item: Item, code: str) -> str:
    """Returns the reference, followed by a wrong function of the same name; classes stay."""
    names = item.gold.get("names") or [item.gold["entry_point"]]
    functions = [name for name in names if f"def {name}" in reference(item)]
    return "\n".join([reference(item), *(code.replace("NAME", name) for name in functions)])


if __name__ == "__main__":
    run_command(main)
