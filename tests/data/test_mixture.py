"""Draws, mixtures, groups and the order inside them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.data.planning import mixture

from support.plans import corpora, corpus_of, data_section

# Five instructions of the first domain, three of the second.
SMALL = corpus_of([[1] * 5, [1] * 3])


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
    second = mixture.draw_groups(SMALL, data, seed=7, epoch=1)
    np.testing.assert_array_equal(second[:, 0], mixture.draws(7, 0, 5, 5, 5))
    np.testing.assert_array_equal(second[:, 1], 5 + mixture.draws(7, 1, 3, 5, 5))


@pytest.mark.parametrize(("end", "chunks"), [("longest", 5), ("shortest", 3)])
def test_epoch_end_sets_the_number_of_balanced_chunks(end, chunks):
    data = data_section(2, sampling="balanced", epoch_end=end)
    assert mixture.draw_groups(SMALL, data, 0, 0).shape == (chunks, 2)


@given(corpora(), st.integers(1, 4), st.integers(0, 3))
def test_proportional_draws_every_instruction_once_an_epoch(corpus, chunk_size, epoch):
    counts = corpus.counts
    data = data_section(len(counts), sampling="proportional", chunk_size=chunk_size)
    groups = mixture.draw_groups(corpus, data, 0, epoch)
    present = groups >= 0
    assert sorted(groups[present]) == list(range(sum(counts)))
    assert present[:-1].all()  # only the last group may be short, at its end
    assert present[-1, 0]
    assert not np.diff(present[-1].astype(int)).max(initial=0) > 0


def test_proportional_mixes_the_domains():
    data = data_section(2, sampling="proportional")
    stream = mixture.draw_groups(corpus_of([[1] * 500] * 2), data, 0, 0).ravel()
    assert 150 < np.count_nonzero(stream[:500] < 500) < 350


def test_balanced_refuses_a_domain_without_instructions_by_name():
    with pytest.raises(UserError, match="code"):
        mixture.draw_groups(corpus_of([[1] * 3, []]), data_section(2, sampling="balanced"), 0, 0)
    with pytest.raises(UserError, match="no domain"):
        mixture.draw_groups(corpus_of([[], []]), data_section(2, sampling="proportional"), 0, 0)


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


@pytest.mark.parametrize("sampling", [{"sampling": "balanced"}, {"sampling": "proportional"}])
def test_partners_change_every_epoch(sampling):
    data, corpus = data_section(2, chunk_size=2, **sampling), corpus_of([[1] * 200] * 2)
    pairs = [
        {tuple(sorted(pair)) for pair in mixture.draw_groups(corpus, data, 0, epoch).tolist()}
        for epoch in range(2)
    ]
    assert len(pairs[0] & pairs[1]) < 10  # of 200; about one expected


def drawn_of(corpus, data, epoch=0, **arguments):
    """How often each instruction is drawn in an epoch."""
    groups = mixture.draw_groups(corpus, data, 0, epoch, **arguments)
    return np.bincount(groups[groups >= 0], minlength=len(corpus.lengths))


def test_weights_are_shares_of_the_instructions():
    corpus = corpus_of([[1] * 30, [1] * 10])
    data = data_section(2, sampling="weights", weights=(1, 3))
    # Of the larger domain each once is a quarter of the epoch.
    assert mixture.epoch_counts(corpus, data).tolist() == [30, 90]
    drawn = drawn_of(corpus, data)
    assert drawn[:30].tolist() == [1] * 30
    assert drawn[30:].tolist() == [9] * 10
    short = data_section(2, sampling="weights", weights=(1, 3), epoch_end="shortest")
    assert mixture.epoch_counts(corpus, short).tolist() == [3, 10]


def test_a_domain_of_weight_zero_is_not_drawn():
    corpus = corpus_of([[1] * 30, [1] * 10])
    drawn = drawn_of(corpus, data_section(2, sampling="weights", weights=(0, 1)))
    assert drawn.tolist() == [0] * 30 + [1] * 10


def test_weights_by_loss_tokens_are_shares_of_the_loss_tokens():
    corpus = corpus_of([[20] * 30, [60] * 10])  # 10 and 30 loss tokens each
    data = data_section(2, sampling="weights", unit="loss_tokens")
    counts = mixture.epoch_counts(corpus, data)
    assert counts.tolist() == [30, 10]
    assert (drawn_of(corpus, data) * corpus.loss_lengths).reshape(4, 10).sum(1).sum() == 600


@pytest.mark.parametrize(
    ("temperature", "shares"), [(1.0, [0.8, 0.2]), (2.0, [2 / 3, 1 / 3]), (1e9, [0.5, 0.5])]
)
def test_temperature_flattens_the_sizes(temperature, shares):
    corpus = corpus_of([[1] * 400, [1] * 100])
    data = data_section(2, sampling="temperature", temperature=temperature)
    np.testing.assert_allclose(mixture.asked_shares(corpus, data), shares, atol=1e-6)
    counts = mixture.epoch_counts(corpus, data)
    np.testing.assert_allclose(counts / counts.sum(), shares, atol=2e-3)


def test_later_epochs_go_on_with_the_draws():
    corpus = corpus_of([[1] * 7, [1] * 20])
    data = data_section(2, sampling="weights", weights=(1, 1))
    total = sum(drawn_of(corpus, data, epoch) for epoch in range(5))
    for domain in (total[:7], total[7:]):
        assert domain.max() - domain.min() <= 1
    # And so does a later stage, with other shares.
    stage = data_section(2, sampling="weights", weights=(3, 1))
    total += drawn_of(corpus, stage, stage=1, first_draws=np.array([100, 100]))
    for domain in (total[:7], total[7:]):
        assert domain.max() - domain.min() <= 1


def test_the_first_groups_hold_the_first_draws():
    corpus = corpus_of([[1] * 50, [1] * 20])
    data = data_section(2, sampling="weights", chunk_size=3)
    few = mixture.draw_groups(corpus, data, 0, 0, groups=9)
    for domain, n in enumerate(corpus.counts):
        mine = few[corpus.domain_of(few) == domain] - corpus.offsets[domain]
        assert sorted(mine) == sorted(mixture.draws(0, domain, n, 0, len(mine)))


def test_sources_are_drawn_by_their_weights_and_evenly_inside():
    corpus = corpus_of([[1] * 100, [1] * 400], source_starts=[[0, 20, 100], [0, 400]])
    data = data_section(2, sources=[(3, 1), (1,)])
    # The second source of the domain is drawn once whole after 320 draws, a quarter of them its.
    assert mixture.epoch_counts(corpus, data).tolist() == [400, 400]
    drawn = drawn_of(corpus, data)
    first, second = drawn[:20], drawn[20:100]
    assert (first.sum(), second.sum()) == pytest.approx((300, 100), abs=30)
    assert first.max() - first.min() <= 1
    assert second.max() - second.min() <= 1


@given(
    st.lists(st.integers(1, 40), min_size=2, max_size=4),
    st.integers(0, 200_000),
    st.integers(0, 400),
    st.integers(1, 9),
)
def test_draws_of_weighted_sources_are_one_endless_sequence(sizes, start, count, weight):
    starts = np.cumsum([0, *sizes])
    shares = np.array([weight, *[1] * (len(sizes) - 1)], float)
    samples = np.arange(starts[-1] + 1)
    weighted = mixture.WeightedSources(starts, shares / shares.sum(), samples)
    part = weighted.draws(0, 0, start, count)
    assert ((part >= 0) & (part < starts[-1])).all()
    np.testing.assert_array_equal(
        part, weighted.draws(0, 0, start - start % 7, count + 6)[start % 7 :][:count]
    )


def test_a_weighted_source_without_instructions_is_refused_by_name():
    corpus = corpus_of([[1] * 5, [1] * 5], source_starts=[[0, 5], [0, 5, 5]])
    with pytest.raises(UserError, match="source of domain code has no training instruction"):
        mixture.draw_groups(corpus, data_section(2, sources=[(1,), (1, 2)]), 0, 0)


@given(corpora(), st.integers(2, 4), st.integers(0, 3))
def test_no_instruction_stands_twice_in_a_group(corpus, chunk_size, seed):
    weights = [1.0, *[9.0] * (len(corpus.counts) - 1)]
    data = data_section(
        len(corpus.counts), sampling="weights", weights=weights, chunk_size=chunk_size
    )
    for group in mixture.draw_groups(corpus, data, seed, 0).tolist():
        present = [i for i in group if i >= 0]
        assert len(set(present)) == len(present)


def test_no_instruction_stands_twice_in_a_group_where_an_epoch_crosses_permutations():
    # Epoch 1 has draws 5 to 9 of the nine instructions of domain 1: draw 9 may repeat one of them.
    corpus = corpus_of([[2] * 5, [2] * 9, [2] * 5])
    data = data_section(3, 64, sampling="weights", chunk_size=3, epoch_end="shortest")
    for seed in range(50):
        for group in mixture.draw_groups(corpus, data, seed, 1).tolist():
            assert len(set(group)) == len(group)


def test_allowed_repeats_leave_no_draw_out():
    corpus, switches = corpus_of([[5] * 3, [5] * 30]), {"sampling": "weights", "chunk_size": 4}
    drawn = {
        rule: mixture.draw_groups(
            corpus, data_section(2, 64, (10, 1), repeat_in_row=rule, **switches), 0, 0
        )
        for rule in ("allow", "forbid")
    }
    assert np.count_nonzero(drawn["allow"] >= 0) == 330
    assert 0 < np.count_nonzero(drawn["forbid"] >= 0) < 330  # three in each of 83 groups


@given(st.integers(0, 400), st.integers(0, 4))
def test_groups_as_large_as_their_domains_are_drawn(seed, epoch):
    data = data_section(2, 64, (0.3, 5), sampling="weights", chunk_size=4)
    groups = mixture.draw_groups(corpus_of([[5] * 2, [5] * 4]), data, seed, epoch)
    for group in groups.tolist():
        present = [member for member in group if member >= 0]
        assert len(set(present)) == len(present)
