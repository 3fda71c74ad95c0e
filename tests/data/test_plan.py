"""Epoch plans and the run over epochs: the invariants of docs/method.md."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.data.planning import mixture
from moi_jax.data.planning.epoch import EpochPlan, plan_epoch
from moi_jax.data.planning.mixture_report import log_mixture_table, mixture_statistics

from support.plans import (
    LENGTH,
    assert_same,
    corpora,
    corpus_of,
    data_section,
    plan_or_reject,
    rows_of,
    switches,
)


@st.composite
def planned(draw: st.DrawFn, longest: int = 16) -> EpochPlan:
    corpus = draw(corpora(longest))
    data = data_section(len(corpus.names), LENGTH, **draw(switches()))
    return plan_or_reject(corpus, data, draw(st.integers(0, 2**33)), draw(st.integers(0, 4)))


@given(corpora(longest=40), switches(["balanced"]), st.integers(0, 9))
def test_balanced_chunks_hold_one_instruction_of_each_domain(corpus, chosen, epoch):
    plan = plan_epoch(corpus, data_section(len(corpus.names), 160, **chosen), 0, epoch)
    for row in rows_of(plan):
        for group in row:
            assert sorted(corpus.domain_of(np.array(group))) == list(range(len(corpus.names)))


@given(planned(longest=64))
def test_groups_are_whole_rows_fit_and_fill_is_counted(plan):
    assert plan.row_starts[0] == plan.group_starts[0] == 0
    assert plan.row_starts[-1] == len(plan.group_starts) - 1
    assert plan.group_starts[-1] == len(plan.instructions)
    assert (np.diff(plan.row_starts) > 0).all()
    assert (np.diff(plan.group_starts) > 0).all()
    lengths = [
        sum(int(plan.corpus.lengths[i]) for group in row for i in group) for row in rows_of(plan)
    ]
    assert max(lengths) <= LENGTH
    assert plan.tokens == sum(lengths)
    assert plan.fill == pytest.approx(np.mean(lengths) / LENGTH)
    assert 0 < plan.fill <= 1


@given(planned(longest=64))
def test_no_instruction_stands_twice_in_a_row(plan):
    for row in rows_of(plan):
        flat = [i for group in row for i in group]
        assert len(flat) == len(set(flat))


def test_packing_ends_where_a_group_holds_an_instruction_twice():
    """Found by chance: next fit began a row at the same group for ever."""
    lengths = [[5, 12, 4, 2, 16], [5, 12, 4, 2, 16], [7, 2, 2, 2, 2, 6, 59, 5, 15, 54], [28, 33, 8]]
    switches = {"sampling": "weights", "order": "shuffled", "packing": "sequential"}
    switches |= {"chunk_size": 4, "epoch_end": "shortest", "unit": "instructions"}
    plan = plan_epoch(corpus_of(lengths), data_section(4, 64, **switches), 0, 3)
    assert len(plan.instructions) + plan.unplaced.size == 12


@given(corpora(longest=64), switches(), st.integers(0, 3))
def test_instructions_are_drawn_placed_or_counted_as_unplaced(corpus, chosen, epoch):
    counts = corpus.counts
    plan = plan_or_reject(corpus, data_section(len(counts), 64, **chosen), 0, epoch)
    drawn = mixture.epoch_counts(corpus, data_section(len(counts), 64, **chosen))
    placed = np.concatenate([plan.instructions, plan.unplaced])
    of_domain = np.bincount(corpus.domain_of(placed), minlength=len(counts))
    assert (plan.draws == drawn).all()
    # A copy that no group can take is left out where a group is larger than its domain.
    if chosen.get("chunk_size", 1) == 1:
        assert (of_domain == drawn).all()
    else:
        assert (of_domain <= drawn).all()
    assert 0 <= plan.moved_instructions <= len(plan.instructions)
    assert plan.loss_tokens == corpus.loss_lengths[plan.instructions].sum()
    of_domain = corpus.domain_of(plan.instructions)
    for domain, tokens in enumerate(plan.domain_loss_tokens):
        assert tokens == corpus.loss_lengths[plan.instructions[of_domain == domain]].sum()


@given(corpora(longest=8), switches(), st.integers(0, 3))
def test_draw_counts_differ_by_at_most_one_over_all_epochs(corpus, chosen, seed):
    data = data_section(len(corpus.names), LENGTH, **chosen)
    total = np.zeros(len(corpus.lengths), int)
    for epoch in range(3):
        plan = plan_epoch(corpus, data, seed, epoch)
        total += np.bincount(plan.instructions, minlength=len(total))
        for start, end in pairwise(corpus.offsets):
            assert total[start:end].max() - total[start:end].min() <= 1


@given(corpora(), switches(), st.integers(0, 3), st.integers(0, 9))
def test_a_plan_depends_on_its_arguments_alone(corpus, chosen, epoch, seed):
    data = data_section(len(corpus.names), 160, **chosen)
    first = plan_epoch(corpus, data, seed, epoch)
    np.random.seed(epoch)
    plan_epoch(corpus, data, seed, epoch + 1)
    assert_same(first, plan_epoch(corpus, data, seed, epoch))


def test_seed_and_epoch_change_the_plan():
    corpus = corpus_of([[5, 6, 7] * 10, [8, 9] * 10])
    data = data_section(2, LENGTH)
    plans = [plan_epoch(corpus, data, seed, epoch) for seed, epoch in [(0, 0), (0, 1), (1, 0)]]
    assert len({plan.instructions.tobytes() for plan in plans}) == 3


def test_sequential_rows_keep_draw_order_and_stand_in_random_order():
    corpus = corpus_of([[16] * 400])
    data = data_section(1, LENGTH, strategy="packing")
    plan = plan_epoch(corpus, data, 0, 0)
    stream = mixture.draw_groups(corpus, data, 0, 0).ravel().reshape(-1, 4).tolist()
    rows = plan.instructions.reshape(-1, 4).tolist()
    assert rows != stream
    assert sorted(rows) == sorted(stream)


def test_a_best_fit_row_does_not_begin_with_its_longest_group():
    corpus = corpus_of([[8, 24] * 400])
    plan = plan_epoch(corpus, data_section(1, 32, sampling="balanced"), 0, 0)
    first = [corpus.lengths[plan.row(row)[0][0]] for row in range(plan.rows)]
    assert plan.fill == 1
    assert 120 < first.count(24) < 280


def test_a_row_length_no_group_fits_is_refused():
    with pytest.raises(UserError, match="sequence_length"):
        plan_epoch(corpus_of([[40], [40]]), data_section(2, 64), 0, 0)


# --- the mixture table ---


@given(corpora(longest=64), switches(), st.integers(1, 9))
def test_every_row_read_is_dropped_held_out_used_or_not_drawn(corpus, chosen, batch_rows):
    data = data_section(len(corpus.names), 64, **chosen)
    plan = plan_or_reject(corpus, data)
    report = {
        name: {"read": n + 12, "dropped": {"bad_json": 3, "duplicate": 4}, "held_out": 5}
        for name, n in zip(corpus.names, corpus.counts, strict=True)
    }
    stats = mixture_statistics(plan, report, data, batch_rows)
    assert sum(domain["asked"] for domain in stats["domains"].values()) == pytest.approx(1)
    for name, domain in stats["domains"].items():
        dropped = sum(domain["dropped"].values())
        assert domain["read"] == report[name]["read"]
        not_used = domain["unplaced"] + domain["not_drawn"]
        assert domain["read"] == dropped + 5 + domain["used"] + not_used
        assert domain["occurrences"] <= domain["used"] * domain["max_repeats"]
    for key in ("tokens", "loss_tokens"):
        assert sum(domain[key] for domain in stats["domains"].values()) == stats[key]
    occurrences = sum(domain["occurrences"] for domain in stats["domains"].values())
    assert occurrences == len(plan.instructions)
    distinct = [
        len({int(corpus.domain_of(i)) for group in row for i in group}) for row in rows_of(plan)
    ]
    assert stats["domains_per_row"] == pytest.approx(np.mean(distinct))
    assert (stats["steps_per_epoch"] - 1) * batch_rows < plan.rows
    assert plan.rows <= stats["steps_per_epoch"] * batch_rows


def test_the_mixture_table_shows_shares_and_warns_of_repeats(log_text):
    corpus = corpus_of([[10] * 30, [20] * 5])  # one of each in a chunk: 30 tokens
    report = {name: {"read": 40, "dropped": {}, "held_out": 0} for name in corpus.names}
    data = data_section(2, 30, max_repeats=5)
    plan = plan_epoch(corpus, data, 0, 0)
    stats = mixture_statistics(plan, report, data, 4)
    assert stats["fill"] == 1
    assert stats["steps_per_epoch"] == 8
    assert stats["domains"]["code"]["mean_repeats"] == 6
    log_mixture_table(stats, data)
    text = log_text.getvalue()
    assert "600 (66.7%)" in text
    assert "domain code repeats an instruction 6 times" in text
    assert "domain chat" not in text
