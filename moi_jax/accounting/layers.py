"""What a layer keeps for the backward pass, and what it computes again, by remat policy.

The products of a layer have the names of its tensors in models/remat.py. The input of the layer is
always kept, on the device or on the host.
"""

import dataclasses

from moi_jax.config.model import Model, RematTensor
from moi_jax.models.config import ModelConfig
from moi_jax.models.remat import remat_policy

INPUT: RematTensor = "decoder_layer_input"


@dataclasses.dataclass(frozen=True)
class Product:
    """The result of one product of a layer.

    Attributes:
      width: elements for each token.
      matrix: parameters of its matrix; 0 for attention.
      split: whether tensor parallelism splits it.
    """

    width: int
    matrix: int
    split: bool = True


def products(config: ModelConfig) -> dict[RematTensor, Product]:
    """Returns the products of a layer by name, but the last, which no backward pass reads."""
    c = config
    heads, kv_heads = c.num_heads * c.head_dim, c.num_kv_heads * c.head_dim
    mlp = c.hidden_size * c.mlp_width
    return {
        "query_proj": Product(heads, c.hidden_size * heads),
        "key_proj": Product(kv_heads, c.hidden_size * kv_heads),
        "value_proj": Product(kv_heads, c.hidden_size * kv_heads),
        "context": Product(heads, 0),
        "out_proj": Product(c.hidden_size, heads * c.hidden_size, split=False),
        "mlp_gate": Product(c.mlp_width, mlp),
        "mlp_up": Product(c.mlp_width, mlp),
    }


def repeated_products(config: ModelConfig, settings: Model) -> set[RematTensor]:
    """Returns the products that the backward pass computes again."""
    policy = remat_policy(settings.remat, settings.remat_tensors)
    if policy is None:
        return set()
    return set(products(config)) - policy.saved - policy.offloaded


def kept_width(config: ModelConfig, settings: Model, tensor: int) -> float:
    """Counts the elements that a layer keeps for each token on one device of `tensor`."""
    widths = _widths(config, tensor)
    policy = remat_policy(settings.remat, settings.remat_tensors)
    if policy is None:
        # Beside the products: both normed inputs, and silu(gate) and its product with up.
        return sum(widths.values()) + 2 * config.hidden_size + 2 * config.mlp_width / tensor
    return sum(widths[name] for name in {INPUT, *policy.saved} - policy.offloaded)


def offloaded_width(config: ModelConfig, settings: Model, tensor: int) -> float:
    """Counts the elements of a layer, for each token, that wait in the memory of the host."""
    policy = remat_policy(settings.remat, settings.remat_tensors)
    widths = _widths(config, tensor)
    return sum(widths[name] for name in policy.offloaded) if policy else 0


def _widths(config: ModelConfig, tensor: int) -> dict[RematTensor, float]:
    """Returns the elements of each named tensor for each token, on one device of `tensor`."""
    widths: dict[RematTensor, float] = {
        name: product.width / (tensor if product.split else 1)
        for name, product in products(config).items()
    }
    return widths | {INPUT: config.hidden_size}


def repeated_flops(config: ModelConfig, settings: Model, tokens: int, pairs: int) -> int:
    """Counts the operations that rematerialisation repeats in one step.

    Args:
      tokens, pairs: see `models.flops.step_flops`.
    """
    repeated = repeated_products(config, settings)
    token = 2 * tokens * sum(products(config)[name].matrix for name in repeated)
    attention = 2 * 2 * pairs * config.num_heads * config.head_dim * ("context" in repeated)
    return config.num_layers * (token + attention)
