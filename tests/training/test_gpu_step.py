"""The whole train step, lowered for a GPU where there is none. Nothing is compiled or run."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from moi_jax.accounting.memory import abstract_step
from moi_jax.config.load import make_config
from moi_jax.models.attention.refusals import TOKAMAX, installed_tokamax
from moi_jax.models.compute import Compute
from moi_jax.models.decoder import make_model
from moi_jax.models.presets import preset
from moi_jax.models.remat import remat_policy
from moi_jax.parallel.mesh import make_mesh
from moi_jax.training.optimizer import make_optimizer, make_schedule
from moi_jax.training.step import make_train_step

MODEL = dataclasses.replace(
    preset("qwen2.5-7b"), vocab_size=1152, num_layers=3, hidden_size=256, num_heads=4,
    num_kv_heads=2, head_dim=64, mlp_width=1024,
)  # fmt: skip
ROWS, LENGTH = 4, 640  # no other dimension is as long as a row


def lowered_step(mesh_sizes, remat_tensors):
    from moi_jax.models.attention.mosaic_gpu import MosaicGpuAttention

    config = make_config(
        {
            "mesh": mesh_sizes,
            "train": {"global_batch_rows": 2 * ROWS, "microbatch_rows": ROWS, "steps": 10},
            "data": {"sequence_length": LENGTH},
        }
    )
    mesh = make_mesh(config.mesh, jax.devices())
    state, batch = abstract_step(config, MODEL, mesh)
    compute = Compute("bfloat16", remat_policy("full", remat_tensors), MosaicGpuAttention(mesh))
    optimizer, schedule = (
        make_optimizer(config.optimizer, MODEL),
        make_schedule(config.optimizer, 10),
    )
    step = make_train_step(MODEL, make_model(MODEL, compute), optimizer, schedule, 2, mesh)
    with jax.set_mesh(mesh):
        traced = step.trace(state, batch, jax.ShapeDtypeStruct((), jnp.float32))
        return traced.lower(lowering_platforms=("cuda",)).as_text()


@pytest.mark.skipif(
    installed_tokamax() != TOKAMAX,
    reason=f"lowering for a GPU needs tokamax {TOKAMAX}: pip install '.[mosaic]'",
)
@pytest.mark.parametrize(
    ("mesh", "remat_tensors", "forward"),
    # Full rematerialisation runs the forward kernel again in the backward pass.
    [({"fsdp": 1}, {}, 2), ({"fsdp": 2, "tensor": 2}, {"context": "save"}, 1)],
)
def test_its_attention_is_the_flash_kernel_in_both_passes(mesh, remat_tensors, forward):
    text = lowered_step(mesh, remat_tensors)
    # In the scan over layers, so once for all of them. The backward pass is two kernels.
    assert text.count("custom_call @mosaic_gpu") == forward + 2
    shapes = {tuple(dims.split("x")) for dims in re.findall(r"tensor<((?:\d+x)+)", text)}
    assert any(str(LENGTH) in shape for shape in shapes)
    assert not [shape for shape in shapes if shape.count(str(LENGTH)) > 1]
    # Logits are there in chunks only, and on a mesh the gradient of the head is split.
    vocabulary = str(MODEL.vocab_size)
    assert not [shape for shape in shapes if {str(LENGTH), vocabulary} <= set(shape)]
    if "tensor" in mesh:
        split = r'<@mesh, \[{}, {}, {"tensor", "fsdp"}\]> : tensor<1x256x1152xf32>'
        assert re.search(f"sharding_constraint .*{split}", text)
