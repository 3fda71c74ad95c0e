"""The context axis: rows are split evenly in work, and losses and answers stay the same."""

import re

import jax
import numpy as np
import pytest

import moi_jax
from moi_jax import config as config_lib
from moi_jax.common.errors import UserError
from moi_jax.data.loader import PackedInstruction, assemble
from moi_jax.parallel.context import check_sequence, context_order, context_places
from moi_jax.parallel.mesh import make_mesh
from moi_jax.parallel.placing import local_rows, place_batch, place_rows
from moi_jax.text.instructions import TARGETS, Instruction

from support.trainer import DOMAINS, LENGTH, ROWS, Trainer, random_batch

SPLIT = {"data": 2, "fsdp": 2, "context": 2}
MASKS = ("row", "chunk", "instruction")


@pytest.mark.parametrize("shards", [1, 2, 3, 8])
def test_every_shard_of_a_row_has_the_same_causal_work(shards):
    order = context_order(48, shards)
    assert sorted(order) == list(range(48))
    visible = order + 1  # the tokens that a token sees, itself among them
    assert len(set(visible.reshape(shards, -1).sum(axis=1))) == 1


def test_one_shard_keeps_the_order_of_the_row():
    assert context_order(6, 1).tolist() == [0, 1, 2, 3, 4, 5]


def test_places_find_the_tokens_of_a_row_that_is_padded():
    row = np.arange(100, 114)
    padded = np.pad(row, (0, 2))[context_order(16, 4)]
    np.testing.assert_array_equal(padded[context_places(14, 4)], row)


def test_a_row_that_cannot_be_cut_evenly_is_refused():
    mesh = make_mesh(config_lib.Mesh(fsdp=2, context=4), jax.devices())
    check_sequence(64, mesh, "data.sequence_length")
    message = "data.sequence_length 60 is not a multiple of 8: mesh.context 4 cuts each row"
    with pytest.raises(UserError, match=re.escape(message)):
        check_sequence(60, mesh, "data.sequence_length")


def test_each_device_holds_an_early_and_a_late_chunk_of_its_rows():
    mesh = make_mesh(config_lib.Mesh(**SPLIT), jax.devices())
    batch = random_batch(0)
    held = local_rows(ROWS, 4, mesh)
    placed = place_batch(batch, held, 4, mesh)
    chunks = batch.tokens.reshape(2, 4, 4, LENGTH // 4)  # A, M, the chunks of a row
    for shard in placed.tokens.addressable_shards:
        *_, context = np.argwhere(mesh.devices == shard.device)[0]
        rows = shard.index[1]
        expected = np.concatenate([chunks[:, rows, context], chunks[:, rows, 3 - context]], axis=-1)
        np.testing.assert_array_equal(shard.data, expected)


def test_rows_that_the_axis_does_not_divide_end_in_zeros():
    mesh = make_mesh(config_lib.Mesh(**SPLIT), jax.devices())
    tokens, lengths = np.arange(1, 57).reshape(4, 14), np.arange(4)
    placed, placed_lengths = jax.device_get(place_rows((tokens, lengths), mesh))
    assert placed.shape == (4, 16)
    np.testing.assert_array_equal(placed[:, context_places(14, 2)], tokens)
    assert placed.sum() == tokens.sum()
    np.testing.assert_array_equal(placed_lengths, lengths)


def packed_batch(mask, seed):
    """[ROWS, LENGTH]: groups of one to three instructions of 2 to 5 tokens, and padding."""
    rng = np.random.default_rng(seed)

    def instruction(domain):
        tokens = rng.integers(0, 64, rng.integers(2, 6)).astype(np.int32)
        answer = np.array([[1, len(tokens), TARGETS["assistant"]]], np.int32)
        weight = float(rng.uniform(0.1, 3))
        return PackedInstruction(Instruction(tokens, 0, answer, ""), domain, weight)

    def row():
        groups, used = [], 0
        while True:
            group = [instruction(int(rng.integers(DOMAINS))) for _ in range(rng.integers(1, 4))]
            used += sum(len(one.instruction.tokens) for one in group)
            if used > LENGTH:
                return groups
            groups.append(group)

    return assemble([row() for _ in range(ROWS)], LENGTH, 0, mask, "assistant")


@pytest.mark.parametrize("mask", MASKS)
def test_packed_rows_have_different_segments_under_each_mask(mask):
    ids = {other: packed_batch(other, 0).segment_ids for other in MASKS}
    assert sum(np.array_equal(ids[mask], other) for other in ids.values()) == 1


def test_losses_and_row_sums_of_packed_rows_are_those_of_one_device_under_every_mask():
    with jax.enable_x64(True):
        one, split = (Trainer(mesh, dtype="float64") for mesh in ({"fsdp": 1}, SPLIT))
        for step in range(9):
            batch = packed_batch(MASKS[step % 3], step)
            expected, found = one.step(batch), split.step(batch)
            assert expected["applied"]
            for name in ("loss", "grad_norm", "domain_nll", "tokens", "loss_tokens"):
                np.testing.assert_allclose(found[name], expected[name], rtol=0, atol=1e-9)
        short = type(batch)(*(array[:, : LENGTH - 2] for array in batch))
        for part, other in zip(split.row_sums(short), one.row_sums(short), strict=True):
            np.testing.assert_allclose(part, other, rtol=0, atol=1e-9)


def test_a_device_has_the_scores_of_its_own_queries_alone():
    with jax.enable_x64(True):
        trainer = Trainer(SPLIT, dtype="float64")
        with jax.set_mesh(trainer.mesh):
            batch, limit = trainer.place(random_batch(0)), np.float32(np.inf)
            text = trainer._step.lower(trainer.state, batch, limit).compile().as_text()
    # [2 rows, 2 KV heads, 2 query heads of each, queries, keys]
    assert f"f64[2,2,2,{LENGTH // 2},{LENGTH}]" in text
    assert f"f64[2,2,2,{LENGTH},{LENGTH}]" not in text


def test_the_state_is_split_over_the_context_axis_too():
    trainer = Trainer({"fsdp": 2, "context": 4})
    query = trainer.state.parameters["layers"]["attention"]["query"]["kernel"]  # [L, D, H, N]
    assert query.sharding.shard_shape(query.shape) == (2, 32 // 8, 4, 8)
    head = trainer.state.parameters["head"]["kernel"]  # [D, V]
    assert head.sharding.shard_shape(head.shape) == (32 // 8, 64)


def test_a_model_to_be_called_is_not_loaded_onto_a_mesh_that_splits_rows():
    mesh = make_mesh(config_lib.Mesh(**SPLIT), jax.devices())
    with pytest.raises(UserError, match="the mesh has context 2, but a model that is called takes"):
        moi_jax.load("no/such/run", mesh=mesh)
