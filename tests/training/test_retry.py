"""A store that fails for a while: what is written to it is there once, or the run stops."""

import contextlib
import dataclasses
import errno
import itertools
import os
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import DEFAULT, Mock

import orbax.checkpoint as ocp
import pytest

from moi_jax.checkpoints import run_checkpoints
from moi_jax.checkpoints.items import ModelItems
from moi_jax.checkpoints.run_checkpoints import RunCheckpoints
from moi_jax.common import retry
from moi_jax.common.errors import UserError
from moi_jax.config.load import make_config
from moi_jax.models.parameters import random_parameters
from moi_jax.models.presets import PRESETS
from moi_jax.training import saves
from moi_jax.training.goodput import Clock
from moi_jax.training.metrics import MetricsLog
from moi_jax.training.optimizer import make_optimizer
from moi_jax.training.state import initial_state

from support.runs import lasting, records, refusal, small_config, train_here


@pytest.fixture(autouse=True)
def pauses(monkeypatch):
    """The pauses that were made; they take no time here."""
    made: list[float] = []
    for module in (retry, saves):
        monkeypatch.setattr(module, "sleep", made.append)
    monkeypatch.setattr(retry, "monotonic", lambda: sum(made))
    return made


class Torn:
    """A file of which only the first half of a write gets to the store."""

    def __init__(self, file, error):
        self.file, self.error = file, error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def __getattr__(self, name):
        return getattr(self.file, name)

    def write(self, data):
        self.file.write(data[: len(data) // 2])
        self.file.flush()
        raise OSError(self.error, os.strerror(self.error))


@pytest.fixture
def store(monkeypatch):
    """Tears the next `times` writes of the files that are named, with an error."""
    store = SimpleNamespace(times=0, names={"metrics.jsonl"}, error=errno.ESTALE)
    opened = Path.open

    def open_or_tear(path, mode="r", *args, **options):
        file = opened(path, mode, *args, **options)
        if mode == "r" or path.name not in store.names or not store.times:
            return file
        store.times -= 1
        return Torn(file, store.error)

    monkeypatch.setattr(Path, "open", open_or_tear)
    return store


@pytest.mark.parametrize("error", [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_a_record_is_there_once_when_the_store_is_back(tmp_path, store, pauses, error, log_text):
    log = MetricsLog(tmp_path, [], -1, Clock(), retry_seconds=60)
    log.write({"step": 1, "loss": 3.0})
    store.times, store.error = 4, error
    log.write({"step": 2, "loss": 2.0})
    store.times = 2
    log.write({"step": 2, "eval/mean/loss": 2.5})
    log.write({"step": 3, "loss": 1.0})
    assert [lasting(record) for record in records(tmp_path / "metrics.jsonl")] == [
        {"step": 1, "loss": 3.0},
        {"step": 2, "loss": 2.0, "eval/mean/loss": 2.5},
        {"step": 3, "loss": 1.0},
    ]
    assert pauses == [1, 2, 4, 8, 1, 2]
    told = log_text.getvalue().splitlines()
    assert len(told) == 6
    path, reason = tmp_path / "metrics.jsonl", os.strerror(error)
    assert told[1] == f"cannot write {path}: {reason}; trying again in 2 s"


@pytest.mark.parametrize(
    ("error", "seconds", "waited"),
    [(errno.ESTALE, 60, 60), (errno.ESTALE, 0, 0), (errno.EACCES, 60, 0)],
)
def test_a_store_that_stays_away_or_refuses_is_an_error(
    tmp_path, store, pauses, error, seconds, waited
):
    log = MetricsLog(tmp_path, [], -1, Clock(), retry_seconds=seconds)
    store.times, store.error = 1000, error
    with pytest.raises(OSError, match=os.strerror(error)):
        log.write({"step": 1})
    assert waited - 15 <= sum(pauses) <= waited


def test_a_save_that_its_store_fails_names_the_checkpoint_before(tmp_path, monkeypatch):
    """It is the last write of the background save that fails; the advice is not to free space."""
    config = make_config({})
    model = dataclasses.replace(PRESETS["tiny"], num_layers=1, hidden_size=8, vocab_size=16)
    optimizer = make_optimizer(config.optimizer, model)
    state = initial_state(optimizer, random_parameters(model, 0, "float32"))
    opened = RunCheckpoints(tmp_path / "run", config.checkpoint, ModelItems(model, {}, {}))
    with contextlib.closing(opened) as checkpoints:
        checkpoints.save(1, *state.items(), {}, {}, {})
        checkpoints.wait()
        error = OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        monkeypatch.setattr(run_checkpoints, "write_checksums", Mock(side_effect=error))
        checkpoints.save(2, *state.items(), {}, {}, {})
        with pytest.raises(UserError) as said:
            checkpoints.wait()
    assert str(said.value) == (
        f"cannot save checkpoint 2 in {tmp_path / 'run'}: {error.strerror}; checkpoint 1 is whole. "
        f"Give the same command again"
    )


@pytest.mark.parametrize(
    ("error", "passes"),
    [
        (OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), True),
        (OSError(errno.ESTALE, os.strerror(errno.ESTALE)), True),
        (OSError(errno.EROFS, os.strerror(errno.EROFS)), False),
        (ValueError("... [os_error_code='13'] Permission denied"), False),
        (TimeoutError("Timed out while waiting"), False),  # it may still be written
    ],
)
def test_a_save_is_tried_again_unless_it_is_refused_or_late(error, passes):
    assert retry.may_pass(error) == passes


def test_a_save_has_the_time_of_the_config(tmp_path, monkeypatch):
    model = dataclasses.replace(PRESETS["tiny"], num_layers=1, hidden_size=8, vocab_size=16)
    given = Mock(wraps=ocp.AsyncOptions)
    monkeypatch.setattr(ocp, "AsyncOptions", given)
    config = make_config({"checkpoint": {"save_timeout": 77}}).checkpoint
    RunCheckpoints(tmp_path, config, ModelItems(model, {}, {})).close()
    assert given.call_args.kwargs["timeout_secs"] == 77


ANSWER = {
    "domain": "chat", "system": "own", "system_prompt": "", "prompt": "Well?", "answer": "Yes.",
}  # fmt: skip


def test_a_run_outlives_a_failing_store_and_stops_in_one_line_if_it_stays_away(
    tmp_path, store, monkeypatch, pauses, log_text
):
    config = small_config(tmp_path, train={"steps": 1})
    answers = SimpleNamespace(held_out=None, benchmarks=None, samples=lambda _: [ANSWER])
    store.names, store.times = {"samples.jsonl", "metrics.jsonl"}, 5
    failures = (OSError(number, os.strerror(number)) for number in (errno.EIO, errno.ENOSPC))
    late = Mock(
        side_effect=itertools.chain(failures, itertools.repeat(DEFAULT)),
        wraps=run_checkpoints.write_checksums,
    )
    monkeypatch.setattr(run_checkpoints, "write_checksums", late)
    done = train_here(config, make_evaluations=lambda *_: answers)
    assert store.times == 0
    assert done.checkpoint.is_dir()
    assert pauses[-2:] == [1, 2]
    assert "there is none before it; saving step 1 in 2 s" in log_text.getvalue()
    assert [answer["step"] for answer in records(done.directory / "samples.jsonl")] == [0, 1]
    store.names, store.times = {"metrics.jsonl"}, 1000
    said = refusal(config, "train.steps=2", make_evaluations=None, allow_change=True)
    assert said == (
        f"cannot write the run directory {done.directory} (metrics.jsonl): "
        f"{os.strerror(errno.ESTALE)}; give the same command again when the store works"
    )
    store.times = 0
    assert train_here(config, "train.steps=2", make_evaluations=None, allow_change=True).finished
