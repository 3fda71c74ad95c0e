"""Every config of configs/topologies fits its devices: mesh, rows and memory, by arithmetic.

`python -m moi_jax.plan` compiles the step and shows what it really needs, see docs/plan.md.
"""

import itertools
import math

import jax.numpy as jnp
import pytest
from jax.sharding import AbstractMesh

from moi_jax.config.load import load_config
from moi_jax.models.parameters import parameter_specs
from moi_jax.models.presets import preset
from moi_jax.parallel.axes import MESH_AXES
from moi_jax.parallel.placing import batch_shards, named_sharding

from support.runs import ROOT

DIRECTORY = ROOT / "configs" / "topologies"
# Memory of a device in GB, with its public source.
MEMORY = {
    "v5e": 16,  # docs.cloud.google.com/tpu/docs/v5e
    "v5p": 95,  # docs.cloud.google.com/tpu/docs/v5p
    "v6e": 32,  # docs.cloud.google.com/tpu/docs/v6e
    "gpu": 80,  # the H100 and A100 data sheets on nvidia.com
}
# Config -> kind of device and the axes of the topology.
TOPOLOGIES = {
    "v5e_4x8": ("v5e", (4, 8)),
    "v5p_2x2x2": ("v5p", (2, 2, 2)),
    "v5p_4x4x4": ("v5p", (4, 4, 4)),
    "v6e_4x4": ("v6e", (4, 4)),
    "h100_8": ("gpu", (8,)),
    "gpu_80gb_1": ("gpu", (1,)),
}
HEADROOM = 0.15  # for what is not counted, such as gathered layers and fragmentation


def test_every_config_has_a_topology():
    assert {path.stem for path in DIRECTORY.glob("*.yaml")} == TOPOLOGIES.keys()


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_mesh_is_that_of_the_topology(name):
    """jax lays an axis of the mesh over whole axes of a TPU's torus, and splits none of them."""
    mesh, (_, torus) = load_config(DIRECTORY / f"{name}.yaml").mesh, TOPOLOGIES[name]
    sizes = [getattr(mesh, axis) for axis in MESH_AXES]
    assert math.prod(sizes) == math.prod(torus)
    axes = range(len(sizes))
    assignments = itertools.product(axes, repeat=len(torus))
    laid_out = (
        [math.prod(n for n, a in zip(torus, chosen, strict=True) if a == axis) for axis in axes]
        for chosen in assignments
    )
    assert sizes in laid_out


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_rows_divide_and_the_step_fits_the_memory(name):
    config = load_config(DIRECTORY / f"{name}.yaml")
    mesh = AbstractMesh(tuple(getattr(config.mesh, axis) for axis in MESH_AXES), MESH_AXES)
    rows = config.train.microbatch_rows
    assert config.train.global_batch_rows % rows == 0
    assert rows % batch_shards(mesh) == 0
    needed = step_bytes(config, mesh)
    assert needed < MEMORY[TOPOLOGIES[name][0]] * 1e9 * (1 - HEADROOM), f"{needed / 1e9:.1f} GB"


def test_qwen_7b_does_not_fit_one_80_gb_device():
    """As configs/topologies/gpu_80gb_1.yaml says: parameters, moments and gradients alone."""
    parameters = parameter_count(preset("qwen-7b"), alone())
    assert round(parameters * (4 + 4 + 4 + 4) / 1e9) == 124
    assert round(parameters * (2 + 2 + 4 + 4) / 1e9) == 93


def test_the_arithmetic_refuses_what_the_compiler_refused():
    """Qwen2.5-3B on one device of 80 GB: the compiler of libtpu asks for 84 GB."""
    config = load_config(DIRECTORY / "gpu_80gb_1.yaml", ["model.preset=qwen2.5-3b"])
    assert step_bytes(config, alone()) > 80e9 * (1 - HEADROOM)


def alone():
    return AbstractMesh((1, 1, 1, 1), MESH_AXES)


def step_bytes(config, mesh):
    """What a device holds at the peak of a step, without what is small beside it."""
    model, length = preset(config.model.preset), config.data.sequence_length
    rows = config.train.microbatch_rows // batch_shards(mesh)
    value = jnp.dtype(config.model.param_dtype).itemsize
    moments = jnp.dtype(config.optimizer.moment_dtype).itemsize + 4
    # Gradients of a microbatch, and their sum so far. XLA casts the parameters once for all layers.
    state = parameter_count(model, mesh) * (value + moments + 4 + 4 + 2)
    saved = 2 * model.num_layers * rows * length * model.hidden_size  # the inputs of the layers
    # Of one layer: the scores of the plain attention, their softmax, and its gradient.
    scores = 3 * 4 * rows * model.num_heads // mesh.shape["tensor"] * length**2
    return state + saved + scores


def parameter_count(model, mesh):
    """The parameters that a device of the mesh holds."""
    return sum(
        math.prod(named_sharding(p.axes, p.shape, mesh).shard_shape(p.shape))
        for p in parameter_specs(model).values()
    )
