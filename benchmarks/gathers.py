"""Which collectives the compiler of a TPU makes of sharded weights, by mesh.

    pip install '.[plan]'
    python benchmarks/gathers.py

No TPU is needed. A small model of four layers, two products each, is compiled forward and backward,
with weights that are split over fsdp and rows over data and fsdp. The script counts the collectives
in the compiled text.
"""

import os

from moi_jax.accounting.topology import described_devices, parse_topology, prepare_environment

os.environ["MOI_JAX_XLA_FLAGS"] = "off"
prepare_environment(compiles=True)

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moi_jax import config
from moi_jax.accounting.collectives import count_collectives
from moi_jax.parallel.axes import RULES
from moi_jax.parallel.mesh import make_mesh

LAYERS, WIDTH, MLP, ROW = 4, 3584, 1024, 256
ROWS = PartitionSpec(RULES["batch"])
# Topology, data, fsdp.
MESHES = (
    ("v5p:2x2x2", 1, 8),
    ("v5p:2x4x4", 1, 32),
    ("v5p:4x4x4", 1, 64),
    ("v5p:4x8x8", 1, 256),
    ("v5p:4x4x4", 4, 16),
    ("v5p:4x8x8", 8, 32),
)


def main() -> None:
    for topology, data, fsdp in MESHES:
        devices = described_devices(parse_topology(topology, slices=1))
        mesh = make_mesh(config.Mesh(data=data, fsdp=fsdp), devices)
        counts = ", ".join(f"{kind} {count}" for kind, count in collectives(mesh).items())
        print(f"{topology}, data {data} x fsdp {fsdp}: {counts}", flush=True)


def collectives(mesh: Mesh) -> dict[str, int]:
    """How often each kind of collective runs in a step of the small model."""
    by_width = NamedSharding(mesh, PartitionSpec(None, "fsdp"))
    by_rows = NamedSharding(mesh, ROWS)
    shapes = ((LAYERS, WIDTH, MLP), jnp.float32, by_width), (
        (mesh.size, ROW, WIDTH), jnp.bfloat16, by_rows,
    )  # fmt: skip
    arguments = [jax.ShapeDtypeStruct(s, t, sharding=where) for s, t, where in shapes]

    def layer(states: jax.Array, weights: jax.Array) -> tuple[jax.Array, None]:
        weights = weights.astype(jnp.bfloat16)
        wide = jax.lax.with_sharding_constraint(states @ weights, by_rows)
        return wide @ weights.T, None

    def loss(weights: jax.Array, states: jax.Array) -> jax.Array:
        return jnp.sum(jax.lax.scan(layer, states, weights)[0].astype(jnp.float32) ** 2)

    step = jax.jit(jax.grad(loss), out_shardings=by_width)
    found = count_collectives(step.lower(*arguments).compile().as_text())
    return {kind: values.count for kind, values in found.kinds.items()}


if __name__ == "__main__":
    main()
