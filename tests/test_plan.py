"""Epoch plans and the run over epochs: the invariants of docs/method.md."""

import io
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console

from moi_jax.config import Train
from moi_jax.data import plan as plan_module
from moi_jax.data.plan import EpochPlan, RunPlan, plan_epoch
from moi_jax.data.statistics import mixture_statistics, print_mixture
from moi_jax.errors import UserError

from plan_helpers import corpora, corpus_of, data_section, plan_or_reject, switches

# Groups of four instructions of at most 16 tokens always fit; longer ones may be left out.
LENGTH = 64


@st.composite
def planned(draw: st.DrawFn, longest: int = 16) -> EpochPlan:
    corpus = draw(corpora(longest))
    data = data_section(len(corpus.names), LENGTH, **draw(switches()))
    return plan_or_reject(corpus, data, draw(st.integers(0, 2**33)), draw(st.integers(0, 4)))


def rows_of(plan: EpochPlan) -> list[list[list[int]]]:
    return [[group.tolist() for group in plan.row(row)] for row in range(plan.rows)]


def assert_same(a: EpochPlan, b: EpochPlan) -> None:
    for field in ("instructions", "group_starts", "row_starts"):
        np.testing.assert_array_equal(getattr(a, field), getattr(b, field))


@given(corpora(longest=40), switches(), st.integers(0, 9))
def test_balanced_chunks_hold_one_instruction_of_each_domain(corpus, chosen, epoch):
    chosen = {**chosen, "sampling": "balanced", "chunk_size": None}
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


@given(corpora(longest=64), switches(), st.integers(0, 3))
def test_instructions_are_drawn_placed_or_counted_as_unplaced(corpus, chosen, epoch):
    counts = corpus.counts
    plan = plan_or_reject(corpus, data_section(len(counts), 64, **chosen), 0, epoch)
    if chosen["sampling"] == "balanced":
        chunks = max(counts) if chosen["epoch_end"] == "longest" else min(counts)
        drawn = chunks * len(counts)
    else:
        drawn = sum(counts)
    assert len(plan.instructions) + plan.unplaced_instructions == drawn
    assert 0 <= plan.moved <= len(plan.instructions)
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
    stream = plan_module.mixture.draw_groups([400], data, 0, 0).ravel().reshape(-1, 4).tolist()
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


# --- the run ---


@st.composite
def runs(draw: st.DrawFn) -> tuple:
    corpus = draw(corpora(longest=16))
    data = data_section(len(corpus.names), LENGTH, **draw(switches()))
    length = draw(st.sampled_from(["steps", "epochs", "loss_tokens"]))
    amount = draw(st.integers(1, 800 if length == "loss_tokens" else 5))
    batch = draw(st.integers(1, 7))
    return corpus, data, Train(**{length: amount}, global_batch_rows=batch, seed=3)


def endless(corpus, data, rows: int) -> list[tuple[int, int, list]]:
    """(epoch, row, groups) of the first rows, epoch after epoch."""
    sequence, epoch = [], 0
    while len(sequence) < rows:
        plan = rows_of(plan_epoch(corpus, data, 3, epoch))
        sequence += [(epoch, row, groups) for row, groups in enumerate(plan)]
        epoch += 1
    return sequence[:rows]


@given(runs(), st.data())
@settings(max_examples=50)
def test_any_row_is_found_from_its_number_alone(case, more):
    corpus, data, train = case
    run = RunPlan(corpus, data, train)
    sequence = endless(corpus, data, run.total_rows)
    row = more.draw(st.integers(0, run.total_rows - 1))
    epoch, place, groups = sequence[row]
    assert run.locate(row) == (epoch, place)
    found = [group.tolist() for group in run.epoch_plan(epoch).row(place)]
    assert found == groups
    first_rows = [i for i, (_, start, _) in enumerate(sequence[: row + 1]) if start == 0]
    assert run.first_rows(row) == first_rows
    # A run that goes on from a checkpoint knows the first rows, and finds the same.
    resumed = RunPlan(corpus, data, train, first_rows=run.first_rows(row))
    assert (resumed.total_rows, resumed.total_steps) == (run.total_rows, run.total_steps)
    assert resumed.locate(row) == (epoch, place)
    assert_same(resumed.epoch_plan(epoch), run.epoch_plan(epoch))


