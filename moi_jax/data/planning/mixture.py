"""Sampling: which instructions form a group, and in which order.

The groups of an epoch are an int64[G, W] matrix of global instruction numbers; -1 fills up the
last group if it is shorter. Example: balanced sampling of 3 chat instructions (numbers 0 to 2) and
2 code instructions (numbers 3 and 4) gives

    [[1, 4], [0, 3], [2, 3]]
"""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise

import numpy as np

from moi_jax.common.errors import UserError
from moi_jax.config import Data
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.packing import conversations


class RandomStream(IntEnum):
    """The random streams of the plan, each with the rest of its key [seed, stream, ...]."""

    SAMPLING = 1  # domain, block, source + 1 or 0: the permutations that draws follow
    UNION = 2  # epoch, stage: the order of the sampled stream over all domains
    REPAIR = 3  # epoch, stage: the partners tried for groups longer than a row
    MEMBERS = 4  # epoch, stage: the order inside a group (order: shuffled)
    ROWS = 5  # epoch, stage: the order of the rows
    FILL = 6  # epoch, stage: the partners tried to fill rows
    SOURCES = 7  # domain, block: the order of a domain's weighted sources
    GROUPS = 8  # epoch, stage: the order of the groups inside a row


def generator(seed: int, stream: RandomStream, *key: int) -> np.random.Generator:
    """The generator of a stream; the same key gives the same numbers on every host."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, *key])))


# Permutations are made in blocks of about this many draws, so that repeating a tiny set is cheap.
BLOCK = 1 << 16


def draws(seed: int, domain: int, n: int, start: int, count: int, source: int = 0) -> np.ndarray:
    """Draws number `start` to `start + count` from a domain of n instructions, over all epochs.

    Draw j is element j mod n of the domain's seeded permutation number j // n, so the counts of
    two instructions never differ by more than one.

    Args:
      source: 0 for a whole domain; 1, 2, ... for one of its weighted sources.

    Returns:
      int64[count] of numbers 0 <= i < n.
    """
    permutations = max(1, BLOCK // n)
    size = permutations * n
    drawn = np.empty(count, np.int64)
    for block in range(start // size, -(-(start + count) // size)):
        table = np.broadcast_to(np.arange(n), (permutations, n))
        stream = generator(seed, RandomStream.SAMPLING, domain, block, source)
        order = stream.permuted(table, axis=1).ravel()
        # The part of this block that is wanted, as numbers of draws.
        first, last = max(start, block * size), min(start + count, (block + 1) * size)
        drawn[first - start : last - start] = order[first - block * size : last - block * size]
    return drawn


def sample_draws(
    seed: int, domain: int, samples: np.ndarray, start: int, count: int, source: int = 0
) -> np.ndarray:
    """Like `draws`, with the sample that each draw takes of its conversation.

    Draw number j, which is of permutation number j // n, takes sample (j // n + c) mod m of
    conversation number c, which has m samples. So each draw of a conversation takes its next
    sample, and already the first epoch has early and late turns.

    Args:
      samples: int64[n + 1], where the samples of each of the n conversations begin.

    Returns:
      int64[count] of numbers of samples.
    """
    n = len(samples) - 1
    conversations = draws(seed, domain, n, start, count, source)
    rounds = np.arange(start, start + count) // n
    return samples[conversations] + (rounds + conversations) % np.diff(samples)[conversations]


@dataclass(frozen=True)
class WeightedSources:
    """A domain whose sources are drawn from by weight, whatever their sizes.

    Attributes:
      starts: int64[sources + 1]; conversation i of source s is starts[s] + i of the domain.
      shares: float64[sources]; their sum is 1.
      samples: int64[n + 1], where the samples of each conversation of the domain begin.
    """

    starts: np.ndarray
    shares: np.ndarray
    samples: np.ndarray

    def draws(self, seed: int, domain: int, start: int, count: int) -> np.ndarray:
        """Like `sample_draws`; counts differ by at most one within each source."""
        drawn = np.empty(count, np.int64)
        for block in range(start // BLOCK, -(-(start + count) // BLOCK)):
            before, after = self._taken(block * BLOCK), self._taken((block + 1) * BLOCK)
            labels = np.repeat(np.arange(len(self.shares)), after - before)
            generator(seed, RandomStream.SOURCES, domain, block).shuffle(labels)
            whole = np.empty(BLOCK, np.int64)
            for source, (begin, end) in enumerate(pairwise(self.starts.tolist())):
                samples = self.samples[begin : end + 1]
                first, taken = int(before[source]), int(after[source] - before[source])
                whole[labels == source] = sample_draws(
                    seed, domain, samples, first, taken, source + 1
                )
            first, last = max(start, block * BLOCK), min(start + count, (block + 1) * BLOCK)
            drawn[first - start : last - start] = whole[first % BLOCK :][: last - first]
        return drawn

    def _taken(self, draws: int) -> np.ndarray:
        """int64[sources]: how many of the domain's first `draws` draws are from each source."""
        taken = np.floor(draws * self.shares).astype(np.int64)
        taken[np.argmax(self.shares)] += draws - taken.sum()
        return taken

    def size(self, epoch_end: str) -> int:
        """Draws until the last (longest) or the first (shortest) source is used up once."""
        ends = np.diff(self.starts) / self.shares
        return max(1, int(np.ceil(ends.max()) if epoch_end == "longest" else np.floor(ends.min())))


