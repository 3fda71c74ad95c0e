"""What a layer keeps for the backward pass, and what it computes again, by remat policy.

A layer has seven products whose results may be kept: the rotated query, key and value (kv), the
context that attention returns, the output projection (out), and the MLP's gate, up and down. The
input of the layer is always kept. The ladder of policies is that of MaxText (models/remat.py).
"""

import dataclasses

from moi_jax.models.config import ModelConfig

EVERYTHING = frozenset({"query", "kv", "context", "out", "gate", "up", "down"})
PROJECTIONS = EVERYTHING - {"context"}
KEPT: dict[str, frozenset[str]] = {
    "full": frozenset(),
    "save_qkv_proj": frozenset({"query", "kv"}),
    "save_dot_except_mlp": frozenset({"query", "kv", "out"}),
    "save_dot_with_context_except_mlp": frozenset({"query", "kv", "context", "out"}),
    "minimal": PROJECTIONS,
    "minimal_with_context": EVERYTHING,
    "none": EVERYTHING,
}
# Nothing in the backward pass of a layer needs its output, so that this is not computed again.
NEVER_AGAIN = frozenset({"down"})


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


def products(config: ModelConfig) -> dict[str, Product]:
    """Returns the products of a layer by name."""
    c = config
    heads, kv_heads = c.num_heads * c.head_dim, 2 * c.num_kv_heads * c.head_dim
    mlp = c.hidden_size * c.mlp_width
    return {
        "query": Product(heads, c.hidden_size * heads),
        "kv": Product(kv_heads, c.hidden_size * kv_heads),
        "context": Product(heads, 0),
        "out": Product(c.hidden_size, heads * c.hidden_size, split=False),
        "gate": Product(c.mlp_width, mlp),
        "up": Product(c.mlp_width, mlp),
        "down": Product(c.hidden_size, mlp, split=False),
    }


def kept_width(config: ModelConfig, remat: str, tensor: int) -> float:
    """Counts the elements that a layer keeps for each token on one device of `tensor`."""
    found = products(config)
    kept = sum(found[name].width / (tensor if found[name].split else 1) for name in KEPT[remat])
    if remat == "none":
        # Beside the products: both normed inputs, and silu(gate) and its product with up.
        kept += 2 * config.hidden_size + 2 * config.mlp_width / tensor
    return config.hidden_size + kept


def repeated_flops(config: ModelConfig, remat: str, tokens: int, pairs: int) -> int:
    """Counts the operations that rematerialisation repeats in one step.

    Args:
      tokens, pairs: see `models.flops.step_flops`.
    """
    found = products(config)
    repeated = EVERYTHING - KEPT[remat] - NEVER_AGAIN
    token = 2 * tokens * sum(found[name].matrix for name in repeated)
    attention = 2 * 2 * pairs * config.num_heads * config.head_dim * ("context" in repeated)
    return config.num_layers * (token + attention)
