"""Loss spikes: what counts as one, what it changes, and what a resumed run makes of it."""

import statistics

import jax
import numpy as np
import pytest

from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config
from moi_jax.training import spikes
from moi_jax.training.spikes import LossLimit

from support.runs import lasting, records, refusal, small_config, stop_after, train_here
from support.trainer import Trainer, random_batch


def limits(ratio, losses, saved=(), first=1):
    """The limit before each step, where every loss under it is of an applied step."""
    limit = LossLimit(ratio, saved)
    found = []
    for step, loss in enumerate(losses, start=first):
        found.append(limit.before(step))
        if loss <= found[-1]:
            limit.add(step, loss)
    return found, limit


def test_the_limit_is_a_multiple_of_the_median_of_the_applied_steps_but_the_last():
    losses = [float(loss) for loss in np.random.default_rng(0).uniform(1, 2, 100)]
    losses[40] = 50.0  # a spike: it is no part of any median
    found, _ = limits(2.0, losses)
    applied = [loss for loss in losses if loss < 50]
    assert found[:9] == [np.inf] * 9
    assert found[9] == np.float32(2 * statistics.median(losses[:8]))
    assert found[40] < 50
    assert found[41] == np.float32(2 * statistics.median(losses[:40]))
    assert found[99] == np.float32(2 * statistics.median(applied[97 - 64 : 97]))
    assert limits(None, losses)[0] == [np.inf] * 100


@pytest.mark.parametrize("at", [5, 41, 90])
def test_the_limits_of_a_resumed_run_are_those_of_one_that_went_on(at):
    losses = [float(loss) for loss in np.random.default_rng(1).uniform(1, 9, 100)]
    whole, _ = limits(1.5, losses)
    before, limit = limits(1.5, losses[:at])
    after, _ = limits(1.5, losses[at:], limit.to_json(), first=at + 1)
    assert before + after == whole


def test_a_loss_over_the_limit_changes_nothing_but_the_step():
    trainer = Trainer({"fsdp": 1})
    loss = trainer.step(random_batch(0))["loss"]
    before = jax.device_get(trainer.state)
    metrics = trainer.step(random_batch(1), max_loss=loss / 2)
    assert np.isfinite(metrics["loss"])
    assert not metrics["applied"]
    after = jax.device_get(trainer.state)
    assert after.step == before.step + 1
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.parameters, after.opt_state),
        (before.parameters, before.opt_state),
    )
    assert trainer.step(random_batch(2), max_loss=loss * 2)["applied"]


def test_a_spike_is_skipped_also_by_a_resumed_run_or_stops_with_its_rows(tmp_path, monkeypatch):
    """Any loss over 1.00001 times the median of 1 to 64 losses is a spike here."""
    monkeypatch.setattr(spikes, "FEWEST", 1)
    (tmp_path / "stopped").mkdir()
    train = {"steps": 6, "max_loss_ratio": 1.00001, "max_skipped_in_a_row": 100}
    options = {"train": {**train, "global_batch_rows": 1}, "checkpoint": {"every": 100}}
    config = small_config(tmp_path, optimizer={"learning_rate": 1e-9}, **options)
    whole = train_here(config, make_evaluations=None)
    log = records(whole.directory / "metrics.jsonl")
    skipped = [record for record in log if record.get("skipped")]
    losses = [record["loss"] for record in log]
    assert {record["reason"] for record in skipped} == {"loss spike"}
    step = skipped[0]["step"]
    over = [losses[n] > 1.00001 * statistics.median(losses[: n - 1]) for n in range(2, 6)]
    assert over.index(True) + 3 == step

    path = small_config(tmp_path / "stopped", optimizer={"learning_rate": 1e-9}, **options)
    stop_there = {"make_evaluations": None, "stop": stop_after(step - 1)}
    assert train_here(path, "train.on_spike=stop", **stop_there).step == step - 1
    said = refusal(path, "train.on_spike=stop", make_evaluations=None)
    assert said.startswith(
        f"step {step} over rows {step - 1} to {step - 1} has a loss spike (loss "
    )
    again = train_here(path, make_evaluations=None)
    assert [lasting(r) for r in records(again.directory / "metrics.jsonl")] == [
        lasting(record) for record in log
    ]
    jax.tree.map(np.testing.assert_array_equal, again.state.parameters, whole.state.parameters)


def test_a_policy_without_a_ratio_is_refused(tmp_path):
    with pytest.raises(UserError, match="on_spike: stop has no effect without max_loss_ratio"):
        load_config(small_config(tmp_path), ["train.on_spike=stop"])
