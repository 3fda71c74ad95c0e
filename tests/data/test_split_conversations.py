"""Conversations of several samples: draws, rows, selection, and the cache that holds them."""

from collections import Counter, defaultdict
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moi_jax.data.planning import mixture
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.epoch import plan_epoch
from moi_jax.data.planning.mixture_report import mixture_statistics

from support.plans import NAMES, corpora, data_section, plan_or_reject, rows_of, switches


@st.composite
def split_corpora(draw: st.DrawFn) -> Corpus:
    """A corpus whose instructions are samples of conversations, beside each other."""
    corpus = draw(corpora())
    samples = []
    for n in np.diff(corpus.offsets).tolist():
        borders = draw(st.sets(st.integers(1, n - 1))) if n > 1 else set()
        samples.append(np.diff([0, *sorted(borders), n]))
    lengths, losses = (
        np.split(values, corpus.offsets[1:-1]) for values in (corpus.lengths, corpus.loss_lengths)
    )
    return Corpus.of(corpus.names, lengths, losses, samples=samples)


def conversation_of(corpus: Corpus) -> list[int]:
    """The conversation of each instruction, counted one by one."""
    found: list[int] = []
    for number, (start, end) in enumerate(pairwise(corpus.conversation_starts.tolist())):
        found += [number] * (end - start)
    return found


@given(st.lists(st.integers(1, 4), min_size=1, max_size=9), st.integers(0, 60), st.integers(1, 60))
def test_each_draw_of_a_conversation_takes_its_next_sample(samples, start, count):
    starts = np.cumsum([0, *samples])
    taken: Counter[int] = Counter()
    expected = []
    for conversation in mixture.draws(3, 1, len(samples), 0, start + count).tolist():
        sample = (conversation + taken[conversation]) % samples[conversation]
        expected.append(starts[conversation] + sample)
        taken[conversation] += 1
    drawn = mixture.sample_draws(3, 1, starts, start, count)
    assert drawn.tolist() == expected[start:]


def test_weighted_sources_take_the_next_sample_of_each_conversation():
    samples = [1, 3, 2, 4, 1]  # two conversations in the first source, three in the second
    starts = np.cumsum([0, *samples])
    sources, shares = np.array([0, 2, 5]), np.array([0.75, 0.25])
    drawn = mixture.WeightedSources(sources, shares, starts).draws(0, 0, 0, 400)
    taken: dict[int, list[int]] = defaultdict(list)
    for sample in drawn.tolist():
        conversation = int(np.searchsorted(starts, sample, side="right")) - 1
        taken[conversation].append(sample - starts[conversation])
    assert sum(len(taken[c]) for c in (0, 1)) == 300
    for conversation, found in taken.items():
        first = conversation if conversation < 2 else conversation - 2  # its number in the source
        assert found == [(first + n) % samples[conversation] for n in range(len(found))]


