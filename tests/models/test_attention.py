"""Attention inside segments: a slow oracle, and invariant I3 (no segment sees another one)."""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moi_jax.checkpoints.hf.reader import read_published
from moi_jax.models import rotary
from moi_jax.models.attention.xla import xla_attention
from moi_jax.models.decoder import make_model
from moi_jax.models.parameters import random_parameters
from moi_jax.models.presets import PRESETS

CONFIG = dataclasses.replace(
    PRESETS["tiny"], num_layers=2, num_heads=4, num_kv_heads=2, head_dim=16, vocab_size=97,
    hidden_size=32, mlp_width=48, seq_length=16, initializer_range=0.3,
)  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return make_model(CONFIG)(random_parameters(CONFIG, 0, jnp.float32))


@partial(jax.jit, static_argnames="extend_context")
def forward(model, tokens, segment_ids, extend_context):
    positions = rotary.segment_positions(segment_ids)
    hidden = model.hidden_states(tokens, positions, segment_ids, extend_context=extend_context)
    return model.logits(hidden)


def plain_attention(query, key, value, segment_ids):
    """Computes attention token by token and head by head, in float64."""
    b, s, h, n = query.shape
    group = h // key.shape[2]
    out = np.zeros(query.shape)
    for row in range(b):
        for head in range(h):
            for i in range(s):
                seen = [j for j in range(i + 1) if segment_ids[row, j] == segment_ids[row, i]]
                scores = [
                    float(query[row, i, head] @ key[row, j, head // group]) / math.sqrt(n)
                    for j in seen
                ]
                weights = np.exp(np.array(scores) - max(scores))
                weights /= weights.sum()
                for weight, j in zip(weights, seen, strict=True):
                    out[row, i, head] += weight * value[row, j, head // group]
    return out


def test_attention_equals_a_plain_loop_with_grouped_heads_and_segments():
    rng = np.random.default_rng(0)
    query = rng.normal(size=(2, 9, 6, 4)).astype(np.float32)
    key, value = rng.normal(size=(2, 2, 9, 3, 4)).astype(np.float32)
    segment_ids = np.array([[1, 1, 1, 2, 2, 2, 2, 0, 0], [1, 2, 2, 2, 2, 2, 3, 3, 3]], np.int32)
    order = np.broadcast_to(np.arange(9, dtype=np.int32), (2, 9))
    ours = xla_attention(*map(jnp.asarray, (query, key, value, segment_ids, order)))
    plain = plain_attention(query, key, value, segment_ids)
    np.testing.assert_allclose(ours, plain, atol=1e-6)
    # The tokens of a row may be in any order: `order` alone decides what they see.
    mixed = rng.permutation(9)
    arrays = (query, key, value, segment_ids, order)
    ours = xla_attention(*(jnp.asarray(array[:, mixed]) for array in arrays))
    np.testing.assert_allclose(ours, plain[:, mixed], atol=1e-6)


@pytest.mark.parametrize("extend_context", [False, True])
def test_chunk_mask_hides_other_chunks(model, extend_context):
    """A change of any token outside a segment changes no bit inside it."""
    rng = np.random.default_rng(1)
    tokens = rng.integers(0, 97, (1, 14)).astype(np.int32)
    segment_ids = np.array([[1] * 5 + [2] * 6 + [0] * 3], np.int32)
    before = forward(model, tokens, segment_ids, extend_context)
    for inside in (slice(0, 5), slice(5, 11)):
        changed = rng.integers(0, 97, tokens.shape).astype(np.int32)
        changed[:, inside] = tokens[:, inside]
        after = forward(model, changed, segment_ids, extend_context)
        assert np.array_equal(before[:, inside], after[:, inside])
    # This is due to the mask: in one segment, later tokens do see earlier ones.
    one = np.ones_like(segment_ids)
    changed[:, 5:11] = tokens[:, 5:11]
    assert not np.array_equal(
        forward(model, tokens, one, extend_context)[:, 5:11],
        forward(model, changed, one, extend_context)[:, 5:11],
    )


@pytest.fixture(scope="module")
def golden_b(golden):
    config, parameters = read_published(golden / "B", None)
    return make_model(config)(parameters)


@pytest.mark.parametrize("lengths", [(30, 25, 9), (70, 40, 30), (130, 64)])
def test_a_segment_in_a_row_equals_the_segment_alone(golden_b, lengths):
    """I3 in training and inference. At inference NTK and log-n depend on the segment, not the row.

    The golden model B has seq_length 64; some of these segments and rows are longer.
    """
    model = golden_b
    rng = np.random.default_rng(2)
    total = sum(lengths)
    tokens = rng.integers(0, 512, (1, total)).astype(np.int32)
    segment_ids = np.repeat(np.arange(1, len(lengths) + 1), lengths)[None].astype(np.int32)
    whole = {t: forward(model, tokens, segment_ids, t) for t in (True, False)}
    starts = np.cumsum([0, *lengths])
    for start, end in zip(starts[:-1], starts[1:], strict=True):
        alone = tokens[:, start:end]
        np.testing.assert_allclose(
            whole[True][:, start:end],
            forward(model, alone, np.ones_like(alone), True),
            atol=2e-5,
        )
        np.testing.assert_allclose(
            whole[False][:, start:end], forward(model, alone, np.ones_like(alone), False), atol=2e-5
        )


def test_positions_restart_with_each_segment():
    segment_ids = jnp.array([[1, 1, 2, 2, 2, 0], [3, 3, 3, 1, 0, 0]])
    assert rotary.segment_positions(segment_ids).tolist() == [
        [0, 1, 0, 1, 2, 0],
        [0, 1, 2, 0, 0, 1],
    ]


def test_a_call_without_segments_is_one_segment_of_the_row(model):
    tokens = np.arange(40, dtype=np.int32)[None]
    explicit = model(tokens, positions=np.arange(40)[None], segment_ids=np.ones((1, 40), np.int32))
    assert np.array_equal(model(tokens), explicit)
