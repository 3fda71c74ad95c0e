"""The order in which the loop dispatches, reads, evaluates and saves."""

import os
from types import SimpleNamespace

import numpy as np
import pytest

from moi_jax.checkpoints.run_checkpoints import CannotSave
from moi_jax.common.errors import UserError
from moi_jax.config.load import make_config
from moi_jax.training import saves
from moi_jax.training.early_stopping import EarlyStopping
from moi_jax.training.goodput import Clock
from moi_jax.training.loop import fit
from moi_jax.training.metrics import MetricsLog, last_step
from moi_jax.training.profiling import StepProfiler
from moi_jax.training.run import Run
from moi_jax.training.spikes import LossLimit

from support.runs import records

STEPS = 6


class Metric:
    """A stand-in for a value on a device: it records when it is read."""

    def __init__(self, value, read=lambda: None):
        self.value, self.read = np.asarray(value), read

    def __array__(self, *_, **__):
        self.read()
        return self.value


class State(SimpleNamespace):
    """A stand-in for a state; its parameters are the number of the step that made them."""

    def __init__(self, step):
        super().__init__(parameters=step)

    def items(self):
        return self.parameters, None


class Stage:
    """A run whose step, evaluations and checkpoints only record that they were called."""

    def __init__(
        self, directory, *, not_finite=(), stop_at=None, stop_in_look=None, losses=None, **sections
    ):
        """
        Args:
          losses: the held-out loss by step; 1.0 for a step that is not in it.
        """
        self.events: list[str] = []
        self.saved: dict[int, dict] = {}
        self.failures: dict[int, CannotSave] = {}  # told after a step
        self.scores: dict[int, dict] = {}
        self.stopping = False
        self.not_finite, self.stop_at, self.stop_in_look = not_finite, stop_at, stop_in_look
        self.directory, self.losses = directory, losses or {}
        values = {
            "train": {"global_batch_rows": 2},
            "data": {"sequence_length": 8},
            "eval": {"every": 0},
            "checkpoint": {"every": 100},
            "logging": {"every": 1, "trackers": []},
            **sections,
        }
        config, self.clock = make_config(values), Clock()
        self.run = Run(
            config=config,
            directory=directory,
            domains=("chat",),
            steps=STEPS,
            total_rows=2 * STEPS,
            state=State(0),
            step=0,
            row=0,
            skipped_in_a_row=0,
            unchanged_since=0,
            loss_limit=LossLimit(config.train.max_loss_ratio),
            batches=iter([None] * STEPS),
            train_step=self.train_step,
            position=lambda row: {"row": row},
            epoch_of=lambda row: 0,
            pairs_of=lambda first, after: 10 * (after - first),
            devices=SimpleNamespace(record=self.work),
            evaluations=SimpleNamespace(
                held_out=self.evaluate,
                benchmarks=self.benchmark if "benchmarks" in values["eval"] else None,
                samples=None,
            ),
            early_stopping=EarlyStopping(config, {}),
            profiler=StepProfiler(None, STEPS, directory),
            checkpoints=SimpleNamespace(
                save=self.save,
                latest=lambda: max(self.saved, default=None),
                failure=lambda: self.failures.pop(self.run.step, None),
                wait=lambda: None,
            ),
            log=MetricsLog(directory, [], -1, self.clock),
            clock=self.clock,
        )

    def train_step(self, state, _, limit):
        step = self.run.step + 1
        self.events.append(f"step {step}")
        if step == self.stop_at:
            self.stopping = True
        metrics = {
            "loss": Metric(float(step), lambda: self.events.append(f"read {step}")),
            "applied": Metric(step not in self.not_finite),
            "domain_nll": Metric([1.0]),
            "domain_loss_tokens": Metric([1]),
        }
        ones = ("weights", "nll", "loss_tokens", "tokens", "grad_norm", "learning_rate")
        return State(step), metrics | {name: Metric(1.0) for name in ones}

    def work(self, work):
        counted = {"rows": work.rows, "tokens": work.tokens, "pairs": work.pairs}
        return {**counted, "mfu": 0.4321, "peak_device_memory_bytes": 3 << 29}

    def benchmark(self, parameters, give_up):
        if give_up():
            return {}
        self.events.append(f"benchmark {parameters}")
        return {"eval/gsm8k/score": 50.0}

    def evaluate(self, parameters, give_up):
        for batch in range(2):
            if give_up():
                return {}
            if batch == 0:
                self.events.append(f"look {parameters}")
            if parameters == self.stop_in_look:
                self.stopping = True
        names = ("chat", "mean")
        kinds = ("loss", "default_prompt/loss")
        loss = self.losses.get(parameters, 1.0)
        return {f"eval/{name}/{kind}": loss for name in names for kind in kinds}

    def save(self, step, parameters, optimizer, position, config, evaluation):
        assert parameters == step
        self.events.append(f"save {step}")
        self.saved[step], self.scores[step] = position, evaluation

    def fit(self):
        """Trains, and returns whether the run reached its end."""
        fit(self.run, lambda: self.stopping)
        return self.run.finished

    def logged(self):
        return [r for r in records(self.directory / "metrics.jsonl") if "token_loss" in r]


