"""Several checkpoints evaluated one after the other, and one table of their results.

Adapters of one base share its parameters, which are read once.
"""

import logging
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax

from moi_jax.checkpoints.parameters import Bases
from moi_jax.common.atomic_files import atomic_write_text, check_writable
from moi_jax.common.errors import UserError
from moi_jax.evaluation.evaluate import EvaluationResult, checkpoint_name, evaluate
from moi_jax.evaluation.options import EvaluationRequest
from moi_jax.evaluation.prompt_matrix.prompts import OWN
from moi_jax.parallel import hosts

TABLE = "comparison.md"

log = logging.getLogger(__name__)


def names_of(steps: Sequence[Path]) -> list[str]:
    """The short names of steps, which become the names of their directories of results.

    Raises:
      UserError: two have the same name.
    """
    names = [checkpoint_name(step) for step in steps]
    for name in names:
        if names.count(name) > 1:
            raise UserError(
                f"{name} would be the directory of results of two checkpoints; evaluate them one "
                f"by one, with an --out for each"
            )
    return names


def evaluate_several(
    requests: Sequence[EvaluationRequest], devices: Sequence[jax.Device], out: Path
) -> list[EvaluationResult]:
    """Evaluates each request as `evaluate` does, and writes a table of all into `out`.

    Args:
      requests: of checkpoints, with the same model options.

    Raises:
      UserError: as in `evaluate`. What was finished before is kept.
    """
    bases: Bases = {}
    results = [evaluate(request, devices, bases) for request in requests]
    hosts.from_main("the comparison", partial(_write_table, results, out))
    return results


def _write_table(results: Sequence[EvaluationResult], out: Path) -> None:
    table = comparison(results)
    check_writable(out)
    atomic_write_text(out / TABLE, table)
    log.info(f"{table}\nthe table is {out / TABLE}")


def comparison(results: Sequence[EvaluationResult]) -> str:
    """The results as a table in Markdown: a row a checkpoint, a column a figure."""
    rows = {result.directory.name: _figures(result) for result in results}
    columns = list(dict.fromkeys(column for figures in rows.values() for column in figures))
    lines = [["checkpoint", *columns], ["---", *["---:"] * len(columns)]]
    lines += [[name, *(row.get(column, "") for column in columns)] for name, row in rows.items()]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _figures(result: EvaluationResult) -> dict[str, str]:
    """Column -> figure: scores of benchmarks, and held-out losses under a domain's own prompt."""
    figures = {}
    if result.results:
        for name, task in result.results["tasks"].items():
            figures[name] = "" if task["score"] is None else f"{task['score']:.1f}"
    if result.held_out:
        for domain, of in result.held_out["models"]["trained"].items():
            cell = of["cells"].get(OWN)
            figures[f"{domain} loss"] = f"{cell['loss']:.3f}" if cell else ""
    return figures
