"""The floating-point operations of a train step, counted from the shapes of the model.

A multiplication with its addition is two operations. Only matrix products count: norms, rotary
embeddings, softmax and the optimizer are left out, as in every published figure. Two counts are in
use here, and both leave out what rematerialisation computes again:

* useful: the tokens of segments, the (query, key) pairs that attention uses in them, and the logits
  of the tokens with loss. Padding, masked pairs and the logits of prompts are no use.
  `step_flops(config, tokens, causal_pairs(segment_lengths), loss_tokens)`.
* usual: every position of every row with its logits, and causal attention over whole rows, whatever
  is packed in them. That is the count of MaxText (`calculate_tflops_training_per_device` in
  maxtext_utils.py), which halves the attention of PaLM (Chowdhery et al. 2022, appendix B:
  6 N + 12 L H N S a token) because the mask is causal.
  `usual_flops(config, rows, sequence_length)`.
"""

import dataclasses

import numpy as np

from moi_jax.models.config import ModelConfig
from moi_jax.models.parameters import parameter_specs

# A forward pass, and a backward pass of two products for each of its products: one for the
# gradient of the input, one for that of the parameter (Kaplan et al. 2020, section 2.1).
PASSES = 3
# Of a frozen matrix, which has no gradient.
FROZEN_PASSES = 2


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations by where they come from.

    Attributes:
      matmuls: the matrices of the layers, without the head.
      attention: scores and weighted values.
      head: the logits.
    """

    matmuls: int
    attention: int
    head: int

    @property
    def total(self) -> int:
        return self.matmuls + self.attention + self.head


def layer_matrix_size(config: ModelConfig) -> int:
    """Counts the parameters of the matrices of one layer: those that a token is multiplied with."""
    attention = 2 * config.num_heads + 2 * config.num_kv_heads  # query and out, key and value
    return config.hidden_size * (attention * config.head_dim + 3 * config.mlp_width)


def layer_adapter_size(config: ModelConfig) -> int:
    """Counts the parameters of the adapters of one layer."""
    sizes = [np.prod(p.shape) for p in parameter_specs(config).values() if p.adapter]
    return int(sum(sizes)) // config.num_layers


def step_flops(config: ModelConfig, tokens: int, pairs: int, loss_tokens: int) -> Flops:
    """Counts the operations of one train step, forward and backward.

    All parameters count as trained; where there are adapters, they alone do.

    Args:
      tokens: tokens of the whole batch that go through the model.
      pairs: (query, key) pairs that attention uses in the whole batch, see `causal_pairs`.
      loss_tokens: tokens of the whole batch whose logits are computed.
    """
    own = FROZEN_PASSES if config.adapter else PASSES
    matrices = own * layer_matrix_size(config) + PASSES * layer_adapter_size(config)
    # A product of the query with the key, and one of its weight with the value, of H heads each.
    pair = 2 * 2 * PASSES * pairs * config.num_heads * config.head_dim
    return Flops(
        matmuls=2 * tokens * config.num_layers * matrices,
        attention=pair * config.num_layers,
        head=2 * own * loss_tokens * config.hidden_size * config.vocab_size,
    )


def usual_flops(config: ModelConfig, rows: int, sequence_length: int) -> Flops:
    """Counts the operations of one train step as others publish them: full rows, S x S / 2 pairs.

    Args:
      rows: rows of the global batch, of `sequence_length` tokens each.
    """
    tokens = rows * sequence_length
    return step_flops(config, tokens, tokens * sequence_length // 2, tokens)


def causal_pairs(segment_lengths: np.ndarray) -> int:
    """Counts the (query, key) pairs of causal attention in segments of these lengths int[...].

    A segment of n tokens has n (n + 1) / 2 of them; a length of 0 has none.
    """
    lengths = np.asarray(segment_lengths, np.int64)
    return int((lengths * (lengths + 1) // 2).sum())
