"""Checks of what a run recorded: mixture.json and metrics.jsonl, against plan and config."""

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from moi_jax.common.errors import UserError
from moi_jax.training.audit.finding import Finding, passed
from moi_jax.training.audit.row_figures import RowFigures
from moi_jax.training.audit.saved_run import PlannedRun, SavedRun
from moi_jax.training.audit.windows import Record, Window, check_window, number
from moi_jax.training.optimizer import make_schedule
from moi_jax.training.resume import different

RESTORE = "it has changed since the run wrote it; restore it from a copy"
TEXTS = ("reason", "written")  # the keys of a record that are no figures
RATE_TOLERANCE = 1e-6  # of a learning rate in float32, relative


def check_mixture(run: SavedRun, data: PlannedRun) -> Finding:
    """mixture.json has the figures of the plan."""
    recorded = _json("mixture.json", run.records.get("mixture.json", b""))
    planned = json.loads(json.dumps(data.dataset.mixture(data.plan)))
    for change in different(planned, recorded):
        key, _, values = change.partition(": ")
        planned_value, _, recorded_value = values.partition(" -> ")
        raise UserError(
            f"mixture.json: {key} is {recorded_value}, and the plan has {planned_value}; {RESTORE}"
        )
    occurrences = {name: d["occurrences"] for name, d in planned["domains"].items()}
    shown = ", ".join(f"{name} {count:,}" for name, count in occurrences.items())
    return passed(
        f"mixture.json is that of the plan: {shown} instructions an epoch, fill "
        f"{planned['fill']:.2%}",
        occurrences=occurrences,
        fill=planned["fill"],
    )


def check_metrics(run: SavedRun, data: PlannedRun, rows: RowFigures) -> Finding:
    """metrics.jsonl has every step, with the figures that plan and config give."""
    records = read_records(run)
    trained = [record for record in records if "row" in record]
    _check_steps(run, trained)
    windows = _windows(run, trained)
    checked = [window for window in windows if window.after >= run.unchanged_since]
    names = data.dataset.corpus.names
    for window in checked:
        _at_step(window.step, check_window, window, rows, names, run.config, run.loss_bar)
    _check_learning_rates(run, data, checked)
    for record in records:
        _at_step(record["step"], _check_means, record, names)
    text = f"{len(records):,} records up to step {records[-1]['step']:,}"
    text += "; fill, token counts, epochs, learning rates and the sums of losses are as recomputed"
    if skipped := sum(record.get("skipped", False) for record in trained):
        text += f"; skipped steps: {skipped:,}"
    if len(checked) < len(windows):
        text += f"; figures only after step {run.unchanged_since}, where settings changed"
    return passed(text, records=len(records), windows=len(checked), skipped=skipped)


def _at_step(step: int, check: Callable[..., None], *arguments: Any) -> None:
    """Makes a check of the figures of one step; its UserError gets the place and the way out."""
    try:
        check(*arguments)
    except UserError as error:
        raise UserError(f"metrics.jsonl, step {step}: {error}; {RESTORE}") from None


def read_records(run: SavedRun) -> list[Record]:
    """The records up to the newest sound checkpoint, in order."""
    lines = run.records.get("metrics.jsonl", b"").splitlines()
    records: list[Record] = []
    for place, line in enumerate(lines, 1):
        if place == len(lines) and records and records[-1]["step"] >= run.newest.step:
            break  # a run that goes on may be writing it
        records.append(_record(line, place))
    records = [record for record in records if record["step"] <= run.newest.step]
    for before, after in zip(records, records[1:], strict=False):
        if after["step"] <= before["step"]:
            raise UserError(
                f"metrics.jsonl: step {after['step']} stands after step {before['step']}; {RESTORE}"
            )
    if not records:
        raise UserError(f"metrics.jsonl has no record of the run; {RESTORE}")
    return records


