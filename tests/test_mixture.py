"""Draws, groups, their order, and the repair of groups longer than a row."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moi_jax.data import mixture
from moi_jax.errors import UserError

from plan_helpers import corpora, data_section


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


@given(st.integers(1, 50), st.integers(0, 300), st.integers(0, 300), st.integers(0, 2**40))
def test_draws_are_one_endless_sequence_whose_counts_differ_by_at_most_one(n, start, count, seed):
    whole = mixture.draws(seed, 2, n, 0, start + count)
    np.testing.assert_array_equal(mixture.draws(seed, 2, n, start, count), whole[start:])
    counts = np.bincount(whole, minlength=n)
    assert len(counts) == n
    assert counts.max() - counts.min() <= 1


@pytest.mark.parametrize("n", [3, 65_535, 65_536, 70_000])
def test_draws_go_on_over_the_blocks_in_which_permutations_are_made(n):
    start = 65_536 // n * n - 1 if n < 65_536 else n - 1
    drawn = mixture.draws(0, 0, n, start, n + 1)
    assert sorted(drawn[1:]) == list(range(n))
    assert drawn[0] == mixture.draws(0, 0, n, start, 1)


def test_permutations_differ_between_cycles_domains_and_seeds():
    cycles = mixture.draws(0, 0, 100, 0, 300).reshape(3, 100)
    others = [mixture.draws(0, 1, 100, 0, 100), mixture.draws(1, 0, 100, 0, 100)]
    assert len({tuple(order) for order in [*cycles, *others]}) == 5
    # Also where every permutation is a block of its own.
    large = mixture.draws(0, 0, 70_000, 0, 140_000).reshape(2, -1)
    assert np.count_nonzero(large[0] == large[1]) < 10


def test_balanced_chunks_hold_the_next_draw_of_every_domain():
    data = data_section(2, sampling="balanced")
    second = mixture.draw_groups([5, 3], data, seed=7, epoch=1)
    np.testing.assert_array_equal(second[:, 0], mixture.draws(7, 0, 5, 5, 5))
    np.testing.assert_array_equal(second[:, 1], 5 + mixture.draws(7, 1, 3, 5, 5))


@pytest.mark.parametrize(("end", "chunks"), [("longest", 5), ("shortest", 3)])
def test_epoch_end_sets_the_number_of_balanced_chunks(end, chunks):
    data = data_section(2, sampling="balanced", epoch_end=end)
    assert mixture.draw_groups([5, 3], data, 0, 0).shape == (chunks, 2)


@given(corpora(), st.integers(1, 4), st.integers(0, 3))
def test_proportional_draws_every_instruction_once_an_epoch(corpus, chunk_size, epoch):
    counts = corpus.counts
    data = data_section(len(counts), sampling="proportional", chunk_size=chunk_size)
    groups = mixture.draw_groups(counts, data, 0, epoch)
    present = groups >= 0
    assert sorted(groups[present]) == list(range(sum(counts)))
    assert present[:-1].all()  # only the last group may be short, at its end
    assert present[-1, 0]
    assert not np.diff(present[-1].astype(int)).max(initial=0) > 0


def test_proportional_mixes_the_domains():
    data = data_section(2, sampling="proportional")
    stream = mixture.draw_groups([500, 500], data, 0, 0).ravel()
    assert 150 < np.count_nonzero(stream[:500] < 500) < 350


def test_balanced_refuses_a_domain_without_instructions_by_name():
    with pytest.raises(UserError, match="code"):
        mixture.draw_groups([3, 0], data_section(2, sampling="balanced"), 0, 0)
    with pytest.raises(UserError, match="no domain"):
        mixture.draw_groups([0, 0], data_section(2, sampling="proportional"), 0, 0)


# Domains of two instructions each: chat 0 1, code 2 3 (the default), maths 4 5.
@pytest.mark.parametrize(
    ("order", "expected"),
    [
        ("default_first", [[3, 0, 4], [2, 3, 1], [2, 5, -1]]),
        ("config", [[0, 3, 4], [1, 2, 3], [2, 5, -1]]),
    ],
)
def test_members_stand_in_the_order_asked_for_and_ties_keep_draw_order(order, expected):
    drawn = np.array([[4, 0, 3], [2, 1, 3], [5, 2, -1]])
    ordered = mixture.order_members(drawn, [2, 2, 2], data_section(3, order=order), 0, 0)
    assert ordered.tolist() == expected


def test_shuffled_order_gives_every_member_every_place():
    drawn = np.tile([0, 1, 2], (3000, 1))
    drawn[-1, 2] = -1
    ordered = mixture.order_members(drawn, [1, 1, 1], data_section(3, order="shuffled"), 0, 0)
    assert sorted(ordered[-1][:2]) == [0, 1]
    assert ordered[-1, 2] == -1
    for place in range(3):
        assert min(np.bincount(ordered[:-1, place])) > 850


def test_repair_swaps_a_long_instruction_to_a_short_partner():
    lengths = np.array([90, 10, 80, 20], np.int32)  # two of chat, two of code
    fixed = mixture.repair(np.array([[0, 2], [1, 3]]), lengths, 110, True, rng())
    assert sorted(map(sorted, fixed.members.tolist())) == [[0, 3], [1, 2]]
    assert fixed[1:] == (2, 0, 0)


def test_repair_takes_several_swaps_where_one_is_not_enough():
    lengths = np.array([90, 20, 20, 30, 5, 25, 30, 25, 5], np.int32)  # three domains of three
    members = np.array([[0, 3, 6], [1, 4, 7], [2, 5, 8]])
    fixed = mixture.repair(members, lengths, 100, True, rng())
    assert [0, 4, 8] in fixed.members.tolist()
    assert fixed.unplaced_groups == 0


def test_repair_without_columns_swaps_any_two_members():
    # Only 60 against 48 makes both groups fit.
    lengths = np.array([60, 50, 40, 48], np.int32)
    fixed = mixture.repair(np.array([[0, 1], [2, 3]]), lengths, 100, False, rng())
    assert sorted(map(sorted, fixed.members.tolist())) == [[0, 2], [1, 3]]


def test_repair_takes_any_partner_that_serves_not_always_the_shortest():
    lengths = np.array([90, 10, 11, 12, 13, 30, 5, 6, 7, 8], np.int32)
    members = np.arange(10).reshape(2, 5).T
    found = {
        mixture.repair(members, lengths, 100, True, rng(s)).members.tobytes() for s in range(9)
    }
    assert len(found) > 2


def test_repair_counts_what_fits_nowhere_and_leaves_it_out():
    lengths = np.array([100, 30, 8, 9], np.int32)
    fixed = mixture.repair(np.array([[0, 2], [1, 3]]), lengths, 100, True, rng())
    assert fixed.members[:, 0].tolist() == [1]
    assert fixed[2:] == (1, 2)


def test_groups_that_fit_are_not_touched():
    members = np.array([[0, 2], [1, 3]])
    fixed = mixture.repair(members, np.array([5, 6, 7, 8], np.int32), 14, True, rng())
    assert fixed.members is members
    assert fixed[1:] == (0, 0, 0)


@given(corpora(longest=64), st.integers(0, 5), st.booleans(), st.integers(1, 4))
def test_repaired_groups_fit_and_nothing_is_lost(corpus, seed, balanced, chunk_size):
    counts = corpus.counts
    chunk = {} if balanced else {"chunk_size": chunk_size}
    data = data_section(len(counts), sampling="balanced" if balanced else "proportional", **chunk)
    drawn = mixture.draw_groups(counts, data, seed, 0)
    fixed = mixture.repair(drawn, corpus.lengths, 64, balanced, rng(seed))
    assert (mixture.group_sizes(fixed.members, corpus.lengths) <= 64).all()
    kept = fixed.members[fixed.members >= 0]
    assert np.count_nonzero((fixed.members < 0).any(axis=1)) <= 1  # at most one short group
    assert len(kept) + fixed.unplaced_instructions == np.count_nonzero(drawn >= 0)
    assert len(fixed.members) + fixed.unplaced_groups == len(drawn)
    missing = np.bincount(drawn[drawn >= 0], minlength=sum(counts))
    missing -= np.bincount(kept, minlength=sum(counts))
    assert (missing >= 0).all()
    if balanced:
        columns = np.broadcast_to(np.arange(len(counts)), fixed.members.shape)
        np.testing.assert_array_equal(corpus.domain_of(fixed.members), columns)


@given(corpora(longest=40), st.integers(0, 5))
def test_no_long_group_is_left_out_that_a_single_swap_would_have_mended(corpus, seed):
    drawn = mixture.draw_groups(
        corpus.counts, data_section(len(corpus.counts), sampling="balanced"), seed, 0
    )
    sizes = mixture.group_sizes(drawn, corpus.lengths)
    lengths = corpus.lengths[drawn]
    mendable = False
    if np.count_nonzero(sizes > 64) == 1:
        long = sizes.argmax()
        for partner in np.flatnonzero(sizes <= 64):
            gains = lengths[long] - lengths[partner]
            mendable |= bool(((gains >= sizes[long] - 64) & (gains <= 64 - sizes[partner])).any())
    fixed = mixture.repair(drawn, corpus.lengths, 64, True, rng(seed))
    if mendable:
        assert fixed.unplaced_groups == 0
        assert fixed.moved == 2


@pytest.mark.parametrize("sampling", [{"sampling": "balanced"}, {"sampling": "proportional"}])
def test_partners_change_every_epoch(sampling):
    data = data_section(2, chunk_size=2, **sampling)
    pairs = [
        {tuple(sorted(pair)) for pair in mixture.draw_groups([200, 200], data, 0, epoch).tolist()}
        for epoch in range(2)
    ]
    assert len(pairs[0] & pairs[1]) < 10  # of 200; about one expected
