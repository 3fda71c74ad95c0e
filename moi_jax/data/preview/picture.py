"""Pictures: a row beside its attention mask, and a histogram of instruction lengths."""

from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from moi_jax.common.errors import UserError
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.preview.parts import Kind
from moi_jax.data.preview.row import RowView

# After Okabe and Ito: distinct for colour-blind readers. More domains get colours of one scale.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#f0e442")
INK, QUIET, PADDING, GREYS = "#222222", "#6a6a6a", "#f0f0f0", ("#c8c8c8", "#a0a0a0")
STYLE: dict[Any, Any] = {"svg.hashsalt": "moi_jax", "svg.fonttype": "none", "font.size": 9}
# Darker and lighter than the domains, from which they stand apart in a lane of their own.
PART_COLOURS: dict[Kind, str] = {"thinking": "#332288", "call": "#882255", "result": "#999933"}
KINDS = (".png", ".svg")
MASK_PIXELS = 512  # most pixels along each side of the attention mask
LANE = 0.78  # height of a lane; lanes begin at whole numbers
NUMBERED, NAMED = 0.03, 0.1  # share of the row that a block needs to show its number or a word
BINS = 48


def check_picture(path: Path) -> None:
    """Makes the directory of a picture; raises UserError if no picture can be written there."""
    if path.suffix not in KINDS:
        raise UserError(f"{path}: the name of a picture must end in {' or '.join(KINDS)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def domain_colours(domains: int) -> list[Any]:
    """A colour for each domain, in config order."""
    if domains <= len(COLOURS):
        return list(COLOURS[:domains])
    return list(matplotlib.colormaps["viridis"](np.linspace(0, 1, domains)))


def draw_row(view: RowView, path: Path) -> None:
    """Draws a row: its lanes (domain, group, segment, loss) and its attention mask.

    Raises:
      UserError: `path` cannot be written.
    """
    colours = domain_colours(len(view.domains))
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.7), layout="constrained")
        lanes, mask = figure.subplots(1, 2, width_ratios=[1.9, 1])
        _draw_lanes(lanes, view, colours)
        _draw_attention(mask, view, colours)
        figure.suptitle(_headline(view), x=0.01, ha="left", fontsize=10)
        _save(figure, path)


def _headline(view: RowView) -> str:
    data = view.data
    order = f", order {data.order}" if view.group_name != "instruction" else ""
    return (
        f"Row {view.number}: {view.tokens:,} of {len(view.batch.tokens):,} tokens, "
        f"{view.trained.sum():,} with loss\n"
        f"sampling {data.sampling}{order}, packing {data.packing}, mask {data.mask}"
    )


def _draw_lanes(axes: Axes, view: RowView, colours: list[Any]) -> None:
    length = len(view.batch.tokens)
    alone = view.group_name == "instruction"
    lanes = ["loss", "segment", "chunk" if alone else view.group_name, "domain"]
    legend = dict(zip(view.domains, colours, strict=True))
    parts = [part for member in view.members for part in member.parts]
    if parts:
        lanes.append("parts")
        kinds = {part.kind for part in parts}
        legend |= {kind: colour for kind, colour in PART_COLOURS.items() if kind in kinds}
    _frame_lanes(axes, length, lanes, legend)
    for part in parts:
        _block(axes, 4, part.start, part.end, PART_COLOURS[part.kind], edge="none")
    for member in view.members:
        _block(axes, 3, member.start, member.end, colours[view.domains.index(member.domain)])
    if alone:
        note = " none: instructions are drawn one by one"
        axes.text(0, 2 + LANE / 2, note, va="center", color=QUIET, style="italic")
    else:
        groups = [(group[0].start, group[-1].end) for group in view.groups]
        _numbered_blocks(axes, 2, groups)
    segments = [(a, b) for segment, a, b in _stretches(view.batch.segment_ids) if segment]
    _numbered_blocks(axes, 1, segments)
    for trained, start, end in _stretches(view.trained):
        if trained:
            _block(axes, 0, start, end, INK, edge="none")
    _block(axes, 3, view.tokens, length, PADDING)
    if length - view.tokens > NAMED * length:
        middle = (view.tokens + length) / 2
        axes.text(middle, 3 + LANE / 2, "padding", ha="center", va="center", color=QUIET)


