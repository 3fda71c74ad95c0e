"""Training adapters: what a step changes and computes, and how it is split."""

import jax
import numpy as np
import pytest

from moi_jax import config as config_lib
from moi_jax.accounting.hlo import parse_module
from moi_jax.models.lora import adapted
from moi_jax.models.parameters import (
    abstract_parameters,
    adapters_of,
    base_of,
    parameter_specs,
)
from moi_jax.training.optimizer import make_optimizer

from support.trainer import MODEL, OPTIMIZER, Trainer, random_batch

ADAPTED = adapted(MODEL, config_lib.LoRA(rank=4))
# All ways to split a model at once.
SPLIT = dict(mesh={"fsdp": 2, "tensor": 2, "context": 2}, microbatch_rows=4, remat="full")
# What an instruction may have of the size of a frozen matrix: itself, and its way into a loop.
PASSED_ON = ("parameter", "tuple", "get-tuple-element", "while", "copy", "bitcast", "constant")


def adapted_trainer(mesh=None, **settings):
    return Trainer(mesh or {"fsdp": 1}, model=ADAPTED, **settings)


def test_training_changes_adapters_alone():
    trainer = adapted_trainer()
    before = trainer.parameters()
    first = trainer.step(random_batch(0))["loss"]
    assert Trainer({"fsdp": 1}).step(random_batch(0))["loss"] == first  # that of the base
    for seed in (1, 2):
        trainer.step(random_batch(seed))
    after = trainer.parameters()
    jax.tree.map(np.testing.assert_array_equal, base_of(ADAPTED, before), base_of(ADAPTED, after))
    changed = jax.tree.map(
        lambda old, new: np.any(old != new), *(adapters_of(ADAPTED, t) for t in (before, after))
    )
    assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize("kind", ["adamw", "adafactor", "lion", "muon"])
def test_no_optimizer_keeps_a_moment_of_the_base(kind):
    optimizer = make_optimizer(OPTIMIZER.model_copy(update={"name": kind}), ADAPTED)
    abstract = abstract_parameters(ADAPTED, "bfloat16")
    state = jax.eval_shape(optimizer.init, adapters_of(ADAPTED, abstract))
    assert optimizer.trained.split(abstract)[0] == adapters_of(ADAPTED, abstract)
    base = {spec.shape for spec in parameter_specs(MODEL).values()}
    assert not {leaf.shape for leaf in jax.tree.leaves(state)} & base


def computed_shapes(trainer):
    """The shapes of all that the compiled step computes, but for what it passes on."""
    module = parse_module(trainer.lower(random_batch(0)).compile().as_text())
    return {
        instruction.shape.split("{")[0]
        for computation in module.computations.values()
        for instruction in computation.values()
        if instruction.opcode not in PASSED_ON
    }


def test_the_compiled_step_has_no_gradient_of_the_size_of_the_base():
    specs = parameter_specs(MODEL).values()
    base = {f"f32[{','.join(map(str, spec.shape))}]" for spec in specs if len(spec.shape) > 1}
    assert computed_shapes(Trainer({"fsdp": 1})) >= base  # the check can find them
    assert not computed_shapes(adapted_trainer()) & base


def test_20_losses_in_float64_do_not_depend_on_mesh_remat_and_accumulation():
    def losses(mesh, **settings):
        trainer = adapted_trainer(mesh, dtype="float64", **settings)
        return np.array([trainer.step(random_batch(step % 2))["loss"] for step in range(20)])

    with jax.enable_x64(True):
        one, split = losses({"fsdp": 1}), losses(**SPLIT)
    assert one.dtype == np.float64
    assert one[-1] < one[0] - 1e-3
    np.testing.assert_allclose(split, one, rtol=0, atol=1e-9)


def test_adapters_and_their_moments_are_sharded_like_their_base():
    trainer = adapted_trainer({"fsdp": 4, "tensor": 2})
    query = trainer.state.parameters["layers"]["attention"]["query"]
    a, b = query["lora_a"], query["lora_b"]  # [L, D, r] and [L, r, H, N]
    assert a.sharding.shard_shape(a.shape) == (2, 32 // 4, 4)
    assert b.sharding.shard_shape(b.shape) == (2, 4, 4 // 2, 8)
    moments = [x for x in jax.tree.leaves(trainer.state.opt_state) if x.shape == a.shape]
    assert moments
    assert all(x.sharding.is_equivalent_to(a.sharding, a.ndim) for x in moments)