def test_a_step_is_read_after_the_next_is_dispatched_and_before_it_is_evaluated(tmp_path):
    stage = Stage(tmp_path, eval={"every": 2}, checkpoint={"every": 4})
    assert stage.fit()
    assert stage.events == [
        "look 0", "step 1", "step 2", "read 1", "read 2", "look 2", "step 3", "step 4", "read 3",
        "read 4", "look 4", "save 4", "step 5", "step 6", "read 5", "read 6", "look 6", "save 6",
    ]  # fmt: skip
    count = stage.saved[4].pop("early_stopping")
    assert stage.saved[4] == {
        "step": 4, "skipped_in_a_row": 0, "row": 8, "missed": [], "unchanged_since": 0
    }  # fmt: skip
    assert (count["best"], count["without_best"]) == (1.0, 2)
    assert [record["loss"] for record in stage.logged()] == [1, 2, 3, 4, 5, 6]


def test_a_checkpoint_keeps_how_many_steps_in_a_row_were_skipped(tmp_path):
    stage = Stage(tmp_path, not_finite=(3, 4), checkpoint={"every": 4})
    assert stage.fit()
    assert stage.saved[4]["skipped_in_a_row"] == 2
    assert stage.saved[6]["skipped_in_a_row"] == 0
    (tmp_path / "again").mkdir()
    again = Stage(tmp_path / "again", not_finite=(1,))
    again.run.skipped_in_a_row = 2
    with pytest.raises(UserError, match="3 steps in a row were not finite"):
        again.fit()


def test_how_many_skipped_steps_in_a_row_stop_a_run_is_a_setting(tmp_path):
    for most, allowed in ((1, ()), (2, (2,)), (5, (2, 3, 4, 5))):
        (tmp_path / str(most)).mkdir()
        train = {"global_batch_rows": 2, "max_skipped_in_a_row": most}
        assert Stage(tmp_path / str(most), not_finite=allowed, train=train).fit()
        stage = Stage(tmp_path / str(most), not_finite=range(1, most + 1), train=train)
        with pytest.raises(UserError, match=f"{most} steps in a row were not finite"):
            stage.fit()


def test_local_copies_are_made_between_checkpoints_of_steps_that_were_read(tmp_path, monkeypatch):
    """Each is made when the metrics of its step are safe: one that is newer is not taken."""
    safe: list[int] = []

    def sync(number):
        assert os.path.samestat(os.fstat(number), (tmp_path / "metrics.jsonl").stat())
        safe.append(last_step(tmp_path / "metrics.jsonl"))

    monkeypatch.setattr(os, "fsync", sync)
    stage = Stage(tmp_path, checkpoint={"every": 4, "local_every": 2})
    stage.run.checkpoints.items = SimpleNamespace(held=lambda parameters: parameters, base=None)

    def copy(step, state, position, config, base):
        assert state == (step, None)
        assert position["row"] == 2 * step
        assert safe[-1] == step
        stage.events.append(f"copy {step}")

    stage.run.local = SimpleNamespace(save=copy)
    assert stage.fit()
    assert [event for event in stage.events if not event.startswith("step")] == [
        "look 0", "read 1", "read 2", "copy 2", "read 3", "read 4", "save 4", "read 5", "read 6",
        "look 6", "save 6",
    ]  # fmt: skip


def test_a_run_that_begins_at_its_last_step_without_a_checkpoint_of_it_saves_one(tmp_path):
    """It goes on from a local copy, and the config has made it shorter."""
    stage = Stage(tmp_path)
    stage.run.step, stage.run.row, stage.run.state = STEPS, 2 * STEPS, State(STEPS)
    assert stage.fit()
    assert stage.events == [f"save {STEPS}"]


def test_a_save_that_failed_is_made_up_for_at_the_step_where_this_is_known(tmp_path, monkeypatch):
    pauses = []
    monkeypatch.setattr(saves, "sleep", pauses.append)
    stage = Stage(tmp_path, checkpoint={"every": 2})
    stage.failures[3] = CannotSave("process 1 cannot save checkpoint 2", "Give the command again")
    assert stage.fit()
    assert list(stage.saved) == [2, 3, 4, 6]
    assert stage.events.index("read 3") + 1 == stage.events.index("save 3")
    assert pauses == [1]


def test_a_run_that_must_stop_only_saves_a_checkpoint(tmp_path):
    stage = Stage(tmp_path, stop_at=4, eval={"every": 2})
    assert not stage.fit()
    assert stage.events[-4:] == ["step 4", "read 3", "read 4", "save 4"]


