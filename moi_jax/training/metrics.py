"""The metrics of a run: metrics.jsonl, trackers, and log lines."""

import json
import logging
import math
import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax.common.atomic_files import atomic_write_text
from moi_jax.common.errors import UserError
from moi_jax.common.retry import retried
from moi_jax.parallel import hosts
from moi_jax.training.goodput import Clock
from moi_jax.training.prometheus import PrometheusFile

log = logging.getLogger(__name__)

Record = dict[str, Any]
Tracker = Callable[[Record], None]


class MetricsLog:
    """Writes each record to metrics.jsonl and to the trackers.

    Of the processes of a run only process 0 writes.

    Attributes:
      last: the last record, in every process.
    """

    def __init__(
        self,
        run_dir: Path,
        trackers: Sequence[str],
        step: int,
        clock: Clock,
        retry_seconds: int = 0,
    ):
        """Continues after `step`: drops the records that a killed run wrote past it.

        Args:
          clock: its sums are in every record; it goes on from those of the records so far.
          retry_seconds: for how long a write is tried again when the store fails.
        """
        path = self._path = run_dir / "metrics.jsonl"
        last, newest = hosts.from_main(
            "the metrics", lambda: (complete_lines(path)[-1:], truncate_after(path, step)[-1:])
        )
        self.last: Record = json.loads(newest[0]) if newest else {}
        self._clock = clock
        clock.go_on(self.last, json.loads(last[0]) if last else {})
        self._retry_seconds = retry_seconds
        self._trackers: list[Tracker] = []
        if hosts.is_main():
            path.touch()
            self._end = path.stat().st_size
            self._last_at = self._end - len("".join(newest).encode())
            self._trackers = [TRACKERS[name](run_dir, step) for name in trackers]
        if newest and newest != last:
            self.write(
                {"step": self.last["step"]}
            )  # what is lost now, in case this process is, too

    def write(self, record: Record) -> None:
        """Writes a record: "step", and values by name. A number that is not finite becomes null.

        A step has one line: a second record of the same step is merged into the first.
        """
        clean = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in {**record, **self._clock.record()}.items()
        }
        again = clean["step"] == self.last.get("step")
        self.last = {**self.last, **clean} if again else clean
        if hosts.is_main():
            self._last_at = self._last_at if again else self._end
            retried(self._path, self._retry_seconds, self._write_line)
        for track in self._trackers:
            retried(self._path.parent, self._retry_seconds, partial(track, clean))

    def sync(self) -> None:
        """Returns when the records are on the disk, not only with the system."""
        if hosts.is_main():
            retried(self._path, self._retry_seconds, self._sync)

    def _sync(self) -> None:
        with self._path.open("r+b") as file:
            os.fsync(file.fileno())

    def _write_line(self) -> None:
        # Opened each time: a file that was open when its server failed stays broken.
        with self._path.open("r+b") as file:
            file.seek(self._last_at)
            file.write(json.dumps(self.last).encode() + b"\n")
            file.flush()
            file.truncate()  # after the write, so that a kill does not lose the record
            self._end = file.tell()


def truncate_after(path: Path, step: int) -> list[str]:
    """Keeps the complete lines of a JSONL file whose "step" is at most `step`; returns them."""
    if not path.exists():
        return []
    kept = complete_lines(path, step)
    atomic_write_text(path, "".join(kept))
    return kept


def last_step(path: Path) -> int:
    """The last step of a JSONL file; -1 if it has none."""
    lines = complete_lines(path)
    return json.loads(lines[-1])["step"] if lines else -1


def complete_lines(path: Path, step: float = math.inf) -> list[str]:
    """Returns the complete lines of a JSONL file whose "step" is at most `step`."""
    lines = []
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    for line in text.split("\n"):
        with suppress(json.JSONDecodeError, KeyError, TypeError):  # a kill cut the line short
            if json.loads(line)["step"] <= step:
                lines.append(line + "\n")
    return lines


def _numbers(record: Record) -> dict[str, float]:
    return {k: float(v) for k, v in record.items() if k != "step" and isinstance(v, int | float)}


def _tensorboard(run_dir: Path, step: int) -> Tracker:
    # Not SummaryWriter: its thread ends where the disk is full, and its flush() then waits forever.
    from tensorboardX.event_file_writer import EventsWriter
    from tensorboardX.proto.event_pb2 import Event, SessionLog
    from tensorboardX.summary import scalar

    directory = run_dir / "tensorboard"
    directory.mkdir(exist_ok=True)
    writer = EventsWriter(str(directory / "events"))
    # TensorBoard then hides what a killed run wrote past `step`.
    writer.write_event(Event(step=step + 1, session_log=SessionLog(status=SessionLog.START)))

    def track(record: Record) -> None:
        for name, value in _numbers(record).items():
            summary = scalar(name, value)
            event = Event(wall_time=time.time(), step=record["step"], summary=summary)
            writer.write_event(event)
        writer.flush()

    return track


