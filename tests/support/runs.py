"""A small real run for the tests: two domains of the sample set, rows of 256 tokens."""

import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import yaml
from flax import nnx

import moi_jax
from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.common.checksums import SUMS
from moi_jax.common.errors import UserError
from moi_jax.config import Config
from moi_jax.config.load import load_config
from moi_jax.data.dataset import Dataset, open_dataset
from moi_jax.evaluation.while_training import make_evaluations
from moi_jax.training.train import TrainResult, train

from support.places import ROOT, SAMPLES
from support.processes import start
from support.xla import xla_flags

# Of commands: one device, whatever the tests themselves simulate, or two.
ENVIRONMENT = {**os.environ, "XLA_FLAGS": xla_flags(devices=1)}
TWO_DEVICES = {**os.environ, "XLA_FLAGS": xla_flags(devices=2)}


def open_data(config: Config) -> Dataset:
    """The data of a config, as training opens it."""
    experiment = open_experiment(config)
    return open_dataset(experiment.config, experiment.tokenizer)


def small_config(directory: Path, **sections) -> Path:
    """Writes a config of chat and maths samples; `sections` are merged over it."""
    values = {
        "model": {"preset": "micro", "remat": "none"},
        "tokenizer": {"path": str(SAMPLES / "tokenizer")},
        "data": {
            "root": str(SAMPLES),
            "cache_dir": str(directory / "cache"),
            "sequence_length": 256,
            "max_repeats": 100,
            "domains": [
                {"name": "chat", "sources": [{"path": "chat.jsonl", "max_rows": 40}]},
                {
                    "name": "maths",
                    "prompt": "You are a mathematician.",
                    "sources": [{"path": "maths.jsonl", "max_rows": 40}],
                },
            ],
        },
        "optimizer": {"learning_rate": 1e-3},
        "train": {"steps": 10, "global_batch_rows": 2},
        "eval": {"every": 0},
        "checkpoint": {"every": 3},
        "logging": {"run_dir": str(directory / "run"), "every": 1, "trackers": []},
    }
    for section, keys in sections.items():
        values[section] = {**values.get(section, {}), **keys}
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def train_here(config: Path, *overrides: str, devices: int = 1, **options: Any) -> TrainResult:
    """Trains as the command does, in the process of the test, which simulates eight devices."""
    options = {"make_evaluations": make_evaluations, **options}
    return train(load_config(config, overrides), devices=jax.devices()[:devices], **options)


def refusal(config: Path, *overrides: str, **options: Any) -> str:
    """What `train_here` says, in one line, where it refuses to train."""
    with pytest.raises(UserError) as error:
        train_here(config, *overrides, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@contextmanager
def stop_after(step: int) -> Iterator[Callable[[], bool]]:
    """For `train(stop=...)` of a new run without evaluations: asks it to end after that step."""
    asked = itertools.count(1)
    yield lambda: next(asked) >= step


def command(config: Path, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "moi_jax.train", "--config", str(config), *arguments]


def train_command(
    config: Path, *arguments: str, environment: dict[str, str] = ENVIRONMENT
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(config, *arguments),
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip


def train_until(
    config: Path, step: int, send: signal.Signals, environment: dict[str, str] = ENVIRONMENT
) -> int:
    """Starts a run, sends it a signal once `step` is logged, and returns its exit status."""
    log = Path(yaml.safe_load(config.read_text())["logging"]["run_dir"]) / "metrics.jsonl"
    process = start(
        command(config), cwd=ROOT, env=environment,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 300
    while process.poll() is None and time.monotonic() < deadline:
        if logged_steps(log)[-1:] >= [step]:
            process.send_signal(send)
            break
        time.sleep(0.02)
    return process.wait(timeout=300)


def forget_checksums(step: Path) -> None:
    """Makes it a checkpoint of format 2, which had no checksums."""
    (step / SUMS).unlink()
    item = step / "model" / "metadata"
    item.write_text(json.dumps({**json.loads(item.read_text()), "format": 2}))


def records(log: Path) -> list[dict]:
    if not log.exists():
        return []
    lines = log.read_text(encoding="utf-8").splitlines(keepends=True)
    return [json.loads(line) for line in lines if line.endswith("\n")]


def lasting(record: dict) -> dict:
    """A record of metrics.jsonl without what depends on the time that things took."""
    of_time = ("tokens_per_second", "loss_tokens_per_second", "time/", "goodput", "written")
    return {key: value for key, value in record.items() if not key.startswith(of_time)}


def logged_steps(log: Path) -> list[int]:
    return [record["step"] for record in records(log) if "token_loss" in record]


def parameters(run: Path) -> dict[str, np.ndarray]:
    """Returns leaf name -> values of the run's newest checkpoint."""
    model, _ = moi_jax.load(run)
    state = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    return {
        jax.tree_util.keystr(path): np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }


def same_parameters(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> None:
    """Asserts that they are bit-identical."""
    assert left.keys() == right.keys()
    for name in left:
        np.testing.assert_array_equal(left[name], right[name], err_msg=name)
