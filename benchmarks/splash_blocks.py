"""The memory of splash attention by block sizes, as the compiler of a TPU counts it.

    pip install '.[plan]'
    python benchmarks/splash_blocks.py

No TPU is needed. Compiles forward and backward of one row of 4,096 tokens, 28 query and 4 KV heads
of 128, with libtpu's default flags, and prints the MiB of temporaries (`temp_size_in_bytes`).
"""

import os

from moi_jax.accounting.topology import described_devices, parse_topology, prepare_environment

os.environ["MOI_JAX_XLA_FLAGS"] = "off"
prepare_environment(compiles=True)

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from moi_jax.config import SplashBlocks
from moi_jax.models.attention.splash import SplashAttention

ROW, HEADS, KV_HEADS, WIDTH = 4096, 28, 4, 128
TOPOLOGIES = ("v5p:2x2x1", "v6e:2x2", "v5e:2x2")
BLOCKS = {
    "512, 512, 512": SplashBlocks(**dict.fromkeys(SplashBlocks.model_fields, 512)),
    "1024, 1024, 512": SplashBlocks(),
    "1024, 1024, 512; backward 2048, 2048, 512": SplashBlocks(q_dkv=2048, kv_dkv=2048),
    "2048, 2048, 2048": SplashBlocks(**dict.fromkeys(SplashBlocks.model_fields, 2048)),
}


def main() -> None:
    for name, blocks in BLOCKS.items():
        found = ", ".join(f"{topology} {temporaries(blocks, topology)}" for topology in TOPOLOGIES)
        print(f"{name}: {found}", flush=True)


def temporaries(blocks: SplashBlocks, topology: str) -> str:
    """MiB of temporaries, or that the compiler finds no room."""
    attend = SplashAttention(blocks)

    def loss(query: jax.Array, key: jax.Array, value: jax.Array, ids: jax.Array) -> jax.Array:
        return jnp.sum(attend(query, key, value, ids, ids).astype(jnp.float32))

    one = SingleDeviceSharding(described_devices(parse_topology(topology, slices=1))[0])
    shapes = [(1, ROW, heads, WIDTH) for heads in (HEADS, KV_HEADS, KV_HEADS)]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=one) for shape in shapes]
    ids = jax.ShapeDtypeStruct((1, ROW), jnp.int32, sharding=one)
    lowered = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*arrays, ids)
    try:
        memory = lowered.compile().memory_analysis()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return "no room"
    return f"{memory.temp_size_in_bytes / 2**20:.0f}"


if __name__ == "__main__":
    main()
