"""The plan of a run: epochs and stages one after another, and rows found from their number."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.config import Train
from moi_jax.config.load import load_config
from moi_jax.data.planning import training_plan
from moi_jax.data.planning.epoch import plan_epoch
from moi_jax.data.planning.training_plan import TrainingPlan
from moi_jax.models.flops import causal_pairs

from support.plans import (
    LENGTH,
    assert_same,
    corpora,
    corpus_of,
    data_section,
    rows_of,
    switches,
)
from support.runs import open_data, small_config


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
    run = TrainingPlan(corpus, data, train)
    sequence = endless(corpus, data, run.total_rows)
    row = more.draw(st.integers(0, run.total_rows - 1))
    epoch, place, groups = sequence[row]
    assert run.locate(row) == (epoch, place)
    found = [group.tolist() for group in run.epoch_plan(epoch).row(place)]
    assert found == groups
    epoch_first_rows = [i for i, (_, start, _) in enumerate(sequence[: row + 1]) if start == 0]
    assert run.epoch_first_rows(row) == epoch_first_rows
    # A run that goes on from a checkpoint knows the first rows, and finds the same.
    resumed = TrainingPlan(corpus, data, train, epoch_first_rows=run.epoch_first_rows(row))
    assert (resumed.total_rows, resumed.total_steps) == (run.total_rows, run.total_steps)
    assert resumed.locate(row) == (epoch, place)
    assert_same(resumed.epoch_plan(epoch), run.epoch_plan(epoch))


@given(runs())
@settings(max_examples=50)
def test_the_length_of_a_run_is_what_the_config_asks_for(case):
    corpus, data, train = case
    run = TrainingPlan(corpus, data, train)
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

    def plan(corpus, data, seed, epoch, *arguments):
        epochs.append(epoch)
        return plan_epoch(corpus, data, seed, epoch, *arguments)

    monkeypatch.setattr(training_plan, "plan_epoch", plan)
    return epochs


def finish_planning(run: TrainingPlan) -> None:
    """Waits for what the background has been asked to plan."""
    run._planner.submit(lambda: None).result()


def test_a_run_of_steps_plans_only_the_epochs_it_reads(planned_epochs):
    corpus, data = corpus_of([[16] * 40]), data_section(1, LENGTH, strategy="packing")  # 10 rows
    run = TrainingPlan(corpus, data, Train(steps=7, global_batch_rows=4))
    assert planned_epochs == []
    run.locate(3)
    finish_planning(run)
    assert planned_epochs == [0, 1]
    run.locate(27)
    finish_planning(run)
    assert planned_epochs == [0, 1, 2]  # 28 rows end inside epoch 2: epoch 3 is never planned


def test_a_resumed_run_does_not_plan_the_epochs_it_has_left_behind(planned_epochs):
    corpus, data = corpus_of([[16] * 40]), data_section(1, LENGTH, strategy="packing")
    run = TrainingPlan(
        corpus, data, Train(steps=100, global_batch_rows=4), epoch_first_rows=[0, 10, 20]
    )
    assert run.locate(25) == (2, 5)
    finish_planning(run)
    assert planned_epochs == [2, 3]


def test_few_plans_are_kept(planned_epochs, monkeypatch):
    monkeypatch.setattr(training_plan, "INSTRUCTIONS_KEPT", 0)
    corpus, data = corpus_of([[16] * 40]), data_section(1, LENGTH, strategy="packing")
    run = TrainingPlan(corpus, data, Train(epochs=20, global_batch_rows=4))
    for row in range(run.total_rows):
        run.epoch_plan(run.locate(row)[0])
    assert len(run._plans) <= training_plan.PLANS_KEPT
    assert len(planned_epochs) <= 40  # once to count the rows, once to read them


def test_small_epochs_are_planned_once_however_far_threads_read_ahead(planned_epochs):
    corpus, data = corpus_of([[16] * 40]), data_section(1, LENGTH, strategy="packing")
    run = TrainingPlan(corpus, data, Train(epochs=20, global_batch_rows=4))
    for row in reversed(range(run.total_rows)):
        run.epoch_plan(run.locate(row)[0])
    assert len(planned_epochs) == 20


def test_loss_tokens_that_never_come_are_refused():
    corpus = corpus_of([[16] * 4])
    corpus.loss_lengths[:] = 0
    with pytest.raises(UserError, match="loss_tokens"):
        TrainingPlan(corpus, data_section(1, LENGTH), Train(loss_tokens=5))


# --- stages ---

STAGES = [
    {"begins": 0, "sampling": "balanced"},
    {"begins": 25, "sampling": "weights", "weights": {"chat": 3}},
    {"begins": 31, "sampling": "temperature", "temperature": 2.0},
]


def staged(**switches):
    corpus = corpus_of([[5, 6, 7, 8] * 20, [9, 10, 11] * 10])
    return corpus, data_section(2, LENGTH, **{"stages": STAGES, **switches})


def domains_of_rows(run: TrainingPlan, first: int, end: int) -> np.ndarray:
    counts = np.zeros(2, int)
    for row in range(first, end):
        epoch, place = run.locate(row)
        for group in run.epoch_plan(epoch).row(place):
            counts += np.bincount(run.corpus.domain_of(group), minlength=2)
    return counts


@pytest.mark.parametrize("packing", ["best_fit", "sequential", "none"])
def test_a_stage_begins_at_its_row_with_its_mixture(packing):
    corpus, data = staged(packing=packing)
    run = TrainingPlan(corpus, data, Train(steps=30, global_batch_rows=4))
    for begins in (0, 25, 31):
        assert begins in run.epoch_first_rows(100)
        assert run.locate(begins)[1] == 0
    chat, code = domains_of_rows(run, 0, 25)
    assert chat == code
    chat, code = domains_of_rows(run, 25, 31)
    assert chat / (chat + code) == pytest.approx(0.75, abs=0.2)
    assert run.rows_before(len(run.epoch_first_rows(119))) >= 119


@pytest.mark.parametrize("packing", ["best_fit", "sequential", "none"])
@pytest.mark.parametrize("begins", [(7, 10), (13, 18), (20, 21), (25, 31)])
def test_draws_run_on_over_stages(packing, begins):
    """No instruction is two draws behind another, also where a stage ends inside an epoch."""
    stages = [{**stage, "begins": row} for stage, row in zip(STAGES, (0, *begins), strict=True)]
    corpus, data = staged(packing=packing, stages=stages)
    run = TrainingPlan(corpus, data, Train(steps=30, global_batch_rows=4))
    assert set(begins) < set(run.epoch_first_rows(90))
    counts = np.zeros(len(corpus.lengths), int)
    for epoch in range(len(run.epoch_first_rows(90))):
        counts += np.bincount(run.epoch_plan(epoch).instructions, minlength=len(counts))
        for domain in (counts[:80], counts[80:]):
            assert domain.max() - domain.min() <= 1


def test_a_staged_run_that_goes_on_finds_the_same_rows():
    corpus, data = staged()
    run = TrainingPlan(corpus, data, Train(steps=30, global_batch_rows=4))
    for row in (3, 24, 25, 30, 31, 90):
        resumed = TrainingPlan(
            corpus, data, Train(steps=30, global_batch_rows=4), run.epoch_first_rows(row)
        )
        assert resumed.locate(row) == run.locate(row)
        epoch = run.locate(row)[0]
        assert_same(resumed.epoch_plan(epoch), run.epoch_plan(epoch))


@pytest.mark.parametrize("mask", ["chunk", "row", "instruction"])
def test_segments_are_as_long_as_those_of_the_batches(tmp_path, mask):
    """Rows of several epochs; every token of a batch counts the keys that it sees."""
    path = small_config(tmp_path, data={"mask": mask}, train={"epochs": 3, "steps": None})
    dataset = open_data(load_config(path))
    plan = dataset.plan()
    first, after = 1, plan.rows_before(2) + 2
    batch = dataset.batch_reader(plan).read(range(first, after))
    real = batch.segment_ids > 0
    lengths = plan.segment_lengths(first, after)
    assert len(lengths) == batch.segment_ids.max(axis=1).sum()
    assert lengths.sum() == real.sum()
    assert causal_pairs(lengths) == (batch.positions + 1)[real].sum()
    assert len(plan.segment_lengths(3, 3)) == 0