@settings(max_examples=60)
@given(split_corpora(), switches(), st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_no_row_holds_two_samples_of_a_conversation(corpus, chosen, seed, epoch):
    data = data_section(len(corpus.names), **chosen)
    plan = plan_or_reject(corpus, data, seed, epoch)
    owner = conversation_of(corpus)
    for row in rows_of(plan):
        held = [owner[instruction] for group in row for instruction in group]
        assert len(held) == len(set(held))
        assert sum(int(corpus.lengths[i]) for group in row for i in group) <= data.sequence_length


@settings(max_examples=60)
@given(split_corpora(), switches(), st.integers(0, 3))
def test_every_drawn_sample_stands_in_the_plan_once_more_or_is_left_out(corpus, chosen, epoch):
    data = data_section(len(corpus.names), **chosen)
    plan = plan_or_reject(corpus, data, 5, epoch)
    planned = Counter(plan.instructions.tolist()) + Counter(plan.unplaced.tolist())
    drawn = mixture.draw_groups(corpus, data, 5, epoch)
    assert planned == Counter(drawn[drawn >= 0].tolist())


@pytest.mark.parametrize("sampling", ["balanced", "proportional"])
def test_small_domains_of_split_conversations_fill_their_rows(sampling):
    rng = np.random.default_rng(0)
    counts, samples = (600, 40, 5), (1, 4, 3)
    lengths = [rng.integers(8, 60, n * m) for n, m in zip(counts, samples, strict=True)]
    of_each = [np.full(n, m) for n, m in zip(counts, samples, strict=True)]
    corpus = Corpus.of(NAMES[:3], lengths, [domain // 2 for domain in lengths], samples=of_each)
    chunk_size = {} if sampling == "balanced" else {"chunk_size": 1}
    plan = plan_epoch(corpus, data_section(3, 600, sampling=sampling, **chunk_size), 0, 0)
    owner = np.array(conversation_of(corpus))
    for row in rows_of(plan):
        held = owner[np.concatenate(row)]
        assert len(held) == len(set(held.tolist()))
    least = 600 // 5 if sampling == "balanced" else -(-plan.tokens // 600)
    assert plan.rows <= 1.02 * least + 1
    if sampling == "balanced":  # 120 draws of each of the five conversations: 40 of each sample
        occurrences = np.bincount(plan.instructions, minlength=len(owner))
        assert occurrences[-15:].tolist() == [40] * 15


@pytest.mark.parametrize(
    "switches",
    [
        {"sampling": "balanced"},
        {"sampling": "weights", "weights": [1, 4, 4], "chunk_size": 1},
        {"sampling": "weights", "weights": [1, 4, 4], "chunk_size": 3},
    ],
    ids=["balanced", "one by one", "in threes"],
)
def test_swaps_bring_no_second_sample_into_a_row(switches):
    """The domains are small enough that swaps meet copies, and too large to be dealt out."""
    rng = np.random.default_rng(0)
    counts, samples = (500, 60, 70), (1, 4, 3)
    lengths = [rng.integers(8, 90, n * m) for n, m in zip(counts, samples, strict=True)]
    of_each = [np.full(n, m) for n, m in zip(counts, samples, strict=True)]
    corpus = Corpus.of(NAMES[:3], lengths, [domain // 2 for domain in lengths], samples=of_each)
    plan = plan_epoch(corpus, data_section(3, 500, **switches), 0, 0)
    assert plan.moved_instructions > 0
    owner = np.array(conversation_of(corpus))
    for row in rows_of(plan):
        held = owner[np.concatenate(row)].tolist()
        assert len(held) == len(set(held))


def test_the_epochs_of_a_proportional_mixture_walk_through_the_samples():
    corpus = Corpus.of(("chat",), [np.arange(1, 7)], [np.arange(1, 7)], samples=[[1, 3, 2]])
    data = data_section(1, sampling="proportional")
    epochs = [sorted(plan_epoch(corpus, data, 0, e).instructions.tolist()) for e in range(4)]
    assert epochs == [[0, 2, 4], [0, 3, 5], [0, 1, 4], [0, 2, 5]]


def test_counts_are_of_conversations_and_loss_tokens_of_each_sample_once():
    lengths, losses = [np.array([9, 9, 9]), np.array([9])], [np.array([2, 4, 6]), np.array([8])]
    corpus = Corpus.of(("chat", "code"), lengths, losses, samples=[[1, 2], [1]])
    assert corpus.counts == [2, 1]
    assert corpus.domain_loss_tokens.tolist() == [12, 8]
    assert corpus.loss_tokens_per_draw.tolist() == [(2 + (4 + 6) / 2) / 2, 8]
    data = data_section(2, sampling="proportional")
    plan = plan_epoch(corpus, data, 0, 0)  # takes the second sample of the second conversation
    report = {name: {"read": 2, "dropped": {}, "held_out": 0} for name in corpus.names}
    chat = mixture_statistics(plan, report, data, 1)["domains"]["chat"]
    keys = ("used", "occurrences", "max_repeats", "not_drawn", "loss_tokens")
    assert [chat[key] for key in keys] == [2, 2, 1, 0, 2 + 6]
