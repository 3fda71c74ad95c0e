"""Small domains in long rows: the rule that no row holds an instruction twice costs few rows."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moi_jax.data.planning import small_domains
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.epoch import EpochPlan, plan_epoch
from moi_jax.data.planning.mixture_report import log_mixture_table, mixture_statistics

from support.plans import NAMES, corpus_of, data_section, rows_of


def made_up(medians: list[int], counts: list[int], seed: int = 0) -> Corpus:
    """Domains of log-normal lengths with these medians."""
    rng = np.random.default_rng(seed)
    drawn = [
        np.clip(rng.lognormal(np.log(median), 0.6, n), 8, 450).astype(np.int32)
        for median, n in zip(medians, counts, strict=True)
    ]
    return Corpus.of(NAMES[: len(counts)], drawn, drawn)


def copies(plan: EpochPlan) -> int:
    """How many instructions stand in a row that holds them already."""
    rows = [[i for group in row for i in group] for row in rows_of(plan)]
    return sum(len(row) - len(set(row)) for row in rows)


@st.composite
def balanced(draw: st.DrawFn) -> tuple[Corpus, int]:
    """Two to six domains of 1 to 5,000 instructions, and rows of 512 to 32k tokens."""
    size = st.integers(1, 40) | st.integers(1, 400) | st.integers(1, 5000)
    counts = draw(st.lists(size, min_size=2, max_size=6))
    row = draw(st.sampled_from([512, 1024, 2048, 4096, 8192, 16384, 32768]))
    medians = draw(st.lists(st.integers(8, row // 20), min_size=len(counts), max_size=len(counts)))
    return made_up(medians, counts, draw(st.integers(0, 9))), row


@given(balanced(), st.integers(0, 2))
@settings(max_examples=40)
def test_best_fit_never_needs_more_rows_than_sequential(case, epoch):
    corpus, row = case
    domains = len(corpus.names)
    plans = [
        plan_epoch(corpus, data_section(domains, row, packing=packing), 0, epoch)
        for packing in ("best_fit", "sequential")
    ]
    assert plans[0].rows <= plans[1].rows
    for plan in plans:
        assert copies(plan) == 0
        lengths = np.add.reduceat(corpus.lengths[plan.instructions], plan.instruction_starts[:-1])
        assert lengths.max() <= row
    for plan in plans:  # each domain's draws, however they are placed
        drawn = np.append(plan.instructions, plan.unplaced)
        counts = np.bincount(drawn, minlength=len(corpus.lengths))
        for of_domain in np.split(counts, corpus.offsets[1:-1]):
            assert of_domain.max() - of_domain.min() <= 1 + (epoch > 0)


@pytest.mark.parametrize(
    ("counts", "row", "most"),
    [
        ([600, 19, 424, 300], 4096, 1.02),  # 6 chunks in a row
        ([600, 19, 424, 300], 8192, 1.03),  # 13 chunks in a row, 19 allowed
        ([600, 19, 424, 300], 16384, 1.02),  # 26 would fit, 19 are allowed
        ([3000, 30], 4096, 1.0),
        ([3000, 30], 16384, 1.0),
        ([400, 25, 19], 8192, 1.03),  # two small domains
        ([4000, 120], 1600, 1.01),  # between four and eight times the chunks of a row
    ],
)
def test_a_small_domain_costs_no_more_rows_than_its_size_or_the_tokens_ask_for(counts, row, most):
    corpus = made_up([60, 110, 200, 160][: len(counts)], counts)
    plan = plan_epoch(corpus, data_section(len(counts), row, sampling="balanced"), 0, 0)
    fewest = max(-(-plan.tokens // row), -(-max(counts) // min(counts)))
    assert plan.rows <= most * fewest + 1
    assert copies(plan) == 0


@given(st.integers(1, 30), st.integers(1, 12), st.integers(0, 5), st.data())
def test_dealing_keeps_the_draws_and_leaves_no_copy_in_a_row(n, rows, seed, data):
    """Draw counts that differ by at most one, and no row with more places than instructions."""
    places = data.draw(st.lists(st.integers(1, n), min_size=rows, max_size=rows))
    row_of = np.random.default_rng(seed).permutation(np.repeat(np.arange(rows), places))
    column = np.arange(len(row_of)) % n
    lengths = np.random.default_rng(seed).integers(1, 90, n).astype(np.int32)
    dealt = small_domains.deal(column, row_of, lengths, np.random.default_rng(seed))
    np.testing.assert_array_equal(np.sort(dealt), np.sort(column))
    for row in range(rows):
        mine = dealt[row_of == row]
        assert len(set(mine.tolist())) == len(mine)


def test_an_instruction_that_need_not_move_stays():
    row_of, column = np.array([0, 0, 1, 1]), np.array([0, 1, 0, 1])
    dealt = small_domains.deal(column, row_of, np.array([9, 5], np.int32), np.random.default_rng(0))
    np.testing.assert_array_equal(dealt, column)


def test_allowed_repeats_fill_the_rows():
    counts, row = [600, 19, 424, 300], 16384
    data = data_section(4, row, sampling="balanced", repeat_in_row="allow")
    plan = plan_epoch(made_up([60, 110, 200, 160], counts), data, 0, 0)
    assert plan.rows == -(-plan.tokens // row)
    assert copies(plan) > 0
    occurrences = np.bincount(plan.instructions)
    assert occurrences[:600].tolist() == [1] * 600
    assert set(occurrences[600:619].tolist()) == {31, 32}


def test_copies_of_lone_instructions_open_no_rows_of_their_own():
    """Drawn by weight, each of 30 is drawn 100 times: rows without search hold all but the last."""
    corpus = corpus_of([[40] * 3000, [40 + i for i in range(30)]])
    data = data_section(2, 2048, (1, 1), sampling="weights", packing="best_fit")
    plan = plan_epoch(corpus, data, 0, 0)
    assert copies(plan) == 0
    assert plan.fill > 0.97


def warnings_of(plan: EpochPlan, data, log_text) -> str:
    report = {name: {"read": 9999, "dropped": {}, "held_out": 0} for name in plan.corpus.names}
    log_mixture_table(mixture_statistics(plan, report, data, 4), data)
    lines = log_text.getvalue().splitlines()
    return "\n".join(line for line in lines if "full" in line)


@pytest.mark.parametrize(
    ("switches", "said"),
    [
        (
            {"sampling": "balanced"},
            "code has only 19 instructions.* at most 19 chunks.*repeat_in_row",
        ),
        ({"strategy": "sequence"}, "packing: none"),
        ({"strategy": "packing", "sequence_length": 600}, "packing: sequential"),
    ],
)
def test_rows_that_are_not_full_are_told_with_the_reason(switches, said, log_text):
    data = data_section(4, **{"sequence_length": 16384, **switches})
    plan = plan_epoch(made_up([60, 110, 200, 160], [600, 19, 424, 300]), data, 0, 0)
    assert plan.fill < 0.9
    assert re.search(said, warnings_of(plan, data, log_text))


def test_groups_that_leave_gaps_are_told(log_text):
    data = data_section(2, 1000, sampling="balanced")
    plan = plan_epoch(corpus_of([[300] * 50, [350] * 50]), data, 0, 0)
    assert "50 groups of 650 tokens on average" in warnings_of(plan, data, log_text)


def test_full_rows_are_not_warned_of(log_text):
    data = data_section(4, 4096, sampling="balanced")
    plan = plan_epoch(made_up([60, 110, 200, 160], [600, 190, 424, 300]), data, 0, 0)
    assert warnings_of(plan, data, log_text) == ""