def test_a_signal_during_an_evaluation_abandons_it_and_saves(tmp_path):
    stage = Stage(tmp_path, stop_in_look=2, eval={"every": 2})
    assert not stage.fit()
    assert stage.events[-2:] == ["look 2", "save 2"]
    assert stage.scores[2] == {}


def test_benchmarks_have_an_interval_of_their_own_and_are_logged(tmp_path):
    stage = Stage(tmp_path, eval={"every": 2, "benchmarks": {"every": 4}})
    assert stage.fit()
    looks = [event for event in stage.events if event.startswith(("look", "benchmark"))]
    assert looks == [
        "look 0", "benchmark 0", "look 2", "look 4", "benchmark 4", "look 6", "benchmark 6",
    ]  # fmt: skip
    scored = [r["step"] for r in records(tmp_path / "metrics.jsonl") if "eval/gsm8k/score" in r]
    assert scored == [0, 4, 6]


def test_no_benchmark_starts_once_a_run_must_stop(tmp_path):
    stage = Stage(tmp_path, stop_in_look=2, eval={"every": 2, "benchmarks": {"every": 2}})
    assert not stage.fit()
    assert stage.events[-2:] == ["look 2", "save 2"]


def test_the_steps_before_a_checkpoint_are_logged_with_it(tmp_path):
    stage = Stage(tmp_path, stop_at=5, logging={"every": 3, "trackers": []})
    assert not stage.fit()
    assert [(r["step"], r["loss"]) for r in stage.logged()] == [(3, 2.0), (5, 4.5)]


def test_a_log_line_has_the_figures_of_the_devices_for_its_steps(tmp_path, log_text):
    """Steps of 2 rows, each of 1 token; the third is skipped."""
    stage = Stage(tmp_path, not_finite={3}, logging={"every": 2, "trackers": []})
    assert stage.fit()
    keys = ("step", "rows", "tokens", "pairs")
    assert [[record[key] for key in keys] for record in stage.logged()] == [
        [2, 4, 2, 40], [4, 2, 1, 20], [6, 4, 2, 40],
    ]  # fmt: skip
    assert log_text.getvalue().count("data wait 0.0 s  mfu 43.2%  memory 1.50 GiB  left") == 3


def test_a_run_without_a_new_best_ends_like_at_its_last_step(tmp_path):
    stage = Stage(
        tmp_path,
        losses={0: 3.0, 1: 2.0, 2: 2.0, 3: 2.5},
        train={"global_batch_rows": 2, "early_stopping_patience": 2},
        eval={"every": 1, "benchmarks": {"every": 100}},
        checkpoint={"every": 2},
    )
    assert stage.fit()
    assert stage.events[-5:] == ["step 3", "read 3", "look 3", "benchmark 3", "save 3"]
    assert stage.scores[3]["eval/mean/loss"] == 2.5
    assert stage.saved[2]["early_stopping"]["without_best"] == 1


@pytest.mark.parametrize("patience", [None, 2])
def test_an_abandoned_evaluation_is_made_up_for(tmp_path, patience):
    stage = Stage(
        tmp_path,
        stop_in_look=2,
        train={"global_batch_rows": 2, "early_stopping_patience": patience},
        eval={"every": 2},
    )
    assert not stage.fit()
    assert stage.events[-2:] == ["look 2", "save 2"]
    assert stage.saved[2]["missed"] == ["held_out"]
    stage.events.clear()
    stage.run.log = MetricsLog(tmp_path, [], 2, stage.clock)
    assert not stage.fit()  # stopped again: it takes no step before the evaluation
    assert stage.events == []
    stage.stop_in_look, stage.stopping = None, False
    stage.run.log = MetricsLog(tmp_path, [], 2, stage.clock)
    assert stage.fit()
    assert stage.events[:2] == ["look 2", "step 3"]
    log = records(tmp_path / "metrics.jsonl")
    end = 4 if patience else STEPS  # 2 and 4 had no new best
    assert [record["step"] for record in log] == list(range(end + 1))
    assert {"eval/mean/loss", "token_loss"} <= log[2].keys()


def test_a_run_is_not_complete_before_its_last_evaluations(tmp_path):
    stage = Stage(tmp_path, stop_in_look=STEPS, eval={"every": 2, "benchmarks": {"every": 100}})
    assert not stage.fit()
    assert stage.events[-2:] == [f"look {STEPS}", f"save {STEPS}"]
    assert stage.saved[STEPS]["missed"] == ["benchmarks", "held_out"]
    stage.events.clear()
    stage.stop_in_look, stage.stopping = None, False
    stage.run.log = MetricsLog(tmp_path, [], STEPS, stage.clock)
    assert stage.fit()
    assert stage.events == [f"look {STEPS}", f"benchmark {STEPS}"]


def test_step_0_is_saved_when_its_evaluation_is_abandoned(tmp_path):
    stage = Stage(tmp_path, stop_in_look=0, eval={"every": 2})
    assert not stage.fit()
    assert stage.events == ["look 0", "save 0"]
