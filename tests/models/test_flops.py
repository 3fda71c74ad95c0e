"""The operations of a step: against XLA's own count, and pairs of attention against a mask."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moi_jax.config import LoRA
from moi_jax.models.decoder import make_model
from moi_jax.models.decoding import view_layers
from moi_jax.models.flops import causal_pairs, step_flops, usual_flops
from moi_jax.models.lora import adapted
from moi_jax.models.parameters import abstract_parameters, merge_trees
from moi_jax.models.presets import preset
from moi_jax.models.rotary import position_angles
from moi_jax.models.trained import trained_parameters

B, S = 2, 128
CONFIG = dataclasses.replace(
    preset("qwen2.5-7b"), vocab_size=1024, num_layers=3, hidden_size=256, num_heads=4,
    num_kv_heads=2, head_dim=64, mlp_width=704,
)  # fmt: skip


@pytest.mark.parametrize("rank", [0, 16])
def test_the_count_is_that_of_xla_for_unrolled_layers(rank):
    """XLA counts the body of a loop once, so that the layers are called one by one here."""
    config = adapted(CONFIG, LoRA(rank=rank))
    trained = trained_parameters(config)
    trainable, frozen = trained.split(abstract_parameters(config, jnp.float32))
    bind = make_model(config)
    ones = jnp.ones((B, S), jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(S), (B, S))

    def loss(trainable, frozen):
        parameters = merge_trees(trainable, frozen)
        model, layers = view_layers(config, parameters, jnp.float32).bind(bind, parameters)
        angles = position_angles(config, positions, None, jnp.float32, log_n=False)
        x = model.embedding(ones, jnp.float32)
        for layer in layers:
            x, _ = layer(x, angles, ones, positions)
        return jax.nn.logsumexp(model.logits(model.final_norm(x)), axis=-1).sum()

    by_xla = jax.jit(jax.grad(loss)).lower(trainable, frozen).cost_analysis()["flops"]
    # xla_attention computes all pairs, and the loss above takes all logits.
    ours = step_flops(config, tokens=B * S, pairs=B * S * S, loss_tokens=B * S)
    assert ours.total == pytest.approx(by_xla, rel=0.03)


def test_pairs_are_those_of_the_mask():
    rng = np.random.default_rng(0)
    lengths = rng.integers(0, 40, 20)
    segments = np.repeat(np.arange(20), lengths)
    places = np.arange(len(segments))
    mask = (segments[:, None] == segments) & (places[:, None] >= places)
    assert causal_pairs(lengths) == mask.sum()


def test_the_usual_count_is_written_out_for_qwen2_5_7b():
    config = preset("qwen2.5-7b")
    # D 3584, L 28, H 28, K 4, N 128, F 18944, V 152064: 6.53e9 in layers, 0.545e9 in the head.
    layers = 28 * (3584 * 128 * (28 + 4 + 4 + 28) + 3 * 3584 * 18944)
    flops = usual_flops(config, rows=8, sequence_length=4096)
    assert flops.matmuls == 6 * layers * 8 * 4096
    assert flops.head == 6 * 3584 * 152064 * 8 * 4096
    # PaLM's 12 L H N S for each token, halved.
    assert flops.attention == 12 * 28 * 28 * 128 * 4096 * 8 * 4096 // 2
    assert flops.total == flops.matmuls + flops.head + flops.attention
