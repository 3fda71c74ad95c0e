"""What no group can hold is left out alone and before drawing; too much of it stops the run."""

from itertools import pairwise, permutations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.epoch import plan_epoch
from moi_jax.data.planning.placeable import check_placeable, log_left_out, placeable
from moi_jax.data.planning.swaps import long_with_short

from support.plans import corpora, corpus_of, data_section


def only(corpus: Corpus, kept: np.ndarray) -> Corpus:
    """The corpus of the instructions that are kept."""
    return corpus_of([
        lengths[mine].tolist()
        for lengths, mine in zip(
            np.split(corpus.lengths, corpus.offsets[1:-1]),
            np.split(kept, corpus.offsets[1:-1]),
            strict=True,
        )
    ])  # fmt: skip


@given(corpora(longest=64), st.sampled_from([32, 48, 64, 80]))
def test_an_instruction_that_fits_with_no_partners_is_left_out(corpus, row):
    data = data_section(len(corpus.names), row, sampling="balanced")
    domains = [lengths.tolist() for lengths in np.split(corpus.lengths, corpus.offsets[1:-1])]
    shortest = list(map(min, domains))
    fits = [
        length + sum(shortest) - shortest[domain] <= row
        for domain, lengths in enumerate(domains)
        for length in lengths
    ]
    if sum(shortest) > row:
        with pytest.raises(UserError, match="no group of instructions fits a row of"):
            placeable(corpus, data)
    else:
        assert not placeable(corpus, data)[~np.array(fits)].any()


def test_the_long_one_is_left_out_and_its_partners_stay():
    corpus = corpus_of([[10, 95, 12, 11], [10, 11, 12, 90]])
    kept = placeable(corpus, data_section(2, 100, sampling="balanced"))
    assert kept.tolist() == [True, False, True, True, True, True, True, True]


def test_where_short_partners_are_few_the_fewest_long_ones_are_left_out():
    """19 of 20 chats have 700 tokens: of the long codes only the one with the short chat fits."""
    corpus = corpus_of([[700] * 19 + [500], [100] * 16 + [400] * 4])
    kept = placeable(corpus, data_section(2, 1000, sampling="balanced"))
    assert kept[:20].all()
    assert np.count_nonzero(kept[20:]) in (16, 17)


@given(corpora(longest=48), st.integers(0, 3))
def test_what_is_kept_is_drawn_evenly_and_placed(corpus, seed):
    data = data_section(len(corpus.names), 64, sampling="balanced")
    assume(sum(min(d) for d in np.split(corpus.lengths, corpus.offsets[1:-1])) <= 64)
    kept = placeable(corpus, data)
    corpus, total = only(corpus, kept), np.zeros(np.count_nonzero(kept), int)
    unplaced = 0
    for epoch in range(3):
        plan = plan_epoch(corpus, data, seed, epoch)
        total += np.bincount(plan.instructions, minlength=len(total))
        unplaced += plan.unplaced_groups
    for start, end in pairwise(corpus.offsets):
        assert total[start:end].max() - total[start:end].min() <= 1 + unplaced


@given(st.lists(st.tuples(st.integers(1, 99), st.integers(1, 99)), min_size=1, max_size=6))
def test_two_columns_are_matched_as_well_as_any_matching(pairs):
    lengths = np.array(pairs)
    matched = np.take_along_axis(lengths, long_with_short(lengths), axis=0)
    np.testing.assert_array_equal(np.sort(matched, axis=0), np.sort(lengths, axis=0))
    first, second = lengths.T
    best = min((first + np.array(other)).max() for other in permutations(second.tolist()))
    assert matched.sum(axis=1).max() == best


def test_groups_of_a_stream_leave_out_what_no_group_holds():
    data = data_section(2, 100, sampling="proportional", chunk_size=3)
    kept = placeable(corpus_of([[10] * 20, [20] * 10 + [85]]), data)
    assert kept.tolist() == [True] * 30 + [False]
    assert placeable(corpus_of([[10], [95]]), data_section(2, 100, strategy="packing")).all()


def test_as_few_as_possible_are_left_out_of_a_stream():
    """Pairs of 1 and 1,023, of 2 and 1,022, ... fit exactly; only a few long ones must go."""
    data = data_section(1, 1024, sampling="proportional", chunk_size=2)
    kept = placeable(corpus_of([list(range(1, 1024))]), data)
    assert kept.mean() > 0.95


def test_the_row_length_counts_the_members_of_a_group():
    data = data_section(1, 512, sampling="proportional", chunk_size=4)
    corpus = corpus_of([[511] * 322 + [2, 2, 2]])
    with pytest.raises(UserError, match=r"set data.sequence_length to 2,048, which places 99%"):
        check_placeable(corpus, data)


def test_what_one_stage_cannot_place_is_left_out_of_all():
    stages = [{"begins": 0, "sampling": "balanced"}, {"begins": 5, "sampling": "proportional"}]
    corpus = corpus_of([[10] * 20, [20] * 10 + [95]])
    assert placeable(corpus, data_section(2, 100, stages=stages)).tolist() == [True] * 30 + [False]


def test_too_many_of_them_stop_with_the_row_length_that_places_nearly_all():
    corpus = corpus_of([[100] * 90 + [500] * 10, [300] * 100])
    data = data_section(2, 512, sampling="balanced")
    with pytest.raises(UserError, match=r"10 of 200 .*5.0%.*domain chat.* 832") as refusal:
        check_placeable(corpus, data_section(2, 512, max_unplaceable=0.04))
    assert "\n" not in str(refusal.value)
    assert placeable(corpus, data, 832).all()
    assert not placeable(corpus, data, 832 - 64).all()
    assert check_placeable(corpus, data).mean() == 0.95  # 5 % may be left out


def test_few_of_them_are_told_by_domain(log_text):
    corpus, data = corpus_of([[10] * 40 + [95], [10] * 41]), data_section(2, 100)
    log_left_out(corpus, placeable(corpus, data), data)
    assert "domain chat: 1 instructions of 95 tokens and more are left out" in log_text.getvalue()
    assert "code" not in log_text.getvalue()


def test_a_row_that_no_group_fits_is_refused_with_the_row_length_that_places_nearly_all():
    corpus, data = corpus_of([[40] * 9, [60] * 9]), data_section(2, 64, sampling="balanced")
    with pytest.raises(UserError, match=r"no group .* row of 64 tokens; set .* to 128, which"):
        check_placeable(corpus, data)
