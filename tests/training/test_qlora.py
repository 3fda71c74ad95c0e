"""Training beside a quantised base: what is computed, changed and kept, and how it is split."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from moi_jax import config as config_lib
from moi_jax.accounting.hlo import parse_module
from moi_jax.common.errors import UserError
from moi_jax.config.load import make_config
from moi_jax.models.decoder import make_model
from moi_jax.models.lora import adapted
from moi_jax.models.parameters import adapters_of, base_of, merge_trees, random_parameters
from moi_jax.models.quantized import dequantize
from moi_jax.models.quantized_base import quantized_base

from support.trainer import MODEL, Trainer, random_batch

# 64 divides the inputs of every matrix, also in halves.
WIDE = dataclasses.replace(MODEL, hidden_size=256, num_heads=4, head_dim=32, mlp_width=192)
NF4 = adapted(WIDE, config_lib.LoRA(rank=4, base_dtype="nf4"))
TOKENS = jnp.asarray(random_batch(0).tokens)


def dequantized(config, parameters):
    """The parameters of the plain model whose matrices are the values of the codes."""
    base = random_parameters(config.base, 0, "float32")
    for block in ("attention", "mlp"):
        for name, module in parameters["layers"][block].items():
            if "codes" in module:
                kernel = base["layers"][block][name]["kernel"]
                layers = zip(module["codes"], module["absmax"], strict=True)
                scheme = config.adapter.quantization
                values = jnp.stack([dequantize(scheme, *layer) for layer in layers])
                base["layers"][block][name]["kernel"] = values.reshape(kernel.shape)
    return base


def test_first_logits_are_those_of_the_dequantised_base_bit_for_bit():
    parameters = random_parameters(NF4, 0, "float32")
    plain = dequantized(NF4, parameters)
    np.testing.assert_array_equal(
        make_model(NF4)(parameters)(TOKENS), make_model(WIDE)(plain)(TOKENS)
    )


def test_gradients_of_adapters_are_those_beside_the_dequantised_base():
    plain = NF4.unquantized
    parameters = random_parameters(NF4, 0, "float32")
    adapters = jax.tree.map(lambda x: x + 0.01, adapters_of(NF4, parameters))

    def gradients(config, base):
        bind = make_model(config)
        return jax.jit(
            jax.grad(lambda a: jnp.sum(bind(merge_trees(a, base))(TOKENS)[..., 3] ** 2))
        )(adapters)

    own = gradients(NF4, base_of(NF4, parameters))
    wanted = gradients(plain, dequantized(NF4, parameters))
    for one, other in zip(jax.tree.leaves(own), jax.tree.leaves(wanted), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-6 * float(abs(other).max()))
        assert np.any(other)


def test_training_changes_adapters_alone_and_no_code():
    trainer = Trainer({"fsdp": 1}, model=NF4)
    before = trainer.parameters()
    for seed in range(3):
        trainer.step(random_batch(seed))
    after = trainer.parameters()
    jax.tree.map(np.testing.assert_array_equal, base_of(NF4, before), base_of(NF4, after))
    changed = jax.tree.map(
        lambda old, new: np.any(old != new), *(adapters_of(NF4, t) for t in (before, after))
    )
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("width", [256, 192])  # a half of 192 is a block and a half
def test_losses_do_not_depend_on_the_mesh(width):
    model = dataclasses.replace(NF4, hidden_size=width)

    def losses(mesh, **settings):
        trainer = Trainer(mesh, model=model, **settings)
        return np.array([trainer.step(random_batch(step % 2))["loss"] for step in range(5)])

    one = losses({"fsdp": 1})
    split = losses({"fsdp": 2, "tensor": 2}, microbatch_rows=4, remat="full")
    np.testing.assert_allclose(split[0], one[0], rtol=0, atol=5e-6)
    np.testing.assert_allclose(split, one, rtol=0, atol=2e-5)


def test_the_compiled_step_holds_no_stack_of_dequantised_matrices():
    trainer = Trainer({"fsdp": 1}, model=NF4)  # without remat, which would keep less
    module = parse_module(trainer.lower(random_batch(0)).compile().as_text())
    shapes = {
        instruction.shape.split("{")[0]
        for computation in module.computations.values()
        for instruction in computation.values()
    }
    assert "u8[2,128,192]" in shapes  # the check can find a stack
    # Of gate and up, down, query and its flat form: no activation of 128 tokens has these shapes.
    stacks = {"f32[2,256,192]", "f32[2,192,256]", "f32[2,256,4,32]", "f32[2,256,128]"}
    assert not shapes & stacks


def test_a_base_is_quantised_by_layer_and_has_the_same_codes_in_any_dtype():
    base = random_parameters(WIDE, 0, "bfloat16")
    wide = jax.tree.map(lambda x: x.astype(jnp.float32), base)
    mesh = Trainer({"fsdp": 2, "tensor": 2}, model=NF4).mesh
    own = quantized_base(NF4, flatten_dict(base, sep=".").items(), "bfloat16", None)
    other = quantized_base(NF4, flatten_dict(wide, sep=".").items(), "float32", mesh)
    for block in ("attention", "mlp"):
        for name, module in own["layers"][block].items():
            for part in ("codes", "absmax"):
                np.testing.assert_array_equal(module[part], other["layers"][block][name][part])
    codes = other["layers"]["mlp"]["up"]["codes"]
    assert codes.sharding.shard_shape(codes.shape) == (2, 128 // 2, 192 // 2)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora": {"base_dtype": "nf4"}}, "lora: has no effect without a rank"),
        (
            {"lora": {"rank": 4, "base_dtype": "int8"}, "checkpoint": {"save_base": True}},
            "checkpoint.save_base cannot save a base in int8; remove it",
        ),
        ({"lora": {"rank": 4, "base_dtype": "int4"}}, "lora.base_dtype"),
    ],
)
def test_settings_that_do_not_fit_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        make_config(values)


def test_blocks_that_do_not_divide_a_matrix_are_refused_by_its_name():
    with pytest.raises(UserError, match=r"do not divide the 32 of layers\.attention\.key\.kernel"):
        adapted(MODEL, config_lib.LoRA(rank=4, base_dtype="nf4"))
    assert adapted(MODEL, config_lib.LoRA(rank=4, base_dtype="int8")).adapter.quantization == "int8"
