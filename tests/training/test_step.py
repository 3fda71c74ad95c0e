"""The train step against a plain full-batch oracle, and its behaviour on bad batches."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moi_jax import config as config_lib
from moi_jax.data.loader import Batch
from moi_jax.models import decoder
from moi_jax.models.decoder import make_model
from moi_jax.models.parameters import random_parameters
from moi_jax.parallel.mesh import make_mesh
from moi_jax.parallel.placing import place_batch
from moi_jax.training.optimizer import make_optimizer, make_schedule
from moi_jax.training.state import TrainState, new_state
from moi_jax.training.step import make_train_step

from support.trainer import (
    DOMAINS,
    MODEL,
    OPTIMIZER,
    ROWS,
    STEPS,
    Trainer,
    plain_loss,
    random_batch,
)
from support.xla import AS_USERS


@pytest.mark.parametrize("microbatch_rows", [8, 2])
def test_three_steps_equal_plain_adamw_on_the_whole_batch(microbatch_rows):
    trainer = Trainer({"fsdp": 1}, microbatch_rows)
    parameters = trainer.parameters()
    # Norms ("scale") and biases do not decay.
    decays = jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("table", "kernel"), parameters
    )
    schedule = make_schedule(OPTIMIZER, STEPS)
    oracle = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(schedule, b1=0.9, b2=0.95, eps=1e-8, weight_decay=0.1, mask=decays),
    )
    state = oracle.init(parameters)
    gradient = jax.jit(jax.value_and_grad(plain_loss, has_aux=True))

    @jax.jit
    def adamw(gradients, state, parameters):
        updates, state = oracle.update(gradients, state, parameters)
        return optax.apply_updates(parameters, updates), state

    for seed in range(3):
        batch = random_batch(seed)
        (loss, nll), gradients = gradient(parameters, batch)
        parameters, state = adamw(gradients, state, parameters)

        metrics = trainer.step(batch)
        np.testing.assert_allclose(metrics["loss"], loss, rtol=2e-6)
        counted = batch.loss_weights > 0
        for domain in range(DOMAINS):
            chosen = counted & (batch.domain_ids == domain)
            np.testing.assert_allclose(
                metrics["domain_nll"][domain], np.sum(np.asarray(nll)[chosen]), rtol=1e-5
            )
            assert metrics["domain_loss_tokens"][domain] == chosen.sum()
        assert metrics["tokens"] == (batch.segment_ids > 0).sum()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), trainer.parameters(), parameters
    )


def test_the_step_is_the_same_as_users_compile_it():
    quick, optimized, batch = Trainer({"fsdp": 1}), Trainer({"fsdp": 1}), random_batch(0)
    program = optimized.lower(batch).compile(compiler_options=AS_USERS)
    with jax.set_mesh(optimized.mesh):
        state, metrics = program(optimized.state, optimized.place(batch), np.float32(np.inf))
    expected = quick.step(batch)
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(metrics[name], expected[name], rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6),
        jax.device_get(state.parameters), quick.parameters(),
    )  # fmt: skip


def test_a_step_that_is_not_finite_changes_nothing_but_the_step():
    trainer = Trainer({"fsdp": 1})
    trainer.step(random_batch(0))
    before = jax.device_get(trainer.state)
    batch = random_batch(1)
    weights = batch.loss_weights.copy()
    weights[0, 0] = np.inf
    metrics = trainer.step(batch._replace(loss_weights=weights))
    assert not metrics["applied"]
    after = jax.device_get(trainer.state)
    assert after.step == before.step + 1
    jax.tree.map(
        np.testing.assert_array_equal,
        (after.parameters, after.opt_state),
        (before.parameters, before.opt_state),
    )
    assert trainer.step(random_batch(2))["applied"]


def test_a_step_whose_gradient_alone_is_not_finite_is_not_applied():
    trainer = Trainer({"fsdp": 1})
    # Logits of about 1e21: the loss is finite, but the squares of the gradient are not.
    trainable = dict(trainer.state.trainable)
    trainable["head"] = jax.tree.map(lambda x: x * 1e22, trainable["head"])
    trainer.state = dataclasses.replace(trainer.state, trainable=trainable)
    metrics = trainer.step(random_batch(0))
    assert np.isfinite(metrics["loss"])
    assert not np.isfinite(metrics["grad_norm"])
    assert not metrics["applied"]


def test_a_batch_without_weights_is_skipped_without_nan():
    trainer = Trainer({"fsdp": 1})
    before = trainer.parameters()
    batch = random_batch(0)
    metrics = trainer.step(batch._replace(loss_weights=np.zeros_like(batch.loss_weights)))
    assert not metrics["applied"]
    assert metrics["weights"] == 0
    assert metrics["loss"] == 0
    jax.tree.map(np.testing.assert_array_equal, trainer.parameters(), before)


def test_empty_rows_change_no_sum():
    trainer = Trainer({"fsdp": 1})
    batch = random_batch(0)
    half = Batch(*(array.copy() for array in batch))
    for array in (half.segment_ids, half.loss_weights, half.positions):
        array[4:] = 0
    half.domain_ids[4:] = -1
    sums = trainer.row_sums(half)
    nll = jax.jit(plain_loss)(trainer.parameters(), Batch(*(array[:4] for array in batch)))[1]
    np.testing.assert_allclose(
        sums.nll.sum(), np.sum(np.asarray(nll)[batch.loss_weights[:4] > 0]), rtol=1e-5
    )


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules_by_hand(schedule):
    config = config_lib.Optimizer(learning_rate=0.8, schedule=schedule, warmup_ratio=0.4)
    rate = make_schedule(config, 10)
    assert [round(float(rate(s)), 6) for s in range(4)] == [0.2, 0.4, 0.6, 0.8]
    expected = {
        "cosine": [0.8 * (1 + np.cos(np.pi * t / 6)) / 2 for t in range(6)],
        "linear": [0.8 * (1 - t / 6) for t in range(6)],
        "constant": [0.8] * 6,
    }[schedule]
    np.testing.assert_allclose([float(rate(4 + t)) for t in range(6)], expected, rtol=1e-5)
    assert float(make_schedule(config_lib.Optimizer(warmup_ratio=0), 10)(0)) == pytest.approx(1e-5)


def test_the_moments_of_bfloat16_parameters_are_float32():
    trainer = Trainer({"fsdp": 1}, dtype="bfloat16")
    trainer.step(random_batch(0))
    trainer.step(random_batch(1))
    assert trainer.state.parameters["head"]["kernel"].dtype == jnp.bfloat16
    moments = [x for x in jax.tree.leaves(trainer.state.opt_state) if x.ndim]
    assert {str(x.dtype) for x in moments} == {"float32"}


def test_a_frozen_parameter_has_no_moments_and_never_changes(monkeypatch):
    """What a parameter's module says of it decides: here the embedding is frozen."""
    declared = decoder.parameter

    def frozen_embedding(value, axes, **known):
        return declared(value, axes, **known | {"trainable": axes[0] != "vocab"})

    monkeypatch.setattr(decoder, "parameter", frozen_embedding)
    model = dataclasses.replace(MODEL, mlp_width=40)  # a model that no other test has cached
    mesh = make_mesh(config_lib.Mesh(fsdp=1), jax.devices())
    optimizer = make_optimizer(OPTIMIZER, model)
    parameters = random_parameters(model, 0, "float32", mesh)
    before = jax.device_get(parameters)
    state = new_state(model, optimizer, parameters, mesh)
    table = before["embedding"]["table"]
    assert [x.shape for x in jax.tree.leaves(state.frozen)] == [table.shape]
    assert table.shape not in {x.shape for x in jax.tree.leaves(state.opt_state)}
    schedule = make_schedule(OPTIMIZER, STEPS)
    step = make_train_step(model, make_model(model), optimizer, schedule, DOMAINS, mesh)
    with jax.set_mesh(mesh):
        batch = place_batch(random_batch(0), np.arange(ROWS), ROWS, mesh)
        state, metrics = step(state, batch, np.float32(np.inf))
    assert metrics["applied"]
    after = jax.device_get(state.parameters)
    np.testing.assert_array_equal(after["embedding"]["table"], table)
    assert np.any(after["head"]["kernel"] != before["head"]["kernel"])
    # A checkpoint keeps the parameters in one tree; they come apart again as before.
    again = TrainState.from_items(optimizer.trained, *state.items())
    jax.tree.map(np.testing.assert_array_equal, again, state)
