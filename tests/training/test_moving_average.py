"""optimizer.ema_decay: a moving average that is sharded, saved, resumed and written out."""

import shutil

import jax
import numpy as np
import pytest

from moi_jax.accounting.memory import argument_bytes
from moi_jax.checkpoints.items import find_step, read_items
from moi_jax.checkpoints.moving_average import write_moving_average
from moi_jax.checkpoints.parameters import stored_parameters
from moi_jax.common.errors import UserError
from moi_jax.training.optimizer import Averaged

from support.runs import refusal, small_config, train_here
from support.trainer import OPTIMIZER, Trainer, random_batch

DECAY = 0.75
KEEPING = OPTIMIZER.model_copy(update={"ema_decay": DECAY, "frozen": ("layers.0", "embedding")})


def flat(tree):
    return {
        jax.tree_util.keystr(p): np.asarray(v) for p, v in jax.tree_util.tree_leaves_with_path(tree)
    }


def test_the_average_follows_applied_updates_and_is_sharded_like_its_parameters():
    trainer = Trainer({"fsdp": 2}, optimizer=KEEPING)

    def trained():
        return flat(trainer.optimizer.trained.part(trainer.state.trainable))

    expected = {name: value.astype(np.float64) for name, value in trained().items()}
    for number, limit in enumerate((np.inf, 0.0, np.inf)):  # the second update is not applied
        trainer.step(random_batch(number), limit)
        if limit:
            expected = {n: DECAY * e + (1 - DECAY) * trained()[n] for n, e in expected.items()}
    average = trainer.state.opt_state.average
    found = flat(average)
    assert found.keys() == expected.keys()
    for name, wanted in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], wanted, atol=1e-6, err_msg=name)
        assert np.any(found[name] != trained()[name])
    kernel, mean = (
        tree["layers"]["mlp"]["gate"]["kernel"] for tree in (trainer.state.trainable, average)
    )
    assert kernel.sharding == mean.sharding


def test_training_is_the_same_and_costs_the_average_alone():
    # With a small eps the first update of Adam depends on the rounding of gradients near 0.
    without = OPTIMIZER.model_copy(update={"eps": 1e-3})
    plain = Trainer({"fsdp": 1}, optimizer=without)
    keeping = Trainer({"fsdp": 1}, optimizer=without.model_copy(update={"ema_decay": DECAY}))
    assert not isinstance(plain.state.opt_state, Averaged)
    for trainer in (plain, keeping):
        trainer.step(random_batch(0))
    # The compiler may round the two programs differently.
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7),
        plain.parameters(), keeping.parameters(),
    )  # fmt: skip
    more = argument_bytes(keeping.state).optimizer - argument_bytes(plain.state).optimizer
    assert more == 4 * sum(leaf.size for leaf in jax.tree.leaves(plain.state.parameters))


def saved(step):
    stored = stored_parameters(step, read_items(step).model)
    return {name: stored.get(name) for name in stored.arrays}


def test_a_run_resumes_with_its_average_and_writes_it(tmp_path):
    config = small_config(
        tmp_path,
        train={"steps": 4, "global_batch_rows": 2},
        optimizer={"ema_decay": 0.5, "frozen": ["layers.1"]},
        checkpoint={"every": 2},
    )
    whole = train_here(config, make_evaluations=None).directory
    killed = shutil.copytree(whole, tmp_path / "killed")  # as if it had been after step 2
    shutil.rmtree(killed / "checkpoints" / "4")
    again = f"logging.run_dir={killed}"
    assert "ema_decay" in refusal(config, again, "optimizer.ema_decay=0.9", allow_change=True)
    train_here(config, again, make_evaluations=None)
    for run, name in ((whole, "one"), (killed, "other")):
        write_moving_average(run, tmp_path / name)
    one, other, last = map(saved, (tmp_path / "one", tmp_path / "other", find_step(whole)))
    assert one.keys() == last.keys()
    for name, value in one.items():
        np.testing.assert_array_equal(value, other[name], err_msg=name)
    kernel = "layers.mlp.gate.kernel"
    frozen = [np.array_equal(one[kernel][layer], last[kernel][layer]) for layer in range(2)]
    assert frozen == [False, True]
    with pytest.raises(UserError, match="keeps no moving average"):
        write_moving_average(tmp_path / "one", tmp_path / "none")
    assert not (tmp_path / "none").exists()