def weighted_sources(corpus: Corpus, data: Data, domain: int) -> WeightedSources | None:
    """The domain's sources if their weights matter; None if all weights are 1."""
    starts = corpus.source_starts[domain]
    weights = np.array([source.weight for source in data.domains[domain].sources])
    if (weights == 1.0).all():
        return None
    if (np.diff(starts) == 0).any():
        raise UserError(
            f"a weighted source of domain {data.domains[domain].name} has no training "
            f"instruction; remove the source, or remove the weights of the domain's sources"
        )
    return WeightedSources(starts, weights / weights.sum(), corpus.samples(domain))


def asked_shares(corpus: Corpus, data: Data) -> np.ndarray:
    """float64[domains]: the share of each domain that the config asks for, in data.unit."""
    sizes = np.array(corpus.counts, np.float64)
    if data.sampling == "balanced":
        wanted = np.ones(len(sizes))
    elif data.sampling == "weights":
        wanted = np.array([domain.weight for domain in data.domains])
        wanted = np.where(sizes > 0, wanted, 0)
    else:
        if data.unit == "loss_tokens":
            sizes = corpus.domain_loss_tokens.astype(np.float64)
        wanted = sizes ** (1 / data.temperature if data.sampling == "temperature" else 1)
    return wanted / max(wanted.sum(), 1e-300)


def epoch_counts(corpus: Corpus, data: Data) -> np.ndarray:
    """int64[domains]: the number of draws of each domain in an epoch.

    balanced: for every domain, the size of the largest one (epoch_end: longest) or of the smallest
    one (shortest). proportional: every instruction once. weights, temperature: in the shares asked
    for, until the last domain (longest) or the first one (shortest) is used up once.

    Raises:
      UserError: there is nothing to draw from.
    """
    if not sum(corpus.counts):
        raise UserError(
            "no domain has a training instruction; check data.domains and the dropped rows"
        )
    if data.sampling == "proportional":
        return np.array(corpus.counts, np.int64)
    if data.sampling == "balanced" and 0 in corpus.counts:
        name = data.domains[corpus.counts.index(0)].name
        raise UserError(
            f"domain {name} has no training instruction, but sampling: balanced needs one in every "
            f"chunk; remove the domain or add sources to it"
        )
    shares = asked_shares(corpus, data)
    if data.unit == "loss_tokens":
        tokens = corpus.loss_tokens_per_draw
        shares = np.divide(shares, tokens, out=np.zeros(len(shares)), where=tokens > 0)
        shares /= shares.sum()
    assert data.epoch_end is not None  # resolved by the config
    weighted = [weighted_sources(corpus, data, domain) for domain in range(len(shares))]
    sizes = np.array(
        [w.size(data.epoch_end) if w else n for w, n in zip(weighted, corpus.counts, strict=True)]
    )
    drawn = shares > 0
    total = (max if data.epoch_end == "longest" else min)(sizes[drawn] / shares[drawn])
    return np.where(drawn, np.maximum(np.rint(total * shares), 1), 0).astype(np.int64)


def _labels(
    counts: np.ndarray, data: Data, seed: int, epoch: int, stage: int, groups: int | None
) -> np.ndarray:
    """int16[draws]: the domain of each draw, in the order of the sampled stream."""
    assert data.chunk_size is not None  # resolved by the config
    labels = np.repeat(np.arange(len(counts), dtype=np.int16), counts)
    generator(seed, RandomStream.UNION, epoch, stage).shuffle(labels)
    return labels if groups is None else labels[: groups * data.chunk_size]


def draw_counts(
    corpus: Corpus, data: Data, seed: int, epoch: int, stage: int, groups: int | None
) -> np.ndarray:
    """int64[domains]: how often `draw_groups` draws from each domain."""
    counts = epoch_counts(corpus, data)
    if groups is None:
        return counts
    if data.sampling == "balanced":
        return np.full(len(counts), groups)
    labels = _labels(counts, data, seed, epoch, stage, groups)
    return np.bincount(labels, minlength=len(counts))