def _wandb(run_dir: Path, step: int) -> Tracker:
    try:
        import wandb
    except ImportError:
        raise _missing("wandb") from None
    # In wandb a resumed run is a new run in the same group.
    run = wandb.init(project="moi_jax", group=run_dir.name, dir=str(run_dir))
    return lambda record: run.log(_numbers(record), step=record["step"])


def _trackio(run_dir: Path, step: int) -> Tracker:
    try:
        import trackio
    except ImportError:
        raise _missing("trackio") from None
    trackio.init(project="moi_jax", name=run_dir.name, resume="allow")
    return lambda record: trackio.log(_numbers(record), step=record["step"])


def _prometheus(run_dir: Path, step: int) -> Tracker:
    return PrometheusFile(run_dir).track


def _missing(package: str) -> UserError:
    return UserError(
        f"logging.trackers names {package}, which is not installed; pip install {package}, "
        f"or remove it from the list"
    )


TRACKERS: dict[str, Callable[[Path, int], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
    "prometheus": _prometheus,
}


class StepWindow:
    """Sums the metrics of the steps since the last logged step."""

    def __init__(self, domains: Sequence[str], sequence_length: int):
        self._domains = domains
        self._sequence_length = sequence_length
        self.restart()

    def restart(self) -> None:
        """Starts an empty window now."""
        self._sums: dict[str, np.ndarray] = {}
        self.rows = 0
        self._started = time.monotonic()
        self._paused = 0.0

    def pause(self, seconds: float) -> None:
        """Excludes time from the throughput: time for evaluations, samples and checkpoints."""
        self._paused += seconds

    def add(self, metrics: dict[str, np.ndarray], rows: int) -> None:
        """Adds one step: its metrics on the host, and the number of batch rows with tokens."""
        weighted = {"weighted": metrics["loss"] * metrics["weights"], **metrics}
        for key in ("weighted", *SUMMED):
            self._sums[key] = self._sums.get(key, 0) + np.asarray(weighted[key], np.float64)
        self.rows += rows

    @property
    def empty(self) -> bool:
        """Whether no step was added yet."""
        return not self._sums

    @property
    def tokens(self) -> int:
        """The number of tokens in the batches."""
        return int(self._sums["tokens"])

    @property
    def loss_tokens(self) -> int:
        """The number of those that carry loss."""
        return int(self._sums["loss_tokens"])

    @property
    def seconds(self) -> float:
        """Seconds since the window started, without the pauses."""
        return max(time.monotonic() - self._started - self._paused, 1e-9)

    def record(self) -> Record:
        """Returns the losses (sums over sums), throughput and fill of the window."""
        sums, seconds = self._sums, self.seconds
        record: Record = {
            "loss": _ratio(sums["weighted"], sums["weights"]),
            "token_loss": _ratio(sums["nll"], sums["loss_tokens"]),
            "tokens_per_second": float(sums["tokens"]) / seconds,
            "loss_tokens_per_second": float(sums["loss_tokens"]) / seconds,
            "fill": _ratio(sums["tokens"], np.asarray(self.rows * self._sequence_length)),
        }
        for index, name in enumerate(self._domains):
            record[f"domain/{name}/loss"] = _ratio(
                sums["domain_nll"][index], sums["domain_loss_tokens"][index]
            )
        return record


SUMMED = ("weights", "nll", "loss_tokens", "tokens", "domain_nll", "domain_loss_tokens")


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> float:
    return float(numerator / denominator) if denominator > 0 else math.nan


def log_step(
    record: Record, steps: int, seconds_a_step: float, waited: float, compiled: float
) -> None:
    """Logs one line: step, loss, learning rate, throughput, fill, what it cost, time left.

    Args:
      waited, compiled: seconds since the line before, for data and for programs.
    """
    left = timedelta(seconds=round((steps - record["step"]) * seconds_a_step))
    cost = f"data wait {waited:.1f} s"
    cost += f"  compile {compiled:.1f} s" if compiled >= 0.05 else ""
    cost += f"  mfu {record['mfu']:.1%}" if "mfu" in record else ""
    if peak := record.get("peak_device_memory_bytes"):
        cost += f"  memory {peak / 2**30:.2f} GiB"
    log.info(
        f"step {record['step']}/{steps}  loss {record['loss']:.4f}  "
        f"lr {record['learning_rate']:.2e}  {record['tokens_per_second']:,.0f} tokens/s  "
        f"{record['loss_tokens_per_second']:,.0f} loss tokens/s  fill {record['fill']:.1%}  "
        f"{cost}  left {left}"
    )
