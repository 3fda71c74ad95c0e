"""Writes report.html: one self-contained page that compares results of several directories."""

import json
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from moi_jax.common.atomic_files import atomic_write_text
from moi_jax.common.errors import cannot_write
from moi_jax.evaluation.methods import INTERVALS, describe_model
from moi_jax.evaluation.reports.charts import bars, color, radar
from moi_jax.evaluation.reports.comparison import (
    Comparison,
    Evaluation,
    compare,
    read_evaluations,
)
from moi_jax.evaluation.reports.items import answer, item_page, values
from moi_jax.evaluation.tasks import PAPER_TASKS
from moi_jax.reports.page import page_template

LONGEST = 3000  # characters of a text that are shown


def write_report(directories: Sequence[Path], out: Path, items: str = "items") -> Path:
    """Writes one page about the results in the directories and returns its path.

    The others are compared with the first directory. The same files give the same bytes.

    Args:
      items: the folder of the pages with every item of a task, as seen from the page.

    Raises:
      UserError: a directory has no results.json, a file is damaged, or `out` cannot be written.
    """
    evaluations = read_evaluations(directories)
    tasks = compare(evaluations)
    pages = {task.name: page for task in tasks if (page := item_page(task, evaluations))}
    for task in tasks:
        if page := pages.get(task.name):
            text = _template("items.html.jinja").render(
                evaluations=evaluations, task=task, page=page, summary=_back(out, items)
            )
            _write(out.parent / items / f"{task.name}.html", text)
    text = _template("report.html.jinja").render(
        evaluations=evaluations,
        tasks=tasks,
        charts=charts(tasks),
        pages={name: f"{items}/{name}.html" for name in pages},
        not_run=[name for name in PAPER_TASKS if name not in {task.name for task in tasks}],
        methods=[(one.name, told) for one in evaluations if (told := methods(one))],
    )
    _write(out, text)
    return out


def _back(page: Path, items: str) -> str:
    """The page as seen from the folder of its items."""
    return Path(os.path.relpath(page, page.parent / items)).as_posix()


def _template(name: str) -> jinja2.Template:
    filters = (number, signed, short, brief, color, keys, answer, values)
    return page_template(Path(__file__).with_name(name), **{one.__name__: one for one in filters})


def _write(path: Path, page: str) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # An answer may contain half of a surrogate pair, which UTF-8 cannot encode.
        atomic_write_text(path, page.encode("utf-8", errors="replace").decode("utf-8"))
    except OSError as error:
        raise cannot_write(path, error) from None


def methods(evaluation: Evaluation) -> list[str]:
    """The protocol in words; [] for results of versions that do not tell it."""
    told = [task for task in evaluation.tasks.values() if "protocol" in task]
    if not told:
        return []
    model = describe_model(evaluation.made_by, told[-1]["run"])
    return [model, *(task["protocol"] for task in told), INTERVALS]


def charts(tasks: Sequence[Comparison]) -> list[Markup]:
    """Bars of all tasks with scores, and a radar if all checkpoints share three or more tasks."""
    scored = [task for task in tasks if any(r and r["score"] is not None for r in task.results)]
    groups = [
        [
            (r["score"], r["interval"]) if r and r["score"] is not None else None
            for r in task.results
        ]
        for task in scored
    ]
    if not scored:
        return []
    drawn = [bars([task.name for task in scored], groups)]
    whole = [n for n, group in enumerate(groups) if all(group)]
    if len(whole) >= 3:
        spokes = [[bar[0] for n in whole if (bar := groups[n][k])] for k in range(len(groups[0]))]
        drawn.append(radar([scored[n].name for n in whole], spokes))
    return drawn


def keys(results: Sequence[dict[str, Any] | None], part: str) -> list[str]:
    """All keys of one part of a task's results, over all evaluations."""
    found = (result.get(part, {}) for result in results if result)
    return list(dict.fromkeys(key for of_result in found for key in of_result))


def number(value: float | None, digits: int = 1) -> str:
    if value is None or math.isnan(value):
        return "–"
    return f"{value:,.{digits}f}"


def signed(value: float) -> str:
    return f"{value:+.1f}".replace("-", "−")


def short(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} … ({len(text):,} characters)"


def brief(value: Any) -> str:
    """A setting or a detail on one line."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 400 else f"{text[:400]} …"
