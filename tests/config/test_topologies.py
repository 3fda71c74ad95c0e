"""Every config of configs/topologies fits its devices: mesh, rows and memory, by arithmetic.

`python -m moi_jax.plan` compiles the step and shows what it really needs, see docs/plan.md.
"""

import itertools
import math

import pytest

from moi_jax.accounting.plan import make_plan
from moi_jax.accounting.topology import parse_topology
from moi_jax.accounting.work import full_rows
from moi_jax.config.load import load_config
from moi_jax.models.parameters import parameter_specs
from moi_jax.models.presets import preset
from moi_jax.parallel.axes import MESH_AXES

from support.runs import ROOT

DIRECTORY = ROOT / "configs" / "topologies"
# Config -> chip and the axes of the topology.
TOPOLOGIES = {
    "v5e_4x8": ("v5e", (4, 8)),
    "v5p_2x2x2": ("v5p", (2, 2, 2)),
    "v5p_4x4x4": ("v5p", (4, 4, 4)),
    "v6e_4x4": ("v6e", (4, 4)),
    "h100_8": ("h100", (8,)),
    "gpu_80gb_1": ("h100", (1,)),
}
HEADROOM = 0.15  # for what is not counted, such as gathered layers and fragmentation


def test_every_config_has_a_topology():
    assert {path.stem for path in DIRECTORY.glob("*.yaml")} == TOPOLOGIES.keys()


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_the_mesh_is_that_of_the_topology(name):
    """An axis of the mesh takes whole axes of a TPU's torus, so that no two share a link."""
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
def test_the_step_fits_the_memory(name):
    config, (device, torus) = load_config(DIRECTORY / f"{name}.yaml"), TOPOLOGIES[name]
    topology = parse_topology(f"{device}:{'x'.join(map(str, torus))}", slices=1)
    plan = make_plan(config, preset(config.model.preset), topology, full_rows(config, "a test"))
    assert plan.peak_bytes < plan.hbm_bytes * (1 - HEADROOM), f"{plan.peak_bytes / 1e9:.1f} GB"


def test_qwen_7b_does_not_fit_one_80_gb_device():
    """As configs/topologies/gpu_80gb_1.yaml says: parameters, moments and gradients alone."""
    parameters = sum(math.prod(p.shape) for p in parameter_specs(preset("qwen-7b")).values())
    assert round(parameters * (4 + 4 + 4 + 4) / 1e9) == 124
    assert round(parameters * (2 + 2 + 4 + 4) / 1e9) == 93
