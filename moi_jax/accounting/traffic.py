"""The bytes that a device sends in a train step, by arithmetic: in collectives, and to the host.

What fully sharded data parallelism, tensor parallelism and context parallelism need (Rajbhandari et
al. 2020, ZeRO-3; Shoeybi et al. 2019, Megatron-LM; Dubey et al. 2024, Llama 3, section 3.3.2), in
the amounts of `collectives.SENT`. A test compares it with what the TPU's compiler makes of a step.

Every config here is without `auto`, see `resolved.on_chip`: weights, states and gradients travel in
its compute dtype.
"""

import math

import jax.numpy as jnp
from jax.sharding import Mesh

from moi_jax.accounting.collectives import SENT
from moi_jax.accounting.layers import offloaded_width, repeated_products
from moi_jax.accounting.memory import microbatch_rows
from moi_jax.config import Config
from moi_jax.models.config import ModelConfig
from moi_jax.models.flops import layer_adapter_size, layer_matrix_size
from moi_jax.parallel.placing import batch_shards

# Operands of one kind of collective: (devices of a group, bytes of the operand on each).
Operands = list[tuple[int, float]]


def step_traffic(config: Config, model: ModelConfig, mesh: Mesh) -> dict[str, float]:
    """Returns the bytes that a device sends in a step, by kind of collective.

    Weights are gathered once forward and once backward, and their gradients are summed, for every
    microbatch.
    """
    shape = dict(mesh.shape)
    data, tensor, context = shape["data"], shape["tensor"], shape.get("context", 1)
    fsdp = shape["fsdp"] * context  # parameters are split over context as they are over fsdp
    weights = _weight_bytes(config, model) / tensor
    gradients = _gradient_bytes(config, model) / tensor
    states = _token_bytes(config, mesh) * model.hidden_size  # of one layer, [B, S, D]
    keys = _key_bytes(config, model, mesh)
    # Two sums over tensor forward, two backward; one where the output projection is repeated.
    repeated = repeated_products(model, config.model)
    layer_sums = (5 if "out_proj" in repeated else 4) * model.num_layers
    # The gathered keys and values have no name, so that every policy but `none` gathers them again.
    key_gathers = 1 if config.model.remat == "none" else 2
    operands: dict[str, Operands] = {
        # The loss gathers the final states of all rows, since it splits the vocabulary over fsdp.
        "all-gather": [(fsdp, 2 * weights / fsdp), (fsdp, states), (context, key_gathers * keys)],
        "reduce-scatter": [(fsdp, gradients), (fsdp, 2 * states * fsdp), (context, keys * context)],
        # Of the lookup in the embedding, and of its gradient.
        "all-to-all": [(fsdp, states), (fsdp, states)],
        # With tensor: of every layer, of the lookup in float32, of the loss's gradient.
        "all-reduce": [
            (tensor, (layer_sums + 2 + fsdp) * states),
            (data, gradients / fsdp),
        ],
    }
    return {
        kind: _microbatches(config) * math.fsum(SENT[kind](n) * size for n, size in parts)
        for kind, parts in operands.items()
    }


def network_traffic(config: Config, model: ModelConfig, mesh: Mesh, slices: int) -> float:
    """Returns the bytes that a device sends in a step to other slices or nodes.

    The data axis lies over slices where they divide it: only gradients cross the network then.
    Otherwise all weights do, twice, each chip of a slice with its share of them.
    """
    if slices == 1:
        return 0
    shape = dict(mesh.shape)
    weights = _microbatches(config) * _weight_bytes(config, model)
    gradients = _microbatches(config) * _gradient_bytes(config, model)
    if shape["data"] % slices == 0:
        parts = math.prod(shape.values()) / shape["data"]
        return SENT["all-reduce"](slices) * gradients / parts
    in_slice = math.prod(shape.values()) / slices
    return SENT["all-to-all"](slices) * (2 * weights + gradients) / in_slice


def host_traffic(config: Config, model: ModelConfig, mesh: Mesh) -> float:
    """Returns the bytes of offloaded tensors that a device sends to its host and fetches again."""
    width = offloaded_width(model, config.model, mesh.shape["tensor"])
    tokens = _microbatches(config) * _token_bytes(config, mesh)
    return 2 * model.num_layers * tokens * width


def _microbatches(config: Config) -> int:
    return config.train.global_batch_rows // microbatch_rows(config)


def _weight_bytes(config: Config, model: ModelConfig) -> float:
    """Returns the bytes of the matrices of all layers."""
    return _value_bytes(config) * model.num_layers * layer_matrix_size(model)


def _gradient_bytes(config: Config, model: ModelConfig) -> float:
    """Returns the bytes of their gradients, or of those of their adapters, where these are."""
    trained = layer_adapter_size(model) if model.adapter else layer_matrix_size(model)
    return _value_bytes(config) * model.num_layers * trained


def _token_bytes(config: Config, mesh: Mesh) -> float:
    """Returns the bytes of one element for each token that a device has of a microbatch."""
    rows = microbatch_rows(config) // batch_shards(mesh)
    length = config.data.sequence_length // mesh.shape.get("context", 1)
    return _value_bytes(config) * rows * length


def _key_bytes(config: Config, model: ModelConfig, mesh: Mesh) -> float:
    """Returns the bytes of the keys and values of all layers that a device has of a microbatch.

    Where tensor splits the query heads but not the KV heads, each query head has a copy of its own.
    Where it splits neither, a device has all KV heads.
    """
    tensor, heads = mesh.shape["tensor"], model.num_kv_heads
    split = [count // tensor for count in (heads, model.num_heads) if count % tensor == 0]
    width = next(iter(split), heads) * model.head_dim
    return 2 * model.num_layers * _token_bytes(config, mesh) * width


def _value_bytes(config: Config) -> int:
    return jnp.dtype(config.model.compute_dtype).itemsize
