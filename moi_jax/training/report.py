"""report.html of a run directory: a self-contained page with charts, mixture and sample answers."""

import io
import json
import math
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, median
from typing import Any

import matplotlib
import yaml
from markupsafe import Markup
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from moi_jax.common.errors import UserError
from moi_jax.reports.page import PALETTE, page_template
from moi_jax.training.goodput import PARTS

Point = tuple[int, float]

# A domain's line has a colour and a marker. Colours repeat, so the marker tells lines apart.
MARKERS = "osD^vP*X"
# Placeholders for the page's text and rule colours: charts then follow the light or dark theme.
INK, RULE = "#0a0b0c", "#0a0b0d"
# A longer curve is reduced to this many means, so that the page of a long run stays small.
CHART_POINTS = 300
LOSS = "loss (nats/token)"
NOTES = {
    "Training loss": "Mean over the tokens that carry loss, each counted once.",
    "Held-out loss": "Solid: the domain's own system prompt. Dashed: the default system prompt.",
    "Benchmarks": "On a few items of each (eval.benchmarks), 0 to 100.",
    "Learning rate and gradient norm": "The norm of the whole gradient, before clipping.",
    "Throughput and fill": "Fill is the share of row positions that hold tokens.",
    "Utilisation of the devices": "Of their published bfloat16 peak. Solid: for the tokens and the "
    "pairs that attention uses. Dashed: for full rows and causal attention over whole rows.",
}
SCORE = re.compile(r"eval/[^/]+/score")
STYLE: dict[Any, Any] = {
    **dict.fromkeys(("axes.edgecolor", "grid.color", "xtick.color", "ytick.color"), RULE),
    **dict.fromkeys(("axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor"), INK),
    "text.color": INK,
    "text.parse_math": False,
    "svg.fonttype": "none",
    "svg.hashsalt": "moi_jax",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 9.5,
    "axes.grid": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.2,
    "lines.markersize": 4.5,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class RunRecord:
    """The content of a run directory; a missing file is an empty value."""

    name: str
    config_text: str
    config: dict[str, Any]
    metrics: list[dict[str, Any]]  # one record a step, in the order of steps
    mixture: dict[str, Any]
    samples: list[dict[str, Any]]
    unreadable: int  # number of lines in the JSON lines files that are not valid


@dataclass(frozen=True)
class Line:
    """One curve of a chart; `label` None keeps it out of the legend."""

    points: Sequence[Point]
    label: str | None = None
    color: str = INK
    marker: str = "."
    style: str = "-"


def read_run(run_dir: Path) -> RunRecord:
    """Reads a run directory; raises UserError if config.yaml or mixture.json is not usable."""
    config_text = _read(run_dir / "config.yaml")
    if not config_text:
        raise UserError(f"{run_dir} has no config.yaml; name the directory of a training run")
    lines, torn = _json_lines(run_dir / "metrics.jsonl")
    samples, torn_samples = _json_lines(run_dir / "samples.jsonl")
    try:
        config = yaml.safe_load(config_text)
        mixture = json.loads(_read(run_dir / "mixture.json") or "{}")
    except (yaml.YAMLError, json.JSONDecodeError) as error:
        raise UserError(
            f"{run_dir}: config.yaml or mixture.json is damaged ({' '.join(str(error).split())}); "
            f"restore it, or resume the run, which rewrites both"
        ) from error
    name, metrics = run_dir.resolve().name, lines
    return RunRecord(name, config_text, config, metrics, mixture, samples, torn + torn_samples)


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""


def _json_lines(path: Path) -> tuple[list[dict[str, Any]], int]:
    """Reads the records of a JSON lines file, and counts the lines torn by a kill."""
    records, torn = [], 0
    for line in filter(str.strip, _read(path).split("\n")):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            torn += 1
    return records, torn


def points(run: RunRecord, key: str) -> list[Point]:
    """Returns (step, value) for the steps at which a metric is defined and finite."""
    found = [(record["step"], record.get(key)) for record in run.metrics]
    return [(step, value) for step, value in found if value is not None and math.isfinite(value)]


def thin(curve: Sequence[Point], reduce: Callable[[list[float]], float] = fmean) -> list[Point]:
    """Reduces a curve to at most CHART_POINTS points: (last step, reduced value) of each part."""
    width = math.ceil(len(curve) / CHART_POINTS) or 1
    stretches = [curve[start : start + width] for start in range(0, len(curve), width)]
    return [(part[-1][0], reduce([value for _, value in part])) for part in stretches]


def headline(run: RunRecord) -> list[tuple[str, str]]:
    """Returns the figures at the head of the page, as (name, value)."""
    figures = []
    if run.metrics:
        figures.append(("steps", number(run.metrics[-1]["step"])))
    for what, key in (("training loss", "token_loss"), ("mean held-out loss", "eval/mean/loss")):
        if loss := points(run, key):
            figures.append((what, f"{loss[0][1]:.3f} → {loss[-1][1]:.3f}"))
    if speed := points(run, "tokens_per_second"):
        figures.append(("median tokens/s", number(median(value for _, value in speed))))
    if utilisation := points(run, "mfu"):
        figures.append(("median MFU", percent(median(value for _, value in utilisation))))
    if memory := points(run, "peak_device_memory_bytes"):
        most = max(value for _, value in memory)
        figures.append(("peak device memory", f"{most / 2**30:.2f} GiB"))
    if run.mixture:
        figures.append(("fill of rows", percent(run.mixture["fill"])))
    if run.metrics:
        skipped = sum(record.get("skipped", False) for record in run.metrics)
        figures.append(("skipped steps", number(skipped)))
    if goodput := points(run, "goodput"):
        figures.append(("goodput", percent(goodput[-1][1])))
    return figures


def held_out(run: RunRecord, names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns for each name its first and last held-out loss, under its own and default prompt."""
    rows = []
    for name in names:
        curves = [points(run, f"eval/{name}{kind}/loss") for kind in ("", "/default_prompt")]
        if any(curves):
            ends = [curve[end][1] if curve else None for curve in curves for end in (0, -1)]
            rows.append({"name": name, "losses": ends})
    return rows


def spent(run: RunRecord) -> list[tuple[str, str, float, float]]:
    """Returns (part, what it is, hours, share) for what the time of the run was spent on."""
    timed = [record for record in run.metrics if "time/step" in record]
    seconds = {part: timed[-1].get(f"time/{part}", 0.0) for part in PARTS} if timed else {}
    whole = sum(seconds.values())
    parts = [(part, PARTS[part], took) for part, took in seconds.items() if took]
    return [(part, what, took / 3600, took / whole) for part, what, took in parts]


def sample_answers(run: RunRecord) -> list[dict[str, Any]]:
    """Returns for each prompt its answers at the first and last step, under both system prompts."""
    prompts: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for sample in run.samples:
        prompts.setdefault((sample["domain"], sample["prompt"]), []).append(sample)
    groups = []
    for (domain, prompt), samples in prompts.items():
        numbers = sorted(sample["step"] for sample in samples)
        steps = sorted({numbers[0], numbers[-1]})
        answers = {(sample["system"], sample["step"]): sample["answer"] for sample in samples}
        system = {sample["system"]: sample["system_prompt"] for sample in samples}
        rows = [
            (kind, system[kind], [answers.get((kind, step)) for step in steps])
            for kind in ("own", "default")
            if kind in system
        ]
        groups.append({"domain": domain, "prompt": prompt, "steps": steps, "rows": rows})
    return groups


def charts(run: RunRecord, looks: dict[str, tuple[str, str]]) -> list[dict[str, Any]]:
    """Draws the charts as {title, note, svg}; `looks` holds the domains' (colour, marker)."""

    def one(key: str, label: str | None = None, *look: str) -> Line:
        return Line(thin(points(run, key)), label, *look)

    def percentages(key: str) -> list[Point]:
        return [(step, 100 * value) for step, value in thin(points(run, key))]

    training = [one(f"domain/{name}/loss", name, *look) for name, look in looks.items()]
    held = {**looks, "mean": (INK, ".")}
    own = [one(f"eval/{name}/loss", name, *look) for name, look in held.items()]
    other = [
        one(f"eval/{name}/default_prompt/loss", None, *look, "--") for name, look in held.items()
    ]
    tasks = sorted({key.split("/")[1] for r in run.metrics for key in r if SCORE.fullmatch(key)})
    scores = [
        one(f"eval/{task}/score", task, PALETTE[n % len(PALETTE)], MARKERS[n % len(MARKERS)])
        for n, task in enumerate(tasks)
    ]
    speed = one("tokens_per_second", "all tokens", INK, "o")
    loss_speed = one("loss_tokens_per_second", "tokens with loss", INK, "s", "--")
    fill = Line(percentages("fill"))
    useful = Line(percentages("mfu"), "useful", INK, "o")
    full = Line(percentages("mfu_full_causal"), "full causal rows", INK, "s", "--")
    panels = {
        "Training loss": {LOSS: [*training, one("token_loss", "all domains")]},
        "Held-out loss": {LOSS: own + other},
        "Benchmarks": {"score": scores},
        "Learning rate and gradient norm": {
            "learning rate": [one("learning_rate")],
            "gradient norm (L2)": [Line(thin(points(run, "grad_norm"), max))],
        },
        "Throughput and fill": {"tokens/s": [speed, loss_speed], "fill (%)": [fill]},
        "Utilisation of the devices": {"MFU (%)": [useful, full]},
    }
    drawn = [
        {"title": title, "note": NOTES[title], "svg": draw(title, axes)}
        for title, axes in panels.items()
    ]
    return [chart for chart in drawn if chart["svg"]]


def draw(title: str, panels: dict[str, list[Line]]) -> Markup:
    """Draws panels (axis label: lines) over one axis of steps as inline SVG; '' without points."""
    filled = {label: [line for line in lines if line.points] for label, lines in panels.items()}
    panels = {label: lines for label, lines in filled.items() if lines}
    if not panels:
        return Markup()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(5.2, 3.5), layout="constrained")
        grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        legend = {}
        for axes, (label, lines) in zip(grid, panels.items(), strict=True):
            for line in lines:
                look = {"color": line.color, "marker": line.marker, "linestyle": line.style}
                every = max(1, len(line.points) // 8)
                [handle] = axes.plot(*zip(*line.points, strict=True), markevery=every, **look)
                if line.label:
                    legend[line.label] = handle
            axes.set_ylabel(label)
            axes.yaxis.set_major_locator(MaxNLocator(5))
            axes.yaxis.set_major_formatter("{x:,.10g}")
        grid[-1].set_xlabel("step")
        grid[-1].xaxis.set_major_locator(MaxNLocator(6, integer=True))
        grid[-1].xaxis.set_major_formatter("{x:,.10g}")
        if legend:
            ncols = max(1, 370 // (50 + 6 * max(map(len, legend))))
            figure.set_figheight(3.3 + 0.2 * math.ceil(len(legend) / ncols))
            figure.legend(legend.values(), legend.keys(), loc="outside lower center", ncols=ncols)
        out = io.StringIO()
        figure.savefig(out, format="svg", transparent=True)
    return _inline(out.getvalue(), title)


def _inline(svg: str, title: str) -> Markup:
    """Makes matplotlib's SVG document an element of an HTML page that holds several of them."""
    box = re.findall(r'viewBox="[^"]*"', svg)[0]
    body = svg[svg.index("<defs>") :]
    prefix = title.split()[0].lower() + "-"
    # Ids are unique only within a figure.
    body = re.sub(r'(<\w+ id=")', rf"\1{prefix}", body)
    body = body.replace("url(#", f"url(#{prefix}").replace('href="#', f'href="#{prefix}')
    body = body.replace(INK, "currentColor").replace(RULE, "var(--rule)")
    return Markup(f'<svg {box} role="img" aria-label="{title} by step">{body}')


def number(value: float | None) -> str:
    return "–" if value is None else f"{value:,.0f}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{100 * share:.2f} %"


def write_report(run_dir: Path) -> Path:
    """Writes run_dir/report.html from the files of the run directory and returns its path.

    It reads config.yaml and, if they exist, metrics.jsonl, mixture.json and samples.jsonl. It
    leaves out sections without data. The same files give the same bytes.

    Raises:
      UserError: run_dir is not a run directory, or config.yaml or mixture.json is damaged.
    """
    run = read_run(run_dir)
    names = [domain["name"] for domain in run.config["data"]["domains"]]
    looks = {
        name: (PALETTE[index % len(PALETTE)], MARKERS[index % len(MARKERS)])
        for index, name in enumerate(names)
    }
    path = Path(__file__).with_name("report.html.jinja")
    page = page_template(path, number=number, percent=percent).render(
        run=run,
        colors={name: color for name, (color, _) in looks.items()},
        headline=headline(run),
        held_out=held_out(run, [*names, "mean"]),
        spent=spent(run),
        samples=sample_answers(run),
        charts=charts(run, looks),
        chart_points=CHART_POINTS,
    )
    report = run_dir / "report.html"
    partial = run_dir / ".report.html.partial"
    # A sampled answer may hold half a surrogate pair, which UTF-8 cannot encode.
    partial.write_bytes(page.encode("utf-8", errors="replace"))
    os.replace(partial, report)
    return report
