"""The bytes that a device sends in the collectives of a train step, by arithmetic.

What fully sharded data parallelism and tensor parallelism need (Rajbhandari et al. 2020, ZeRO-3;
Shoeybi et al. 2019, Megatron-LM), in the amounts of `collectives.SENT`. A test compares it with
what the TPU's compiler makes of a step.
"""

import math

from jax.sharding import Mesh

from moi_jax.accounting.collectives import SENT
from moi_jax.accounting.layers import repeated_products
from moi_jax.accounting.memory import microbatch_rows
from moi_jax.config import Config
from moi_jax.models.config import ModelConfig
from moi_jax.models.flops import layer_matrix_size
from moi_jax.parallel.placing import batch_shards

HALF = 2  # bytes of a bfloat16


def step_traffic(config: Config, model: ModelConfig, mesh: Mesh) -> dict[str, float]:
    """Returns the bytes that a device sends in a step, by kind of collective.

    Weights are gathered in bfloat16, once forward and once backward, and their gradients are
    summed in bfloat16, for every microbatch.
    """
    shape = dict(mesh.shape)
    data, tensor = shape["data"], shape["tensor"]
    # Parameters are split over context as they are over fsdp.
    fsdp = shape["fsdp"] * shape.get("context", 1)
    rows = microbatch_rows(config)
    microbatches = config.train.global_batch_rows // rows
    weights = HALF * model.num_layers * layer_matrix_size(model) / tensor
    tokens = rows // batch_shards(mesh) * config.data.sequence_length // shape.get("context", 1)
    states = HALF * tokens * model.hidden_size  # of one layer, [B, S, D]
    # Two sums over tensor forward, two backward; one where the output projection is repeated.
    repeated = "out_proj" in repeated_products(model, config.model)
    layer_sums = (5 if repeated else 4) * model.num_layers
    operands = {
        # The loss gathers the final states of all rows, since it splits the vocabulary over fsdp.
        "all-gather": [(fsdp, 2 * weights / fsdp), (fsdp, states)],
        "reduce-scatter": [(fsdp, weights), (fsdp, 2 * states * fsdp)],
        # Of the lookup in the embedding, and of its gradient.
        "all-to-all": [(fsdp, states), (fsdp, states)],
        # With tensor: of every layer, of the lookup in float32, of the loss's gradient.
        "all-reduce": [
            (tensor, (layer_sums + 2 + fsdp) * states),
            (data, weights / fsdp),
        ],
    }
    return {
        kind: microbatches * math.fsum(SENT[kind](n) * size for n, size in parts)
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
    microbatches = config.train.global_batch_rows // microbatch_rows(config)
    weights = HALF * model.num_layers * layer_matrix_size(model) / shape["tensor"]
    if shape["data"] % slices == 0:
        fsdp = shape["fsdp"] * shape.get("context", 1)
        return microbatches * SENT["all-reduce"](slices) * weights / fsdp
    in_slice = math.prod(shape.values()) / slices
    return microbatches * 3 * SENT["all-to-all"](slices) * weights * shape["tensor"] / in_slice
