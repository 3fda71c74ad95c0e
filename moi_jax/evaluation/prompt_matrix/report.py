"""Shows the prompt matrix: tables in the log, a heat map, and a JSON line per item and prompt."""

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from rich import box
from rich.table import Table

from moi_jax.common.errors import UserError
from moi_jax.common.log import LogTable
from moi_jax.data.preview.picture import INK, PADDING, QUIET, STYLE
from moi_jax.evaluation.prompt_matrix.matrix import HeldOutItem, ItemSums
from moi_jax.evaluation.prompt_matrix.prompts import DEFAULT, OWN

log = logging.getLogger(__name__)


Json = dict[str, Any]

# The colour scale covers at least this difference, so that small ones stay pale.
LEAST_SCALE = 0.05


def item_lines(
    models: Mapping[str, ItemSums],
    items: Sequence[HeldOutItem],
    domains: Sequence[str],
    columns: Sequence[str],
) -> Iterator[str]:
    """A JSON line for each model, item and column. All other figures follow from these lines."""
    for model, sums in models.items():
        for number, item in enumerate(items):
            for column, name in enumerate(columns):
                if np.isnan(sums.nll[number, column]):
                    continue
                line = {
                    "model": model,
                    "item": item.id,
                    "domain": domains[item.domain],
                    "prompt": name,
                    "nll": float(sums.nll[number, column]),
                    "loss_tokens": int(sums.loss_tokens[number, column]),
                    "correct": int(sums.correct[number, column]),
                }
                yield json.dumps(line) + "\n"


def print_matrix(results: Json) -> None:
    """Logs losses, accuracies and perplexities of each model, and the gaps of all models.

    Args:
      results: the content of held_out.json.
    """
    for model, domains in results["models"].items():
        log.info(f"Held-out, {model}: loss in nats per token, accuracy, perplexity")
        table = _table()
        table.add_column("prompt")
        for name in domains:
            table.add_column(name, justify="right")
        for column in results["columns"]:
            cells = [domain["cells"].get(column) for domain in domains.values()]
            table.add_row(column, *(_cell_text(cell) for cell in cells))
        log.info(LogTable(table))
    log.info("Gap: loss under the default prompt minus loss under the own one")
    log.info(LogTable(_gaps(results)))


def _table() -> Table:
    return Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False)


def _cell_text(cell: Json | None) -> str:
    if cell is None:
        return ""
    perplexity = cell["perplexity"]
    digits = 2 if perplexity < 10 else 1 if perplexity < 100 else 0
    return f"{cell['loss']:.3f} {cell['accuracy']:.1%} {perplexity:,.{digits}f}"


def _gaps(results: Json) -> Table:
    table = _table()
    for name in ("domain", "model"):
        table.add_column(name)
    for name in ("items", "loss tokens", "own loss", "gap", "95 % interval"):
        table.add_column(name, justify="right")
    for name, domain in results["domains"].items():
        counts = f"{domain['items']:,}", f"{domain['loss_tokens']:,}"
        same = domain["prompts"][OWN] == domain["prompts"][DEFAULT]
        for model, domains in results["models"].items():
            gap = domains[name]["gap"]
            figures = ["", "", ""]
            if gap is not None:
                measured = [f"{gap['gap']:+.3f}", interval_text(gap["interval"])]
                figures = [
                    f"{gap['own_loss']:.3f}",
                    *(["", "own is default"] if same else measured),
                ]
            table.add_row(name, model, *counts, *figures)
    return table


def interval_text(interval: Sequence[float] | None) -> str:
    return "" if interval is None else f"{interval[0]:+.3f} to {interval[1]:+.3f}"


def draw_matrix(models: Mapping[str, Json], columns: Sequence[str], path: Path) -> None:
    """Draws a panel for each model: losses as numbers, differences to the own prompt as colours.

    Args:
      models: title -> {domain: {"cells": {column: {loss, difference, ...}}}}.

    Raises:
      UserError: `path` cannot be written.
    """
    cells = [
        cell
        for domains in models.values()
        for domain in domains.values()
        for cell in domain["cells"].values()
    ]
    # One scale for all panels, so that their colours can be compared.
    scale = max([abs(cell["difference"]) for cell in cells] + [LEAST_SCALE])
    rows = max(len(domains) for domains in models.values())
    size = (1.4 + len(models) * (0.9 + 0.5 * len(columns)), 1.9 + 0.34 * rows)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=size, layout="constrained")
        panels = figure.subplots(1, len(models), squeeze=False)[0]
        for axes, (title, domains) in zip(panels, models.items(), strict=True):
            image = _draw_panel(axes, domains, columns, scale)
            axes.set_title(title, loc="left", fontsize=9)
        bar = figure.colorbar(image, ax=panels, shrink=0.9, pad=0.01)
        bar.set_label("loss minus loss under\nthe own prompt, nats per token", fontsize=8)
        try:
            # Without the software version, the same figures give the same file.
            figure.savefig(path, dpi=130, metadata={"Software": None})
        except OSError as error:
            raise UserError(f"cannot write {path}: {error.strerror}") from None


def _draw_panel(axes: Axes, domains: Json, columns: Sequence[str], scale: float) -> Any:
    differences = np.full((len(domains), len(columns)), np.nan)
    for row, domain in enumerate(domains.values()):
        for column, name in enumerate(columns):
            cell = domain["cells"].get(name)
            if cell is None:
                continue
            differences[row, column] = cell["difference"]
            strong = abs(cell["difference"]) > 0.6 * scale
            axes.text(
                column, row, f"{cell['loss']:.2f}", ha="center", va="center", fontsize=8,
                color="white" if strong else INK,
            )  # fmt: skip
    colours = matplotlib.colormaps["RdBu_r"].with_extremes(bad=PADDING)
    image = axes.imshow(differences, cmap=colours, vmin=-scale, vmax=scale, aspect="auto")
    own = columns.index(OWN)
    axes.add_patch(
        Rectangle((own - 0.5, -0.5), 1, len(domains), fill=False, edgecolor=QUIET, linewidth=1.5)
    )
    axes.set_xticks(range(len(columns)), columns, rotation=40, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(domains)), list(domains))
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    return image
