"""Every optimizer: the same on every mesh, saved and resumed bit for bit, and Muon's matrices."""

import dataclasses
from contextlib import closing

import jax
import numpy as np
import optax
import pytest

from moi_jax import config as config_lib
from moi_jax.checkpoints.items import ModelItems
from moi_jax.checkpoints.run_checkpoints import RunCheckpoints
from moi_jax.config.load import make_config
from moi_jax.models.parameters import random_parameters
from moi_jax.parallel.mesh import make_mesh
from moi_jax.training.optimizer import make_optimizer
from moi_jax.training.state import TrainState, abstract_state, new_state

from support.trainer import MODEL, OPTIMIZER, Trainer, initial_parameters, random_batch

BFLOAT16 = {"moment_dtype": "bfloat16", "second_moment_dtype": "bfloat16"}
KINDS = {
    "adafactor": {"name": "adafactor"},
    "lion": {"name": "lion"},
    "muon": {"name": "muon"},
    "bfloat16": BFLOAT16 | {"gradient_dtype": "bfloat16"},
    "frozen": {"frozen": ("embedding", "layers.0.mlp")},
}


ONE, EIGHT = {"fsdp": 1}, {"fsdp": 4, "tensor": 2}


def trainer(kind: str, mesh: dict[str, int], **options: int) -> Trainer:
    return Trainer(mesh, optimizer=OPTIMIZER.model_copy(update=KINDS[kind]), **options)


@pytest.mark.parametrize("kind", ["adafactor", "muon"])  # they do not update each value by itself
def test_it_learns_alike_on_every_mesh(kind):
    one, eight = trainer(kind, ONE), trainer(kind, EIGHT)
    losses = np.array([[t.step(random_batch(0))["loss"] for _ in range(3)] for t in (one, eight)])
    assert losses[0, 2] < losses[0, 0]
    np.testing.assert_allclose(losses[1], losses[0], rtol=0, atol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_where_it_was_saved(kind, tmp_path):
    eight = trainer(kind, EIGHT)
    losses = [eight.step(random_batch(0))["loss"] for _ in range(3)]
    assert losses[2] < losses[0]
    items = ModelItems(MODEL, {}, {})
    with closing(RunCheckpoints(tmp_path, make_config({}).checkpoint, items)) as checkpoints:
        checkpoints.save(3, *eight.state.items(), {}, {}, {})
        checkpoints.wait()
        with jax.set_mesh(eight.mesh):
            abstract = abstract_state(MODEL, eight.optimizer, "float32", eight.mesh)
            saved = TrainState.from_items(
                eight.optimizer.trained, *checkpoints.restore(3, *abstract.items())
            )
    expected = eight.step(random_batch(1))["loss"], eight.parameters()
    eight.state = saved
    resumed = eight.step(random_batch(1))["loss"], eight.parameters()
    jax.tree.map(np.testing.assert_array_equal, resumed, expected)


def test_moments_and_gradients_have_the_dtypes_of_the_config():
    state = trainer("bfloat16", ONE).state
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert {str(x.dtype) for x in moments} == {"bfloat16"}
    assert {str(x.dtype) for x in jax.tree.leaves(state.parameters)} == {"float32"}


def test_bfloat16_gradients_of_microbatches_are_close_to_those_of_one_batch():
    whole = trainer("bfloat16", ONE).step(random_batch(0))
    parts = trainer("bfloat16", ONE, microbatch_rows=2).step(random_batch(0))
    assert parts["grad_norm"] == pytest.approx(whole["grad_norm"], rel=0.02)
    assert parts["grad_norm"] != whole["grad_norm"]  # rounded at other places


def test_the_factors_of_adafactor_are_small_and_whole_on_every_device():
    model = dataclasses.replace(MODEL, hidden_size=128, mlp_width=256, vocab_size=256)
    optimizer = make_optimizer(config_lib.Optimizer(name="adafactor"), model)
    mesh = make_mesh(config_lib.Mesh(**EIGHT), jax.devices())
    state = new_state(model, optimizer, random_parameters(model, 0, "float32", mesh), mesh)
    by_path = {
        jax.tree_util.keystr(path): kept
        for path, kept in jax.tree_util.tree_leaves_with_path(state.opt_state)
    }
    factors = [x for path, x in by_path.items() if "['gate']" in path and ".v_" in path]
    assert sorted(x.shape for x in factors) == [(2, 128), (2, 256)]
    assert all(x.is_fully_replicated for x in factors)
    trained = sum(x.size for x in jax.tree.leaves(state.trainable))
    assert sum(x.size for x in by_path.values()) < trained / 4


def test_muon_makes_each_matrix_of_each_layer_nearly_orthogonal():
    """The update has the singular vectors of the gradient, and singular values near a constant.

    The iteration of Muon takes them to between 0.5 and 1.5 (Jordan et al. 2024), and the scale to
    AdamW's size is 0.2 sqrt(max(inputs, outputs)) (arXiv 2502.16982).
    """
    config = config_lib.Optimizer(name="muon", weight_decay=0.0, clip_norm=None)
    optimizer, parameters = make_optimizer(config, MODEL), initial_parameters("float32")
    rng = np.random.default_rng(0)
    gradients = jax.tree.map(lambda p: rng.normal(size=p.shape).astype(np.float32), parameters)
    state = optimizer.init(parameters)
    updates, _ = jax.jit(optimizer.update)(gradients, state, parameters)
    for path, inputs in {"query": 1, "out": 2}.items():
        gradient, update = (
            tree["layers"]["attention"][path]["kernel"] for tree in (gradients, updates)
        )
        for layer in range(MODEL.num_layers):
            shape = (int(np.prod(gradient.shape[1 : 1 + inputs])), -1)
            u, _, vt = np.linalg.svd(gradient[layer].reshape(shape), full_matrices=False)
            values = u.T @ np.asarray(update[layer]).reshape(shape) @ vt.T
            values /= 0.2 * np.sqrt(max(u.shape[0], vt.shape[1]))
            assert np.all((np.diag(values) > 0.5) & (np.diag(values) < 1.5))
            np.testing.assert_allclose(values, np.diag(np.diag(values)), atol=1e-3)


def test_muon_leaves_the_tables_and_norms_to_adam():
    parameters = initial_parameters("float32")
    gradients = jax.tree.map(np.ones_like, parameters)
    config = config_lib.Optimizer(name="muon", weight_decay=0.0, clip_norm=None)
    muon = make_optimizer(config, MODEL)
    adam = optax.scale_by_adam(config.b1, config.b2, config.eps, nesterov=True)
    ours, _ = jax.jit(muon.update)(gradients, muon.init(parameters), parameters)
    theirs, _ = adam.update(gradients, adam.init(parameters), parameters)
    for names in (("embedding", "table"), ("head", "kernel"), ("final_norm", "scale")):
        np.testing.assert_allclose(ours[names[0]][names[1]], theirs[names[0]][names[1]], rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "lion", "second_moment_dtype": "bfloat16"}, "second_moment_dtype has no effect"),
        ({"name": "adafactor", "b1": 0.5}, "b1 has no effect on adafactor"),
        ({"second_moment_dtype": "bfloat16", "b2": 0.999}, "b2 0.999 is too large for a second"),
    ],
)
def test_a_setting_without_effect_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        config_lib.Optimizer(**settings)
