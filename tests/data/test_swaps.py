"""Swaps: groups longer than a row are mended, rows are filled, and pairing stays random."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moi_jax.data.planning import mixture, packing, swaps
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.epoch import plan_epoch

from support.plans import corpora, data_section


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def mend(members: list, lengths: list, limit: int, same_column: bool = True, seed: int = 0) -> list:
    members, lengths = np.array(members), np.array(lengths, np.int32)
    return swaps.repair_groups(members, lengths, limit, same_column, rng(seed)).tolist()


def test_a_long_instruction_is_swapped_for_a_short_one_of_its_domain():
    # Two of chat, two of code.
    assert mend([[0, 2], [1, 3]], [90, 10, 80, 20], 110) in ([[0, 3], [1, 2]], [[1, 2], [0, 3]])


def test_several_swaps_where_one_is_not_enough():
    lengths = [90, 20, 20, 30, 5, 25, 30, 25, 5]  # three domains of three
    assert [0, 4, 8] in mend([[0, 3, 6], [1, 4, 7], [2, 5, 8]], lengths, 100)


def test_without_columns_any_two_members_are_swapped():
    # Only 60 against 48 makes both groups fit.
    fixed = mend([[0, 1], [2, 3]], [60, 50, 40, 48], 100, same_column=False)
    assert sorted(map(sorted, fixed)) == [[0, 2], [1, 3]]


def test_any_partner_that_serves_is_taken_not_always_the_shortest():
    lengths = [90, 10, 11, 12, 13, 30, 5, 6, 7, 8]
    members = np.arange(10).reshape(2, 5).T
    assert len({str(mend(members, lengths, 100, seed=seed)) for seed in range(9)}) > 2


def test_what_fits_nowhere_stays_too_long():
    fixed = np.array(mend([[0, 2], [1, 3]], [100, 30, 8, 9], 100))
    sizes = np.array([100, 30, 8, 9])[fixed].sum(axis=1)
    assert np.count_nonzero(sizes > 100) == 1


def test_groups_that_fit_are_not_touched():
    members = np.array([[0, 2], [1, 3]])
    assert (
        swaps.repair_groups(members, np.array([5, 6, 7, 8], np.int32), 14, True, rng()) is members
    )


@given(corpora(longest=40), st.integers(0, 5))
def test_no_group_stays_long_that_a_single_swap_would_have_mended(corpus, seed):
    data = data_section(len(corpus.counts), sampling="balanced")
    drawn = mixture.draw_groups(corpus, data, seed, 0)
    sizes = mixture.group_sizes(drawn, corpus.lengths)
    lengths = corpus.lengths[drawn]
    mendable = False
    if np.count_nonzero(sizes > 64) == 1:
        long = sizes.argmax()
        for partner in np.flatnonzero(sizes <= 64):
            gains = lengths[long] - lengths[partner]
            mendable |= bool(((gains >= sizes[long] - 64) & (gains <= 64 - sizes[partner])).any())
    fixed = swaps.repair_groups(drawn, corpus.lengths, 64, True, rng(seed))
    if mendable:
        assert (mixture.group_sizes(fixed, corpus.lengths) <= 64).all()
        assert np.count_nonzero(fixed != drawn) == 2


# The number of instructions, and the groups' width, by chance; many of few, so that copies meet.
@st.composite
def packed(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray, np.ndarray, int, bool]:
    """members, row_of, lengths, row length, same_column: best fit of groups without copies."""
    width, groups = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    same_column = draw(st.booleans())
    each = draw(st.integers(3, 40))
    lengths = np.array(
        draw(st.lists(st.integers(1, 30), min_size=width * each, max_size=width * each)), np.int32
    )
    member = st.integers(0, each - 1)
    columns = [draw(st.lists(member, min_size=groups, max_size=groups)) for _ in range(width)]
    members = np.array(columns).T + each * np.arange(width)
    limit = draw(st.integers(30 * width, 120 * width))
    sizes = mixture.group_sizes(members, lengths)
    return members, packing.best_fit(members, sizes, limit), lengths, limit, same_column


@given(packed(), st.integers(0, 3))
def test_filled_rows_lose_nothing_fit_hold_no_copies_and_are_no_more(case, seed):
    members, row_of, lengths, limit, same_column = case
    before = members
    members, now = swaps.fill_rows(members, row_of, lengths, limit, same_column, rng(seed))
    assert len(np.unique(now)) == now.max() + 1 <= row_of.max() + 1
    assert sorted(members.ravel()) == sorted(before.ravel())
    if same_column:
        np.testing.assert_array_equal(np.sort(members, axis=0), np.sort(before, axis=0))
    for row in range(now.max() + 1):
        standing = members[now == row].ravel()
        assert lengths[standing].sum() <= limit
        assert len(set(standing.tolist())) == len(standing)


def test_nothing_is_moved_where_no_row_is_saved():
    """Chunks of 60 in rows of 100: 40 % stays free, whatever is swapped."""
    lengths = np.full(80, 30, np.int32)
    members, row_of = np.arange(80).reshape(40, 2), np.arange(40)
    filled, now = swaps.fill_rows(members, row_of, lengths, 100, True, rng())
    assert filled is members
    assert now is row_of


def realistic(seed: int = 0) -> Corpus:
    """Four domains of very different sizes and lengths, a chunk about 620 tokens."""
    lengths = [
        np.clip(rng(seed).lognormal(np.log(median), 0.6, n), 16, 2000).astype(np.int32)
        for median, n in ((60, 1600), (110, 1200), (200, 6000), (160, 800))
    ]
    return Corpus.of(("chat", "code", "maths", "tools"), lengths, [d // 2 for d in lengths])


@pytest.mark.parametrize(("row", "fill"), [(2048, 0.99), (4096, 0.995), (8192, 0.995)])
def test_rows_of_whole_chunks_are_full(row, fill):
    plan = plan_epoch(realistic(), data_section(4, row), 0, 0)
    assert plan.fill >= fill
    assert plan.unplaced_groups == 0
    # Few instructions leave the chunk they were drawn for.
    assert plan.moved_instructions <= 0.1 * len(plan.instructions)


def test_partners_are_nearly_random():
    """The lengths of any two partners, in fifths: total variation from independence <= 0.06."""
    data = data_section(4, 2048, order="config")
    joint = np.zeros((4, 4, 5, 5))
    edges = [np.quantile(realistic().lengths[a:b], (0.2, 0.4, 0.6, 0.8)) for a, b in SPANS]
    for seed in range(10):
        plan = plan_epoch(realistic(), data, seed, 0)
        lengths = plan.corpus.lengths[plan.instructions.reshape(-1, 4)]
        fifths = [np.searchsorted(edges[d], lengths[:, d], side="right") for d in range(4)]
        for a in range(4):
            for b in range(a):
                np.add.at(joint[a, b], (fifths[a], fifths[b]), 1)
    for a in range(4):
        for b in range(a):
            share = joint[a, b] / joint[a, b].sum()
            independent = share.sum(1, keepdims=True) * share.sum(0, keepdims=True)
            assert np.abs(share - independent).sum() / 2 <= 0.06


SPANS = [(0, 1600), (1600, 2800), (2800, 8800), (8800, 9600)]


def chunk_sizes(corpus: Corpus, row: int) -> list[np.ndarray]:
    """The tokens of the chunks of each row that holds more than one."""
    plan = plan_epoch(corpus, data_section(4, row), 0, 0)
    sizes = np.add.reduceat(plan.corpus.lengths[plan.instructions], plan.group_starts[:-1])
    return [row for row in np.split(sizes, plan.row_starts[1:-1]) if len(row) > 1]


def test_a_long_chunk_stands_anywhere_in_its_row():
    """Best fit would put the longest chunk first, and swaps would shorten the first one."""
    rows = chunk_sizes(realistic(), 4096)
    first_is_longest = [row[0] == row.max() for row in rows]
    expected = np.mean([np.count_nonzero(row == row.max()) / len(row) for row in rows])
    assert np.mean(first_is_longest) == pytest.approx(expected, abs=0.05)


def test_the_first_chunk_of_a_row_is_as_long_as_the_last():
    rows = [row for row in chunk_sizes(realistic(), 2048) if len(set(row.tolist())) > 1]
    shorter = np.mean([row[0] < row[-1] for row in rows])
    longer = np.mean([row[0] > row[-1] for row in rows])
    assert shorter == pytest.approx(longer, abs=0.07)
