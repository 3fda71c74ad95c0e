"""The memory of one device in a train step, by arithmetic: what it is, by name.

Arguments are exact but for padding. Temporaries are an estimate; the compiler decides.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import traverse_util
from jax.sharding import Mesh

from moi_jax import config as config_lib
from moi_jax.accounting.layers import kept_width
from moi_jax.common.errors import UserError
from moi_jax.config import Config
from moi_jax.config.model import Model
from moi_jax.data.loader import Batch
from moi_jax.models.config import ModelConfig
from moi_jax.models.flops import layer_matrix_size
from moi_jax.models.loss import CHUNK_TOKENS
from moi_jax.models.trained import Trained, trained_parameters
from moi_jax.parallel.mesh import mesh_sizes
from moi_jax.parallel.placing import batch_sharding, batch_shards
from moi_jax.training.optimizer import make_optimizer
from moi_jax.training.state import TrainState, abstract_state


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Bytes a device of what goes into a step and stays: the state is updated in place.

    Attributes:
      frozen: those of the parameters that no step changes.
    """

    parameters: int
    optimizer: int
    batch: int
    frozen: int = 0

    @property
    def total(self) -> int:
        return self.parameters + self.optimizer + self.batch


def abstract_step(config: Config, model: ModelConfig, mesh: Mesh) -> tuple[TrainState, Batch]:
    """Returns shapes, dtypes and shardings of the state and of a batch [A, M, S]."""
    optimizer = make_optimizer(config.optimizer, model)
    state = abstract_state(model, optimizer, config.param_dtype, mesh)
    rows = microbatch_rows(config)
    shape = (config.train.global_batch_rows // rows, rows, config.data.sequence_length)
    types = {name: jnp.int32 for name in Batch._fields} | {"loss_weights": jnp.float32}
    sharding = batch_sharding(mesh)
    batch = Batch(
        **{n: jax.ShapeDtypeStruct(shape, t, sharding=sharding) for n, t in types.items()}
    )
    return state, batch


def microbatch_rows(config: Config) -> int:
    """Returns the rows of a microbatch, over all devices."""
    return config.train.microbatch_rows or config.train.global_batch_rows


def argument_bytes(state: TrainState, batch: Batch | None = None) -> Arguments:
    """Adds up what a device holds of the arguments of a step."""
    return Arguments(
        parameters=_device_bytes((state.trainable, state.frozen)),
        optimizer=_device_bytes((state.step, state.opt_state)),
        batch=_device_bytes(batch),
        frozen=_device_bytes(state.frozen),
    )


def temporary_bytes(
    config: Config, model: ModelConfig, mesh: Mesh, state: TrainState
) -> dict[str, int]:
    """Estimates what a device holds at the peak of a step beside the arguments, by name.

    Args:
      config: without `auto`, see `resolved.on_chip`.
    """
    tensor = mesh.shape["tensor"]
    length = config.data.sequence_length // mesh.shape.get("context", 1)
    rows = microbatch_rows(config) // batch_shards(mesh)
    tokens, value = rows * length, jnp.dtype(config.model.compute_dtype).itemsize
    wide = 4  # float32
    gradient = jnp.dtype(config.optimizer.gradient_dtype).itemsize
    trained = trained_parameters(model, config.optimizer.frozen)
    accumulates = microbatch_rows(config) < config.train.global_batch_rows
    of_all = kept_width(model, Model(remat="none"), tensor)
    # The plain attention keeps the scores of a layer, their softmax and its gradient.
    scores = 3 * wide * rows * model.num_heads // tensor * length * config.data.sequence_length
    return {
        "gradients": gradient * _gradient_elements(trained, model, state, accumulates),
        # The backward pass ends where nothing below is trained.
        "saved activations": _reaches_layers(trained)
        * int(value * model.num_layers * tokens * kept_width(model, config.model, tensor)),
        "one layer's activations": int(2 * value * tokens * of_all),
        "attention scores of a layer": scores if config.model.attention == "xla" else 0,
        "gathered weights of two layers": 2 * value * layer_matrix_size(model) // tensor,
        # Logits and their gradient; a chunk has so many tokens for each device.
        "logits of a chunk": 2 * wide * min(CHUNK_TOKENS, tokens // tensor) * model.vocab_size,
    }


def _gradient_elements(
    trained: Trained, model: ModelConfig, state: TrainState, accumulates: bool
) -> int:
    """Counts the elements of gradients on a device: of the trained part, also where they add up.

    A stack of which only some layers are trained is differentiated whole, once beside its part.
    """
    elements = 0.0
    for path, leaf in traverse_util.flatten_dict(state.trainable, sep=".").items():
        parts = trained.share(path, model.num_layers) * (2 if accumulates else 1)
        elements += _device_elements(leaf) * (parts + (path in trained.layers))
    return round(elements)


def _reaches_layers(trained: Trained) -> bool:
    """Whether the backward pass goes through the layers: something in or below them is trained."""
    return any(path.startswith(("layers.", "embedding.")) for path in trained.paths)


def kv_cache_bytes(model: ModelConfig, rows: int, length: int, tensor: int) -> int:
    """Counts the bytes of a bfloat16 KV cache of `rows` rows on one device of `tensor`.

    Heads that tensor does not divide are whole on each device.
    """
    heads = model.num_kv_heads
    heads = heads // tensor if heads % tensor == 0 else heads
    return 2 * 2 * model.num_layers * rows * length * heads * model.head_dim


def filled_mesh(config: config_lib.Mesh, devices: int, topology: str) -> dict[str, int]:
    """Returns the size of each axis of a mesh that uses all devices.

    Raises:
      UserError: the mesh does not fill them.
    """
    sizes = mesh_sizes(config, devices, topology)
    if math.prod(sizes.values()) != devices:
        raise UserError(
            f"mesh {sizes} does not fill the {devices} devices of {topology}; set axes whose "
            f"product is {devices}, one of them may be -1"
        )
    return sizes


def _device_bytes(tree: Any) -> int:
    return sum(_device_elements(leaf) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def _device_elements(leaf: jax.ShapeDtypeStruct) -> int:
    assert leaf.sharding is not None
    return math.prod(leaf.sharding.shard_shape(leaf.shape))