@given(runs())
@settings(max_examples=50)
def test_the_length_of_a_run_is_what_the_config_asks_for(case):
    corpus, data, train = case
    run = RunPlan(corpus, data, train)
    if train.steps:
        assert run.total_steps == train.steps
        assert run.empty_rows == 0
    elif train.epochs:
        rows = sum(plan_epoch(corpus, data, 3, epoch).rows for epoch in range(train.epochs))
        assert run.total_rows == rows == run.rows_before(train.epochs)
    else:
        losses = [
            sum(int(corpus.loss_lengths[i]) for group in groups for i in group)
            for _, _, groups in endless(corpus, data, run.total_rows)
        ]
        assert sum(losses) >= train.loss_tokens > sum(losses[:-1])
    assert run.total_steps == -(-run.total_rows // train.global_batch_rows)
    assert run.total_steps * train.global_batch_rows - run.total_rows == run.empty_rows
    assert run.empty_rows < train.global_batch_rows


@pytest.fixture
def planned_epochs(monkeypatch) -> list[int]:
    """The epochs planned from here on, in order."""
    epochs: list[int] = []

    def plan(corpus, data, seed, epoch):
        epochs.append(epoch)
        return plan_epoch(corpus, data, seed, epoch)

    monkeypatch.setattr(plan_module, "plan_epoch", plan)
    return epochs


def finish_planning(run: RunPlan) -> None:
    """Waits for what the background has been asked to plan."""
    run._planner.submit(lambda: None).result()


def test_a_run_of_steps_plans_only_the_epochs_it_reads(planned_epochs):
    corpus, data = corpus_of([[16] * 40]), data_section(1, LENGTH, strategy="packing")  # 10 rows
    run = RunPlan(corpus, data, Train(steps=7, global_batch_rows=4))
    assert planned_epochs == []
    run.locate(3)
    finish_planning(run)
    assert planned_epochs == [0, 1]
    run.locate(27)
    finish_planning(run)
    assert planned_epochs == [0, 1, 2]  # 28 rows end inside epoch 2: epoch 3 is never planned


def test_a_resumed_run_does_not_plan_the_epochs_it_has_left_behind(planned_epochs):
    corpus, data = corpus_of([[16] * 40]), data_section(1, LENGTH, strategy="packing")
    run = RunPlan(corpus, data, Train(steps=100, global_batch_rows=4), first_rows=[0, 10, 20])
    assert run.locate(25) == (2, 5)
    finish_planning(run)
    assert planned_epochs == [2, 3]


def test_few_plans_are_kept(planned_epochs, monkeypatch):
    monkeypatch.setattr(plan_module, "INSTRUCTIONS_KEPT", 0)
    corpus, data = corpus_of([[16] * 40]), data_section(1, LENGTH, strategy="packing")
    run = RunPlan(corpus, data, Train(epochs=20, global_batch_rows=4))
    for row in range(run.total_rows):
        run.epoch_plan(run.locate(row)[0])
    assert len(run._plans) <= plan_module.PLANS_KEPT
    assert len(planned_epochs) <= 40  # once to count the rows, once to read them


def test_small_epochs_are_planned_once_however_far_threads_read_ahead(planned_epochs):
    corpus, data = corpus_of([[16] * 40]), data_section(1, LENGTH, strategy="packing")
    run = RunPlan(corpus, data, Train(epochs=20, global_batch_rows=4))
    for row in reversed(range(run.total_rows)):
        run.epoch_plan(run.locate(row)[0])
    assert len(planned_epochs) == 20


def test_loss_tokens_that_never_come_are_refused():
    corpus = corpus_of([[16] * 4])
    corpus.loss_lengths[:] = 0
    with pytest.raises(UserError, match="loss_tokens"):
        RunPlan(corpus, data_section(1, LENGTH), Train(loss_tokens=5))


# --- the mixture table ---


@given(corpora(longest=64), switches(), st.integers(1, 9))
def test_every_row_read_is_dropped_held_out_used_or_not_drawn(corpus, chosen, batch_rows):
    plan = plan_or_reject(corpus, data_section(len(corpus.names), 64, **chosen))
    report = {
        name: {"read": n + 12, "dropped": {"bad_json": 3, "duplicate": 4}, "held_out": 5}
        for name, n in zip(corpus.names, corpus.counts, strict=True)
    }
    stats = mixture_statistics(plan, report, batch_rows)
    for name, domain in stats["domains"].items():
        dropped = sum(domain["dropped"].values())
        assert domain["read"] == report[name]["read"]
        assert domain["read"] == dropped + 5 + domain["used"] + domain["not_drawn"]
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


def test_the_mixture_table_shows_shares_and_warns_of_repeats():
    corpus = corpus_of([[10] * 30, [20] * 5])  # one of each in a chunk: 30 tokens
    report = {name: {"read": 40, "dropped": {}, "held_out": 0} for name in corpus.names}
    plan = plan_epoch(corpus, data_section(2, 30), 0, 0)
    stats = mixture_statistics(plan, report, 4)
    assert stats["fill"] == 1
    assert stats["steps_per_epoch"] == 8
    assert stats["domains"]["code"]["mean_repeats"] == 6
    console = Console(width=160, record=True, file=io.StringIO())
    print_mixture(stats, console, max_repeats=5)
    text = console.export_text()
    assert "600 (66.7%)" in text
    assert "warning: domain code repeats an instruction 6 times" in text
    assert "domain chat" not in text