def _frame_lanes(axes: Axes, length: int, lanes: list[str], legend: dict[str, Any]) -> None:
    """Sets up axes of `length` tokens: the lanes from below, and a legend of the domains."""
    axes.set(
        xlim=(0, length), ylim=(-0.15, len(lanes) - 1 + LANE), xlabel="token of the row",
        yticks=np.arange(len(lanes)) + LANE / 2, yticklabels=lanes,
    )  # fmt: skip
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = [Rectangle((0, 0), 1, 1, color=colour) for colour in legend.values()]
    axes.legend(
        handles, list(legend), ncols=6, loc="lower left", bbox_to_anchor=(0, 1), frameon=False,
        handlelength=1, handleheight=1, borderpad=0, borderaxespad=0.6,
    )  # fmt: skip


def _stretches(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(value, start, end) of each run of equal values."""
    start = 0
    for value, run in groupby(values.tolist()):
        end = start + sum(1 for _ in run)
        yield value, start, end
        start = end


def _numbered_blocks(axes: Axes, lane: int, places: list[tuple[int, int]]) -> None:
    for number, (start, end) in enumerate(places):
        _block(axes, lane, start, end, GREYS[number % 2])
        if end - start > NUMBERED * axes.get_xlim()[1]:
            middle = (start + end) / 2
            axes.text(middle, lane + LANE / 2, str(number + 1), ha="center", va="center", color=INK)


def _block(axes: Axes, lane: int, start: int, end: int, colour: Any, edge: str = "white") -> None:
    axes.add_patch(
        Rectangle((start, lane), end - start, LANE, facecolor=colour, edgecolor=edge, linewidth=0.6)
    )


def _draw_attention(axes: Axes, view: RowView, colours: list[Any]) -> None:
    """Draws the mask: row q has the tokens that token q attends to, in their domains' colours."""
    length = len(view.batch.tokens)
    axes.imshow(
        attention(view, MASK_PIXELS),
        cmap=ListedColormap(["#ffffff", *colours]),
        vmin=0,
        vmax=len(colours),
        extent=(0, length, length, 0),
        interpolation="nearest",
    )
    axes.set(xlabel="token attended to", ylabel="token")
    axes.xaxis.set_major_locator(MaxNLocator(5))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.set_title(f"attention: inside {view.segment_name}", fontsize=9)


def attention(view: RowView, most: int) -> np.ndarray:
    """int[n, n]: 1 + the domain id of the token attended to, or 0 where there is no attention.

    It shows every k-th token, with the smallest k for which n <= `most`.
    """
    shown = np.arange(0, len(view.batch.tokens), -(-len(view.batch.tokens) // most))
    segments, domains = view.batch.segment_ids[shown], view.batch.domain_ids[shown]
    same = (segments[:, None] == segments[None, :]) & (segments[:, None] > 0)
    return np.tril(same) * (domains[None, :] + 1)


def draw_lengths(corpus: Corpus, limit: int, path: Path) -> None:
    """Draws a histogram of the lengths of training instructions, one panel for each domain.

    Args:
      limit: tokens of a row, shown as a line.

    Raises:
      UserError: `path` cannot be written.
    """
    domains = len(corpus.names)
    colours = domain_colours(domains)
    edges = np.geomspace(max(corpus.lengths.min(), 1), max(limit, corpus.lengths.max()) + 1, BINS)
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(7.2, 0.9 + 1.1 * domains), layout="constrained")
        panels = figure.subplots(domains, 1, sharex=True, squeeze=False)[:, 0]
        for number, (axes, name) in enumerate(zip(panels, corpus.names, strict=True)):
            lengths = corpus.lengths[corpus.offsets[number] : corpus.offsets[number + 1]]
            axes.hist(lengths, edges, color=colours[number])
            axes.axvline(limit, color=INK, linestyle=":", linewidth=1)
            axes.set_ylabel(name, rotation=0, ha="right", va="center")
            title = f"{len(lengths):,} instructions"
            if len(lengths):
                title += f", median {np.median(lengths):,.0f} tokens"
            axes.set_title(title, loc="left", fontsize=8)
            axes.spines[["top", "right"]].set_visible(False)
        panels[-1].set_xscale("log", base=2)
        panels[-1].set_xlabel(f"tokens of an instruction (dotted: a row of {limit:,})")
        panels[-1].xaxis.set_major_formatter(lambda tokens, _: f"{tokens:,.0f}")
        _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    # No dates and versions, so that the same row gives the same file.
    metadata = {"Date": None} if path.suffix == ".svg" else {"Software": None}
    try:
        figure.savefig(path, dpi=110, metadata=metadata)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
