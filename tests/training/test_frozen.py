"""`optimizer.frozen`: what it names never changes, and costs no gradient and no state."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from moi_jax import config as config_lib
from moi_jax.accounting.memory import abstract_step, argument_bytes
from moi_jax.common.errors import UserError
from moi_jax.config.load import make_config
from moi_jax.models.trained import trained_parameters
from moi_jax.parallel.mesh import make_mesh
from moi_jax.training.optimizer import make_optimizer, make_schedule
from moi_jax.training.resume import config_changes

from support.trainer import (
    MODEL,
    OPTIMIZER,
    STEPS,
    Trainer,
    initial_parameters,
    plain_loss,
    random_batch,
)

DEEP = dataclasses.replace(MODEL, num_layers=12)


def path_of(keys):
    return ".".join(key.key for key in keys)


def frozen_part(path, array):
    """What the patterns embedding, layers.0.mlp and *.bias name of a parameter, as a mask."""
    frozen = np.full(array.shape, path.startswith("embedding.") or path.endswith(".bias"))
    if path.startswith("layers.mlp."):
        frozen[0] = True
    return frozen


PATTERNS = ("embedding", "layers.0.mlp", "*.bias")
FROZEN = OPTIMIZER.model_copy(update={"frozen": PATTERNS})


def test_steps_equal_plain_adamw_whose_gradients_and_updates_are_masked():
    trainer = Trainer({"fsdp": 1}, microbatch_rows=4, optimizer=FROZEN)
    parameters = trainer.parameters()
    masks = jax.tree_util.tree_map_with_path(lambda k, p: frozen_part(path_of(k), p), parameters)
    decays = jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key in ("table", "kernel"), parameters
    )

    def masked(tree):
        return jax.tree.map(lambda mask, x: np.where(mask, 0, x), masks, tree)

    oracle = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.adamw(
            make_schedule(OPTIMIZER, STEPS), b1=0.9, b2=0.95, weight_decay=0.1, mask=decays
        ),
    )
    state, gradient = oracle.init(parameters), jax.jit(jax.grad(plain_loss, has_aux=True))
    for seed in range(2):
        gradients = masked(gradient(parameters, random_batch(seed))[0])
        updates, state = oracle.update(gradients, state, parameters)
        parameters = optax.apply_updates(parameters, masked(updates))
        metrics = trainer.step(random_batch(seed))
        np.testing.assert_allclose(metrics["grad_norm"], optax.tree.norm(gradients), rtol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-6), trainer.parameters(), parameters
    )
    for (keys, old), new in zip(
        jax.tree_util.tree_leaves_with_path(initial_parameters("float32")),
        jax.tree.leaves(trainer.parameters()),
        strict=True,
    ):
        mask = frozen_part(path_of(keys), old)
        np.testing.assert_array_equal(new[mask], old[mask])


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "lion", "muon"])
def test_no_optimizer_changes_what_is_frozen_or_keeps_a_state_of_it(kind):
    config = FROZEN.model_copy(update={"name": kind})
    optimizer = make_optimizer(config, MODEL)
    parameters = jax.tree.map(jnp.asarray, initial_parameters("float32"))
    trainable, _ = optimizer.trained.split(parameters)
    part = optimizer.trained.part(trainable)
    updates, state = jax.jit(optimizer.update)(part, optimizer.init(part), part)
    assert not {x.shape for x in jax.tree.leaves(state)} & {(64, 32), (2, 32, 48), (2, 48, 32)}
    after = optimizer.trained.put(trainable, jax.tree.map(np.add, part, updates))
    for (keys, old), new in zip(
        jax.tree_util.tree_leaves_with_path(trainable), jax.tree.leaves(after), strict=True
    ):
        changed = np.any(new != old, axis=tuple(range(1, old.ndim)))
        frozen = np.all(frozen_part(path_of(keys), old), axis=tuple(range(1, old.ndim)))
        assert np.array_equal(changed, ~frozen), path_of(keys)


@pytest.mark.parametrize(
    ("patterns", "fewer"),
    # With the layers and the embedding frozen, the backward pass ends at the final norm.
    [(("head",), 1), (("layers.*.kernel",), 7), (("layers", "embedding"), 18)],
)
def test_no_gradient_of_a_frozen_matrix_is_computed(patterns, fewer):
    def products(frozen):
        trainer = Trainer({"fsdp": 1}, optimizer=OPTIMIZER.model_copy(update={"frozen": frozen}))
        return trainer.lower(random_batch(0)).as_text().count("dot_general")

    assert products(()) - products(patterns) == fewer


def test_what_is_frozen_has_no_share_in_the_planned_memory():
    def planned(*frozen):
        config = make_config({"optimizer": {"frozen": frozen}})
        mesh = make_mesh(config_lib.Mesh(fsdp=1), jax.devices())
        return argument_bytes(abstract_step(config, MODEL, mesh)[0])

    every, some = planned(), planned("embedding", "layers.0.mlp.up")
    assert every.parameters == some.parameters
    trained, values = trained_parameters(MODEL, ["embedding", "layers.0.mlp.up"]).counts(MODEL)
    assert values - trained == 64 * 32 + 32 * 48
    assert every.optimizer - some.optimizer == 8 * (64 * 32 + 32 * 48)


@pytest.mark.parametrize(
    ("pattern", "whole", "layers"),
    [
        ("embedding", {"embedding.table"}, {}),
        ("layers.*norm", {"layers.attention_norm.scale", "layers.mlp_norm.scale"}, {}),
        ("layers.0-11.mlp.up", {"layers.mlp.up.kernel"}, {}),
        ("layers.3.mlp.up", set(), {"layers.mlp.up.kernel": ((0, 3), (4, 12))}),
        ("layers.10-11.mlp.up.*", set(), {"layers.mlp.up.kernel": ((0, 10),)}),
    ],
)
def test_a_pattern_names_parameters_or_layers_of_them(pattern, whole, layers):
    every, trained = trained_parameters(DEEP), trained_parameters(DEEP, [pattern])
    assert every.paths - trained.paths == whole
    assert trained.layers == layers


def test_a_pattern_may_stand_alone():
    assert make_config({"optimizer": {"frozen": "embedding"}}).optimizer.frozen == ("embedding",)


def test_patterns_add_up():
    patterns = ["layers.0-5.mlp", "layers.6-11.mlp.up", "layers.0-3"]
    trained = trained_parameters(DEEP, patterns)
    assert "layers.mlp.up.kernel" not in trained.paths
    assert trained.layers["layers.mlp.down.kernel"] == ((6, 12),)
    assert trained.layers["layers.attention.query.kernel"] == ((4, 12),)


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["embeding"], "no parameter of the model matches 'embeding'"),
        (["layers.0-11", "layers.5.attn"], "no parameter of the model matches 'layers.5.attn'"),
        (["layers.8-12"], "'layers.8-12' does not name layers of the model, which has 12"),
        (["layers.5-3"], "'layers.5-3' does not name layers"),
        (["*"], "leaves no parameter to train"),
    ],
)
def test_a_pattern_that_names_nothing_or_leaves_nothing_is_refused(patterns, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_optimizer(config_lib.Optimizer(frozen=patterns), DEEP)


def test_other_frozen_parameters_are_another_run():
    before, now = (
        make_config({"optimizer": {"frozen": frozen}}).model_dump(mode="json")
        for frozen in ([], ["embedding"])
    )
    assert {may for _, may in config_changes(before, now)} == {"never"}
    del before["optimizer"]["frozen"]  # a run from before the setting froze nothing
    assert {may for _, may in config_changes(before, now)} == {"never"}
    now["optimizer"]["frozen"] = []
    assert not list(config_changes(before, now))