def _json(place: str, content: bytes) -> Any:
    try:
        return json.loads(content.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{place} is missing or no JSON ({error}); {RESTORE}") from None


def _record(line: bytes, number: int) -> Record:
    """A line of metrics.jsonl; raises UserError where a value is none that a run writes."""
    place = f"metrics.jsonl, line {number}"
    record = _json(place, line)
    if not isinstance(record, dict) or not _is_count(record.get("step")):
        raise UserError(f"{place} is no record of a step; {RESTORE}")
    counts = [key for key in ("row", "first_row") if key in record or "skipped" in record]
    counts += ["row"] if "fill" in record else []
    for key, value in {**dict.fromkeys(counts), **record}.items():
        if key in counts:
            right = _is_count(value)
        elif key == "skipped":
            right = value is True
        else:
            right = isinstance(value, str) if key in TEXTS else _is_figure(value)
        if not right:
            raise UserError(
                f"metrics.jsonl, step {record['step']}: {key} is {str(value)[:40]}, which no run "
                f"writes; {RESTORE}"
            )
    return record


def _is_count(value: Any) -> bool:
    return type(value) is int and value >= 0


def _is_figure(value: Any) -> bool:
    """Whether it is a number; null stands for one that was not finite."""
    return value is None or (type(value) in (int, float) and abs(value) <= sys.float_info.max)


def _check_steps(run: SavedRun, trained: list[Record]) -> None:
    """Every step of the run lies in a record, and every checkpoint at the end of one."""
    every = max(saved.config.logging.every for saved in run.steps)
    before, row = 0, 0
    for record in trained:
        if record["step"] - before > every:
            raise UserError(
                f"metrics.jsonl has nothing between the steps {before} and {record['step']}, but "
                f"every {every} steps are logged; {RESTORE}"
            )
        if not row < record["row"] <= run.newest.position["row"]:
            raise UserError(
                f"metrics.jsonl, step {record['step']}: row is {record['row']}, after row {row} "
                f"and with {run.newest.position['row']} rows read in all; {RESTORE}"
            )
        before, row = record["step"], record["row"]
    row_at = {record["step"]: record["row"] for record in trained}
    for saved in run.steps:
        if saved.step and row_at.get(saved.step) != saved.position["row"]:
            raise UserError(
                f"metrics.jsonl, step {saved.step}: row is {row_at.get(saved.step)}, and "
                f"checkpoint {saved.step} has {saved.position['row']}; {RESTORE}"
            )


def _windows(run: SavedRun, trained: list[Record]) -> list[Window]:
    """What each logged record sums: the steps since the last one, without those skipped."""
    windows, after, first_row = [], 0, 0
    skipped: list[tuple[int, int]] = []
    for record in trained:
        if record.get("skipped"):
            skipped.append((record["first_row"], record["row"]))
        if "fill" in record:
            windows.append(Window(record, after, first_row, tuple(skipped)))
            after, first_row, skipped = record["step"], record["row"], []
    return windows


def _check_learning_rates(run: SavedRun, data: PlannedRun, windows: list[Window]) -> None:
    schedule = make_schedule(run.config.optimizer, data.plan.total_steps)
    steps = np.array([window.step - 1 for window in windows], np.int32)
    rates = np.asarray(jax.jit(schedule)(steps))
    for window, rate in zip(windows, rates.tolist(), strict=True):
        _at_step(window.step, _check_learning_rate, window.record, rate)


def _check_learning_rate(record: Record, rate: float) -> None:
    recorded = number(record, "learning_rate")
    if not math.isclose(recorded, rate, rel_tol=RATE_TOLERANCE):
        raise UserError(f"learning_rate is {recorded}, and the schedule has {rate}")


def _check_means(record: Record, domains: tuple[str, ...]) -> None:
    """The means over the domains in a record of held-out losses."""
    for kind in ("loss", "default_prompt/loss"):
        if f"eval/mean/{kind}" not in record:
            continue
        losses = [record.get(f"eval/{name}/{kind}") for name in domains]
        known = [loss for loss in losses if loss is not None]
        mean = sum(known) / len(known) if known else None
        if record[f"eval/mean/{kind}"] != mean:
            raise UserError(
                f"eval/mean/{kind} is {record[f'eval/mean/{kind}']}, and the domains give {mean}"
            )
