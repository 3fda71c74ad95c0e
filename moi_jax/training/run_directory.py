"""The run directory and the process around a run: lock, resume rules, signals."""

import os
import signal
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import filelock
from rich.console import Console

from moi_jax.common.console import say
from moi_jax.common.errors import UserError
from moi_jax.config.schema import Config

# Keys, or beginnings of keys, that may differ when a run goes on. Everything else may not: the
# run would no longer be the one that was begun.
MAY_CHANGE = (
    "data.cache_dir",
    "data.max_repeats",
    "data.on_bad_row",
    "data.root",
    "data.workers",
    "checkpoint",
    "eval",
    "logging",
    "mesh",
    "model.remat",
    "tokenizer.path",
    "train.deterministic",
    "train.microbatch_rows",
    "train.sample_every",
    "train.sample_max_new_tokens",
    "train.sample_prompts",
)
# Of a source: its content is compared, not where it lies.
SOURCE_MAY_CHANGE = (".path", ".manual_dir", ".license")
MAY_CHANGE_IF_ALLOWED = (
    "optimizer",
    "train.epochs",
    "train.global_batch_rows",
    "train.loss_tokens",
    "train.steps",
)


# Stands in every run directory, and tells one from any other directory.
LOCK = ".moi_jax.lock"


@contextmanager
def run_directory(run_dir: Path, fresh: bool) -> Iterator[Path]:
    """Holds the directory of a run for one process.

    Raises:
      UserError: another process trains in it, it is not a run's (and not `fresh`), or it cannot
        be written.
    """
    run_dir = run_dir.expanduser()
    with _writing(run_dir):
        if not fresh and _entries(run_dir) and not (run_dir / LOCK).exists():
            raise UserError(
                f"{run_dir} holds files but is no run of ours; choose another logging.run_dir, or "
                f"--fresh to move them aside"
            )
        run_dir.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(run_dir / LOCK, timeout=0)
        try:
            lock.acquire()
        except filelock.Timeout:
            raise UserError(
                f"{run_dir} is in use by a live run; wait for it or choose another logging.run_dir"
            ) from None
    try:
        yield run_dir
    finally:
        lock.release()


def move_aside(run_dir: Path) -> None:
    """Moves what stands in a run directory to a new one beside it."""
    entries = _entries(run_dir)
    if not entries:
        return
    with _writing(run_dir):
        stamp = time.strftime("%Y%m%d-%H%M%S")
        aside = Path(tempfile.mkdtemp(prefix=f"{run_dir.name}.{stamp}.", dir=run_dir.parent))
        for name in entries:
            (run_dir / name).rename(aside / name)


@contextmanager
def _writing(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(
            f"cannot write the run directory {run_dir}: {error.strerror}; choose another "
            f"logging.run_dir"
        ) from None


def _entries(run_dir: Path) -> set[str]:
    """What stands in a run directory besides its lock; nothing where there is none."""
    return {entry.name for entry in run_dir.iterdir()} - {LOCK} if run_dir.exists() else set()


def check_resume(
    run_dir: Path,
    before: dict[str, Any],
    config: Config,
    allow_change: bool,
    console: Console,
    may_change: tuple[str, ...] = MAY_CHANGE,
) -> None:
    """Compares the config a run was begun with, `before`, with the one to go on with.

    Raises:
      UserError: a difference that would make it another run; the first one is named.
    """
    old_values, new_values = _flat(before), _flat(config.model_dump(mode="json"))
    for key in sorted(old_values.keys() | new_values.keys()):
        old, new = old_values.get(key), new_values.get(key)
        if old == new:
            continue
        change = f"{key}: {old} -> {new}"
        of_source = key.startswith("data.domains.") and key.endswith(SOURCE_MAY_CHANGE)
        if key.startswith(may_change) or of_source:
            say(console, f"going on with {change}")
        elif not key.startswith(MAY_CHANGE_IF_ALLOWED):
            raise UserError(
                f"{run_dir} was begun with another setting, {change}; restore it, or --fresh to "
                f"begin anew (the old run is moved aside)"
            )
        elif not allow_change:
            raise UserError(
                f"{run_dir} was begun with {change}; --allow-change goes on with the new one"
            )
        else:
            say(console, f"going on with {change} (allowed)")


def check_fingerprints(run_dir: Path, saved: dict[str, str], current: dict[str, str]) -> None:
    """Raises UserError when tokenizer, template, prompts or data content differ from the run's."""
    for what, fingerprint in current.items():
        if saved.get(what) != fingerprint:
            raise UserError(
                f"{run_dir} was begun with another content of {what} (fingerprint "
                f"{saved.get(what)}, now {fingerprint}); restore it, or --fresh to begin anew"
            )


def _flat(values: Any, prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": [1]}} -> {"a.b.0": 1}"""
    if isinstance(values, dict):
        items = [(str(key), value) for key, value in values.items()]
    elif isinstance(values, list) and values:
        items = [(str(index), value) for index, value in enumerate(values)]
    else:
        return {prefix: values}
    flat: dict[str, Any] = {}
    for key, value in items:
        flat |= _flat(value, f"{prefix}.{key}" if prefix else key)
    return flat


class StopSignal:
    """Notes a SIGTERM or SIGINT; the loop then saves and leaves after the step it is in.

    A second signal, or `grace_seconds` going by, ends the process as it is: a scheduler that
    kills then finds the last whole checkpoint.
    """

    def __init__(self, grace_seconds: int):
        self._grace_seconds = grace_seconds
        self.received: signal.Signals | None = None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self._receive)
            signal.signal(signal.SIGINT, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.received = signal.Signals(number)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        deadline = threading.Timer(self._grace_seconds, os._exit, [self.exit_status])
        deadline.daemon = True
        deadline.start()

    @property
    def exit_status(self) -> int:
        """128 + the signal's number, as shells count it, so that schedulers start the run again."""
        return 128 + self.received if self.received else 0
