"""LoRA adapters in the model: where they are, what they compute, and which configs are refused."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from moi_jax import config as config_lib
from moi_jax.common.errors import UserError
from moi_jax.config.load import make_config
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import make_model
from moi_jax.models.linear import Linear
from moi_jax.models.lora import adapted
from moi_jax.models.parameters import (
    abstract_parameters,
    adapters_of,
    base_of,
    merge_trees,
    parameter_specs,
    random_parameters,
)

from support.trainer import MODEL, plain_loss, random_batch

BIASED = dataclasses.replace(MODEL, qkv_bias=True, qk_norm=True)
ADAPTED = adapted(MODEL, config_lib.LoRA(rank=4, alpha=6.0))
MATRICES = {
    "attention": ("key", "out", "query", "value"),
    "mlp": ("down", "gate", "up"),
}
TOKENS = jnp.asarray(random_batch(0).tokens)


def bits(array):
    return np.asarray(array).view(np.uint32)


def trained_at_random(parameters, seed=1):
    """The parameters with B drawn too, as after some training."""
    rng = np.random.default_rng(seed)

    def draw(path, value):
        small = path[-1].key == "lora_b"
        return jnp.asarray(rng.normal(0, 0.1, value.shape), value.dtype) if small else value

    return jax.tree_util.tree_map_with_path(draw, parameters)


def written_out(parameters, scale):
    """The parameters of the plain model: W + scale A B, by einsum over plain letters."""
    letters = {"out": "lhdr,lre->lhde", "down": "lfr,lre->lfe", "gate": "ldr,lrf->ldf"}
    letters |= {"up": letters["gate"]}
    merged = jax.tree.map(lambda x: x, base_of(ADAPTED, parameters))
    for block, names in MATRICES.items():
        for name in names:
            module = parameters["layers"][block][name]
            a, b = module["lora_a"], module["lora_b"]
            update = jnp.einsum(letters.get(name, "ldr,lrhn->ldhn"), a, b)
            merged["layers"][block][name]["kernel"] = module["kernel"] + scale * update
    return merged


def test_all_seven_matrices_have_float32_adapters_and_nothing_else_is_trained():
    specs = parameter_specs(ADAPTED)
    trained = {path for path, spec in specs.items() if spec.trainable}
    assert trained == {
        f"layers.{block}.{name}.{part}"
        for block, names in MATRICES.items()
        for name in names
        for part in ("lora_a", "lora_b")
    }
    assert specs["layers.attention.out.lora_a"].shape == (2, 4, 8, 4)
    assert specs["layers.attention.key.lora_b"].shape == (2, 4, 2, 8)
    abstract = abstract_parameters(ADAPTED, "bfloat16")
    for part, dtype in ((adapters_of, "float32"), (base_of, "bfloat16")):
        assert {str(x.dtype) for x in jax.tree.leaves(part(ADAPTED, abstract))} == {dtype}


def test_adapters_are_split_like_their_base_and_the_rank_is_whole():
    specs = parameter_specs(ADAPTED)
    for path, spec in specs.items():
        if spec.adapter:
            base = specs[f"{path.rpartition('.')[0]}.kernel"].axes
            first = path.endswith("lora_a")
            own = spec.axes[:-1] if first else (spec.axes[0], *spec.axes[2:])
            assert own == (base[: len(own)] if first else ("layers", *base[-len(own) + 1 :]))
            assert spec.axes[-1 if first else 1] is None


def test_new_adapters_change_no_bit_of_the_logits():
    model, with_adapters = BIASED, adapted(BIASED, config_lib.LoRA(rank=3, scaling="rslora"))
    base, parameters = (random_parameters(c, 0, "float32") for c in (model, with_adapters))
    jax.tree.map(np.testing.assert_array_equal, base, base_of(with_adapters, parameters))
    before, after = make_model(model)(base)(TOKENS), make_model(with_adapters)(parameters)(TOKENS)
    np.testing.assert_array_equal(bits(after), bits(before))
    a = parameters["layers"]["attention"]["out"]["lora_a"]
    assert 0.9 * 32**-0.5 < np.abs(a).max() <= 32**-0.5  # uniform, as peft draws it


def test_logits_and_gradients_are_those_of_the_sum_of_both_matrices():
    parameters = trained_at_random(random_parameters(ADAPTED, 0, "float32"))
    batch = random_batch(0)
    scale = 6.0 / 4

    def own_loss(adapters):
        whole = merge_trees(adapters, base_of(ADAPTED, parameters))
        return plain_loss(whole, batch, ADAPTED)[0]

    def oracle(adapters):
        whole = jax.tree.map(lambda x: x, parameters)
        for block, names in MATRICES.items():
            for name in names:
                whole["layers"][block][name] |= adapters["layers"][block][name]
        return plain_loss(written_out(whole, scale), batch)[0]

    adapters = adapters_of(ADAPTED, parameters)
    loss, gradients = jax.jit(jax.value_and_grad(own_loss))(adapters)
    expected, wanted = jax.jit(jax.value_and_grad(oracle))(adapters)
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    for own, plain in zip(jax.tree.leaves(gradients), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(own, plain, atol=1e-6 * max(1e-2, float(abs(plain).max())) * 50)
        assert np.any(np.abs(plain) > 1e-5)


def test_adapters_of_full_rank_reach_the_loss_of_training_the_matrix_itself():
    """A layer [8, 6] learns another one from samples, by Adam for both; rank 6 is any matrix."""
    rngs = nnx.Rngs(0)
    layer, goal = (
        Linear({"embed": 8}, {"mlp": 6}, stddev=0.3, dtype="float32", rngs=rngs) for _ in range(2)
    )
    x = jax.random.normal(rngs.params(), (16, 8))
    target = goal(x) + 0.3 * jax.random.normal(rngs.params(), (16, 6))  # no layer reaches zero
    layer.add_adapter(6, 1.0, rngs)
    graph, whole = nnx.split(layer)

    def final_loss(trained, rest, rate):
        def loss(trained):
            return jnp.mean((nnx.merge(graph, {**rest, **trained})(x) - target) ** 2)

        optimizer = optax.adam(rate)

        def step(carry, _):
            trained, state = carry
            updates, state = optimizer.update(jax.grad(loss)(trained), state)
            return (optax.apply_updates(trained, updates), state), None

        start = (trained, optimizer.init(trained))
        (trained, _), _ = jax.jit(lambda s: jax.lax.scan(step, s, length=600))(start)
        return float(loss(dict(rest, **trained))), float(loss(start[0]))

    values = nnx.to_pure_dict(whole)
    parts = {"kernel": values["kernel"]}, {n: values[n] for n in ("lora_a", "lora_b")}
    full, begun = final_loss(*parts, 0.03)
    own, same = final_loss(*parts[::-1], 0.03)
    assert same == begun
    assert full < begun / 3
    assert own == pytest.approx(full, rel=0.01)


@pytest.mark.parametrize(("scaling", "scale"), [("standard", 32 / 16), ("rslora", 32 / 4)])
def test_the_scale_follows_alpha_and_rank(scaling, scale):
    model = adapted(MODEL, config_lib.LoRA(rank=16, scaling=scaling))
    assert model.adapter.scale == scale
    assert ModelConfig.from_json(model.to_json()) == model
    assert "adapter" not in MODEL.to_json()  # the fingerprint of models without stays


@pytest.mark.parametrize(
    ("targets", "found"),
    [
        (["layers.attention.query"], ["layers.attention.query"]),
        (["layers.mlp"], ["layers.mlp.down", "layers.mlp.gate", "layers.mlp.up"]),
        (["*.up.kernel", "*.key"], ["layers.attention.key", "layers.mlp.up"]),
    ],
)
def test_targets_are_patterns_of_matrices(targets, found):
    assert adapted(BIASED, config_lib.LoRA(rank=2, targets=targets)).adapter.targets == tuple(found)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"targets": ["layers.attn"]}, "no parameter of the model matches 'layers.attn'"),
        ({"targets": ["layers"]}, "names layers.attention.key_norm.scale, but adapters go with"),
        ({"targets": ["embedding"]}, "names embedding.table, but adapters go with the matrices"),
        ({"targets": ["head"]}, "names head.kernel, but adapters go with the matrices of the"),
        ({"targets": ["layers.0.mlp"]}, "names single layers, but adapters are in all of them"),
        ({"targets": ["*.bias"]}, "'*.bias' names no matrix, only layers.attention.key.bias"),
        ({"rank": 17}, "lora.rank 17 is over the smaller side of layers.attention.key (32 x 16)"),
    ],
)
def test_targets_and_ranks_that_do_not_fit_are_refused_in_one_line(settings, message):
    with pytest.raises(UserError, match=re.escape(message)) as error:
        adapted(BIASED, config_lib.LoRA(**{"rank": 2, **settings}))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": {"alpha": 3.0}}, "lora: has no effect without a rank; set lora.rank"),
        ({"lora": {"rank": 4}, "model": {"param_dtype": "bfloat16"}}, "no effect with lora"),
        ({"checkpoint": {"save_base": True}}, "checkpoint.save_base has no effect without"),
        ({"lora": {"rank": -1}}, "lora.rank: Input should be greater than or equal to 0"),
        ({"lora": {"rank": 4, "dropout": 0.1}}, "unknown key 'dropout' in lora"),
    ],
)
def test_settings_without_effect_are_refused(values, message):
    with pytest.raises(UserError, match=re.escape(message)):
        make_config(values)