def draw_groups(
    corpus: Corpus,
    data: Data,
    seed: int,
    epoch: int,
    stage: int = 0,
    first_draws: np.ndarray | int = 0,
    groups: int | None = None,
) -> np.ndarray:
    """Draws the groups of an epoch; they are not repaired yet, nor their members put in order.

    balanced: group c (a chunk) holds draw c of each domain; columns are domains in config order.
    Otherwise a group is data.chunk_size consecutive instructions of a random stream over all
    domains, in which each domain's instructions are in draw order.

    Args:
      first_draws: int64[domains], draws of each domain before epoch 0 of this stage.
      groups: draw only this number of groups, the first ones.

    Returns:
      int64[G, W] global instruction numbers, W = number of domains or data.chunk_size.

    Raises:
      UserError: there is nothing to draw from.
    """
    counts = epoch_counts(corpus, data)
    starts = first_draws + epoch * counts

    def drawn(domain: int, count: int) -> np.ndarray:
        start = int(starts[domain])
        weighted = weighted_sources(corpus, data, domain)
        if weighted:
            return weighted.draws(seed, domain, start, count)
        return sample_draws(seed, domain, corpus.samples(domain), start, count)

    if data.sampling == "balanced":
        chunks = int(counts[0]) if groups is None else groups
        members = np.empty((chunks, len(counts)), np.int64)
        for domain in range(len(counts)):
            members[:, domain] = drawn(domain, chunks)
        return members
    assert data.chunk_size is not None  # resolved by the config
    labels = _labels(counts, data, seed, epoch, stage, groups)
    of_domain = np.bincount(labels, minlength=len(counts)).tolist()
    stream = np.empty(len(labels), np.int64)
    stream[np.argsort(labels, kind="stable")] = np.concatenate(
        [drawn(domain, count) for domain, count in enumerate(of_domain) if count]
    )
    missing = -len(stream) % data.chunk_size
    members = np.pad(stream, (0, missing), constant_values=-1).reshape(-1, data.chunk_size)
    if data.chunk_size > 1 and data.repeat_in_row == "forbid":
        # Also with fewer draws than instructions: an epoch may end one permutation of a domain and
        # begin the next.
        rng = generator(seed, RandomStream.UNION, epoch, stage, 1)
        _separate_copies(members, corpus.conversation_of, rng)
    return members


def _separate_copies(
    members: np.ndarray, conversation_of: np.ndarray | None, rng: np.random.Generator
) -> None:
    """Swaps conversations that occur twice in their group with those of other groups, in place.

    A copy is left out (-1) if every group holds its conversation: a group of four has no other
    choice if its domain has only three.

    Args:
      conversation_of: see `Corpus.conversation_of`.
    """
    for _ in range(SEPARATING_ROUNDS):
        group, column = _copies(conversations(members, conversation_of))
        if not len(group):
            return
        other = rng.integers(len(members), size=len(group))
        other_column = rng.integers(members.shape[1])
        # One after another: two copies may have the same partner.
        for g, c, o in zip(group.tolist(), column.tolist(), other.tolist(), strict=True):
            if members[o, other_column] >= 0:
                members[g, c], members[o, other_column] = members[o, other_column], members[g, c]
    held = conversations(members, conversation_of)
    group, column = _copies(held)
    copies = held[group, column]
    for copy in np.unique(copies):
        mine = np.flatnonzero(copies == copy)
        held = conversations(members, conversation_of)
        without = rng.permutation(np.flatnonzero((held != copy).all(axis=1)))
        # A full group without it has a member to give: it has more different ones.
        for index, other in zip(mine, without, strict=False):
            g = group[index]
            ours, theirs = conversations(members[[g, other]], conversation_of)
            where = np.flatnonzero(ours == copy)
            if len(where) == 1:  # an earlier swap has taken the other one
                continue
            give = np.flatnonzero(~np.isin(theirs, ours))
            if len(give):
                here, there = (g, where[-1]), (other, give[0])
                members[here], members[there] = members[there], members[here]
    members[_copies(conversations(members, conversation_of))] = -1


def _copies(members: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(groups, columns) of the members that occur in their group before."""
    order = np.argsort(members, axis=1, kind="stable")
    ordered = np.take_along_axis(members, order, axis=1)
    group, place = np.nonzero((ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0))
    return group, order[group, place + 1]


SEPARATING_ROUNDS = 32


def group_sizes(members: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64[G]: the tokens of each group, from members int64[G, W] and lengths int32[I]."""
    return with_none(lengths)[members].sum(axis=1, dtype=np.int64)


def with_none(values: np.ndarray) -> np.ndarray:
    """Values of instructions with a 0 at the end: the index -1 of a missing member finds the 0."""
    return np.append(values, values.dtype.type(0))


def order_members(
    members: np.ndarray, counts: Sequence[int], data: Data, seed: int, epoch: int, stage: int = 0
) -> np.ndarray:
    """Sorts the members of each group by data.order.

    Ties keep draw order; missing members (-1) come last.

    Args:
      members: int64[G, W] global instruction numbers.
      counts: the number of training instructions of each domain, samples counted apart.

    Returns:
      int64[G, W].
    """
    if data.order == "shuffled":
        ranks = generator(seed, RandomStream.MEMBERS, epoch, stage).random(
            members.shape, np.float32
        )
        ranks[members < 0] = 2.0
    else:
        domain_ranks = np.arange(len(counts), dtype=np.int16)
        if data.order == "default_first":
            names = [domain.name for domain in data.domains]
            domain_ranks[names.index(data.default_domain)] = -1
        ranks = np.append(np.repeat(domain_ranks, counts), np.int16(len(counts)))[members]
    return np.take_along_axis(members, ranks.argsort(axis=1, kind="stable"), axis=1)
