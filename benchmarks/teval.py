"""Checks T-Eval's scorers on known answers: python benchmarks/teval.py DATA [--embedder NAME]

DATA holds the directory teval/ of the evaluation data. Each record gets three answers: its gold
answer, an empty one, and its gold plan with shuffled steps. Prints the means of all metrics. Gold
answers must score 1.0 in all metrics that need no embedder. If a record wants the plan in words,
its gold answer is one sentence for each step.
"""

import argparse
import json
import random
from collections import defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path

from moi_jax.cli.command import run_command
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Json, Response
from moi_jax.evaluation.tasks.teval import TEval
from moi_jax.evaluation.teval.scoring import Variant

MARKS = ("thought_start", "thought_end", "action_start", "action_end", "args_start", "args_end")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA")
    parser.add_argument("--embedder", metavar="NAME", help="for sentence-transformers")
    args = parser.parse_args()
    task = TEval(BenchmarkOptions(args.data, args.data, teval_embedder=args.embedder))
    items = task.load()
    gold = means(task, items, gold_answer)
    rows = {
        "gold": gold,
        "gold, steps shuffled": means(task, plans(items), shuffled_plan),
        "nothing": means(task, items, lambda item: ""),
    }
    for name, row in rows.items():
        for metric, (value, count) in row.items():
            print(f"{name}: {metric} {value:.4f} over {count} items")
    for note in task.notes(items, []):
        print(note)
    wrong = [
        metric
        for metric, (value, _) in gold.items()
        if value != 1 and not metric.startswith("plan_str")
    ]
    print(f"gold answers below 1.0: {', '.join(wrong) or 'none'}")
    return int(bool(wrong))


def means(
    task: TEval, items: Sequence[Item], answer: Callable[[Item], str]
) -> dict[str, tuple[float, int]]:
    """Returns metric -> its mean and the number of items that have it."""
    values = defaultdict(list)
    for score in task.score([(item, Response((answer(item),), ("stop",))) for item in items]):
        for metric, value in score.metrics.items():
            values[metric].append(value)
    return {metric: (sum(each) / len(each), len(each)) for metric, each in values.items()}


def plans(items: Sequence[Item]) -> list[Item]:
    return [item for item in items if item.group.startswith("plan")]


def gold_answer(item: Item) -> str:
    variant, gold = Variant.of(item.group), item.gold
    if variant.tasks == "plan":
        return plan_answer(variant, gold["steps"])
    if variant.tasks == "review":
        return f"Answer: {gold['answer']}"
    if variant.tasks == "instruct":
        return instruct_answer(variant, gold)
    if variant.form == "str":
        return str(next(iter(gold.values())))
    return json.dumps(gold)


def instruct_answer(variant: Variant, gold: Json) -> str:
    template = gold["template"]
    parts = {"thought": "I call it.", "action": gold["action"], "args": gold["args"]}
    if variant.form == "json":
        return json.dumps({template[part]: value for part, value in parts.items()})
    ends = zip(MARKS[::2], parts.values(), MARKS[1::2], strict=True)
    return "".join(f"{template[start]}{part}{template[end]}" for start, part, end in ends)


def shuffled_plan(item: Item) -> str:
    """Returns the gold steps in another order; a final FinishAction stays last."""
    steps = item.gold["steps"]
    order = list(range(len(steps) - 1))
    random.Random(item.id).shuffle(order)
    return plan_answer(Variant.of(item.group), [steps[n] for n in order] + steps[-1:])


def plan_answer(variant: Variant, steps: Sequence[Json]) -> str:
    if variant.form == "json":
        return json.dumps([{"id": n, **step} for n, step in enumerate(steps)])
    return "\n".join(f"Use {step['name']} with {step['args']}" for step in steps)


if __name__ == "__main__":
    run_command(main)
