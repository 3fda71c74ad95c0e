"""Compiles the train step of a config for a TPU slice, and shows the memory that it needs.

    pip install '.[plan]'
    python benchmarks/topologies.py configs/topologies/v5e_4x8.yaml v5e:4x8

No TPU is needed: the compiler of libtpu runs on this machine. Prints gigabytes a chip: the
arguments (parameters, moments, batch), the temporaries (gradients, activations), and their sum.
"""

import os
import sys

# Read when libtpu is loaded.
os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
}

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import Mesh

from moi_jax.config import Config
from moi_jax.config.load import load_config
from moi_jax.data.loader import Batch
from moi_jax.models.compute import Compute, resolve_dtype
from moi_jax.models.decoder import make_model
from moi_jax.models.presets import preset
from moi_jax.parallel.mesh import make_mesh
from moi_jax.parallel.placing import batch_sharding
from moi_jax.training.optimizer import make_optimizer, make_schedule
from moi_jax.training.state import abstract_state
from moi_jax.training.step import make_train_step


def main(path: str, topology: str) -> None:
    config = load_config(path)
    model = preset(config.model.preset)
    chips = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    mesh = make_mesh(config.mesh, chips)
    dtype = resolve_dtype(config.model.compute_dtype, "tpu")
    bind = make_model(model, Compute(dtype, config.model.remat))
    optimizer = make_optimizer(config.optimizer, model)
    schedule = make_schedule(config.optimizer, 1000)
    step = make_train_step(model, bind, optimizer, schedule, len(config.data.domains), mesh)
    state = abstract_state(model, optimizer, config.model.param_dtype, mesh)
    with jax.set_mesh(mesh):
        limit = jax.ShapeDtypeStruct((), jnp.float32)
        program = step.lower(state, abstract_batch(config, mesh), limit)  # type: ignore[attr-defined]
        memory = program.compile().memory_analysis()
    arguments, temporaries = memory.argument_size_in_bytes / 1e9, memory.temp_size_in_bytes / 1e9
    print(f"{path} on {topology}, in GB a chip:")
    print(f"{arguments:.1f} + {temporaries:.1f} = {arguments + temporaries:.1f}")


def abstract_batch(config: Config, mesh: Mesh) -> Batch:
    """Returns the shapes of a batch [A, M, S], as `place_batch` makes it."""
    rows = config.train.microbatch_rows or config.train.global_batch_rows
    shape = (config.train.global_batch_rows // rows, rows, config.data.sequence_length)
    types = {name: jnp.int32 for name in Batch._fields} | {"loss_weights": jnp.float32}
    sharding = batch_sharding(mesh)
    return Batch(**{n: jax.ShapeDtypeStruct(shape, t, sharding=sharding) for n, t in types.items()})


if __name__ == "__main__":
    main(*sys.argv[1:])
