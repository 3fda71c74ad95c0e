"""Writes report.html: one self-contained page that compares results of several directories."""

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from markupsafe import Markup

from moi_jax.common.atomic_files import atomic_write_text
from moi_jax.common.errors import cannot_write
from moi_jax.evaluation.reports.charts import bars, color, radar
from moi_jax.evaluation.reports.comparison import Comparison, compare, read_evaluations
from moi_jax.reports.page import page_template

LONGEST = 3000  # characters of a text that are shown


def write_report(directories: Sequence[Path], out: Path) -> Path:
    """Writes one page about the results in the directories and returns its path.

    The others are compared with the first directory. The same files give the same bytes.

    Raises:
      UserError: a directory has no results.json, a file is damaged, or `out` cannot be written.
    """
    evaluations = read_evaluations(directories)
    tasks = compare(evaluations)
    template = page_template(
        Path(__file__).with_name("report.html.jinja"),
        number=number,
        signed=signed,
        short=short,
        brief=brief,
        color=color,
        keys=keys,
    )
    page = template.render(evaluations=evaluations, tasks=tasks, charts=charts(tasks))
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # An answer may contain half of a surrogate pair, which UTF-8 cannot encode.
        atomic_write_text(out, page.encode("utf-8", errors="replace").decode("utf-8"))
    except OSError as error:
        raise cannot_write(out, error) from None
    return out


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
    return list(dict.fromkeys(key for result in results if result for key in result[part]))


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
