"""Early stopping: what it counts; an interrupted run stops at the same step."""

import contextlib
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config, make_config
from moi_jax.training.early_stopping import EarlyStopping
from moi_jax.training.train import train

from support.runs import records, small_config

METRIC = "eval/mean/loss"
# Losses at steps 0, 2, 4, ...: the best is at step 2, so a run with patience 3 ends at step 8.
# A resumed run that forgets the best finds a new best at each later step.
LOSSES = (5.0, 3.0, 3.5, 3.25, 3.125, 2.0)


def counter(patience, saved=(), **sections):
    config = make_config({"train": {"early_stopping_patience": patience}, **sections})
    return EarlyStopping(config, dict(saved))


@pytest.mark.parametrize(
    ("losses", "ends_at"),
    [
        ([3, 2, 1, 0], None),
        ([3, 3, 3], 2),  # an equal loss is not a new best
        ([3, 4, 2, 3, 1, 2, 2], 6),
        ([3, math.nan, math.inf], 2),
        ([1, 2, 0, 1], None),
    ],
)
def test_a_run_ends_after_patience_evaluations_without_a_new_best(losses, ends_at):
    stopping, never, ended = counter(2), counter(None), []
    for index, loss in enumerate(losses):
        stopping.count({METRIC: loss})
        never.count({METRIC: loss})
        ended += [index] * stopping.ended
    assert ended[:1] == ([] if ends_at is None else [ends_at])
    assert not never.ended
    assert never.to_json() == stopping.to_json()


def test_the_count_is_restored_but_not_for_another_metric():
    before = counter(3)
    for loss in (2.0, 1.0, 1.5, 1.75):
        before.count({METRIC: loss})
    again = counter(3, before.to_json())
    again.count({METRIC: 1.25})
    assert again.ended
    assert again.best == 1.0
    domains = [{"name": "chat", "sources": [{"path": "x"}]}]
    other = counter(
        3,
        before.to_json(),
        data={"domains": domains},
        checkpoint={"best_metric": "eval/chat/loss"},
    )
    assert (other.best, other.without_best) == (None, 0)


def test_a_metric_that_is_never_a_number_is_refused():
    with pytest.raises(UserError, match=f"watches {METRIC}, which is nan; hold out rows"):
        counter(1).count({METRIC: math.nan})


class Measure:
    """Evaluations that return LOSSES in turn; parameters seen before get the same loss again."""

    def __init__(self, known, interrupts=()):
        self.known, self.interrupts = known, dict(interrupts)
        self.calls, self.stopping = 0, False

    def losses(self, parameters, _):
        interrupt = self.interrupts.get(self.calls)
        self.calls += 1
        if interrupt == "signal":
            self.stopping = True
            return {}
        if interrupt == "crash":
            raise MemoryError
        key = b"".join(np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(parameters))
        loss = self.known.setdefault(key, LOSSES[len(self.known)])
        kinds = ("loss", "default_prompt/loss")
        return {f"eval/{name}/{kind}": loss for name in ("chat", "maths", "mean") for kind in kinds}

    def train(self, path, *overrides):
        self.stopping = False
        return train(
            load_config(path, overrides),
            make_evaluations=lambda *_: SimpleNamespace(
                held_out=self.losses, benchmarks=None, samples=None
            ),
            devices=jax.devices()[:1],
            stop=contextlib.nullcontext(lambda: self.stopping),
        )


def config_in(directory):
    directory.mkdir()
    return small_config(
        directory,
        train={"steps": 30, "early_stopping_patience": 3},
        eval={"every": 2},
        checkpoint={"every": 3, "keep_last": 1, "keep_best": 0},
    )


def evaluated_steps(result):
    return [r["step"] for r in records(result.directory / "metrics.jsonl") if METRIC in r]


def test_an_interrupted_run_stops_at_the_same_step_with_the_same_parameters(tmp_path, log_text):
    known: dict[bytes, float] = {}
    path = config_in(tmp_path / "whole")
    whole = Measure(known).train(path)
    assert (whole.step, whole.finished) == (8, True)
    assert evaluated_steps(whole) == [0, 2, 4, 6, 8]
    assert "the run stops early: 3 evaluations without a new best of eval/mean/loss" in (
        log_text.getvalue()
    )

    measured = dict(known)
    measure = Measure(known, {0: "signal", 4: "crash"})
    broken = config_in(tmp_path / "broken")
    stopped = measure.train(broken)
    assert (stopped.step, stopped.finished) == (0, False)
    with pytest.raises(MemoryError):
        measure.train(broken)
    result = measure.train(broken)
    assert (result.step, result.finished) == (8, True)
    assert evaluated_steps(result) == [0, 2, 4, 6, 8]
    assert known == measured  # each evaluation saw parameters of the uninterrupted run, bit for bit
    for one, other in zip(jax.tree.leaves(whole.state), jax.tree.leaves(result.state), strict=True):
        np.testing.assert_array_equal(one, other)

    # A second call of the finished run does nothing.
    log = (whole.directory / "metrics.jsonl").read_bytes()
    again = Measure(known)
    assert (again.train(path).step, again.calls) == (8, 0)
    assert (whole.directory / "metrics.jsonl").read_bytes() == log
    assert "stopped early at step 8" in log_text.getvalue()
    with pytest.raises(UserError, match="early_stopping_patience: 3 -> 4; --allow-change"):
        again.train(path, "train.early_stopping_patience=4")


def test_a_run_that_evaluates_nothing_cannot_stop_early(tmp_path):
    config = load_config(config_in(tmp_path / "blind"))
    with pytest.raises(UserError, match="early_stopping_patience needs held-out losses"):
        train(config, devices=jax.devices()[:1])
