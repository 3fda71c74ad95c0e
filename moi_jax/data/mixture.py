"""Which instructions meet in a group: draws of each domain, groups of an epoch, long groups mended.

A group is one line of an int64[G, W] matrix of global instruction numbers (domain-major: the
instructions of domain 0, then those of domain 1, ...); -1 fills up a last group that is shorter.
"""

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

import numpy as np

from moi_jax.config import Data
from moi_jax.errors import UserError


class Stream(IntEnum):
    """Every random stream of the plan, with what follows it in the key [seed, stream, ...]."""

    SAMPLING = 1  # domain, block: the permutations a domain's draws follow
    UNION = 2  # epoch: the order of the sampled stream over all domains (proportional)
    REPAIR = 3  # epoch: the partners tried for groups longer than a row
    MEMBERS = 4  # epoch: the order inside a group (order: shuffled)
    ROWS = 5  # epoch: the order of the rows


def generator(seed: int, stream: Stream, *key: int) -> np.random.Generator:
    """The generator of one stream; the same key gives the same numbers on every host."""
    return np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, stream, *key])))


# Permutations are made in blocks of about this many draws, so that cycling a tiny set is cheap.
BLOCK = 1 << 16


def draws(seed: int, domain: int, n: int, start: int, count: int) -> np.ndarray:
    """Draws `start` to `start + count` of a domain of n instructions, over all epochs.

    Draw j is element j mod n of the domain's seeded permutation number j // n, so the counts of
    two instructions never differ by more than one.

    Returns:
      int64[count], each 0 <= i < n.
    """
    permutations = max(1, BLOCK // n)
    size = permutations * n
    drawn = np.empty(count, np.int64)
    for block in range(start // size, -(-(start + count) // size)):
        table = np.broadcast_to(np.arange(n), (permutations, n))
        order = generator(seed, Stream.SAMPLING, domain, block).permuted(table, axis=1).ravel()
        # The part of this block that was asked for, in numbers of all draws.
        first, last = max(start, block * size), min(start + count, (block + 1) * size)
        drawn[first - start : last - start] = order[first - block * size : last - block * size]
    return drawn


def draw_groups(counts: Sequence[int], data: Data, seed: int, epoch: int) -> np.ndarray:
    """The groups of an epoch in draw order, before repair and before the order inside a group.

    balanced: chunk c holds draw epoch * C + c of each domain, C the size of the largest domain
    (epoch_end: longest) or of the smallest; columns are domains in config order.
    proportional: every instruction once, data.chunk_size consecutive ones of a random stream.

    Args:
      counts: training instructions of each domain, in config order.

    Returns:
      int64[G, W] global instruction numbers, W = number of domains or data.chunk_size.

    Raises:
      UserError: there is nothing to draw from.
    """
    offsets = np.cumsum([0, *counts])
    if not sum(counts):
        raise UserError("no domain has a training instruction; check data.domains and the drops")
    if data.sampling == "balanced":
        if empty := [data.domains[d].name for d, n in enumerate(counts) if not n]:
            raise UserError(
                f"domain {empty[0]} has no training instruction, and sampling: balanced needs one "
                f"in every chunk; remove the domain or add sources"
            )
        chunks = max(counts) if data.epoch_end == "longest" else min(counts)
        members = np.empty((chunks, len(counts)), np.int64)
        for domain, n in enumerate(counts):
            members[:, domain] = draws(seed, domain, n, epoch * chunks, chunks) + offsets[domain]
        return members
    assert data.chunk_size is not None  # resolved by the config
    # Draws epoch * n to (epoch + 1) * n of a domain are each of its n instructions once.
    stream = generator(seed, Stream.UNION, epoch).permutation(sum(counts))
    missing = -len(stream) % data.chunk_size
    return np.pad(stream, (0, missing), constant_values=-1).reshape(-1, data.chunk_size)


def group_sizes(members: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Tokens of each group: int64[G] of members int64[G, W] and lengths int32[N]."""
    return with_none(lengths)[members].sum(axis=1, dtype=np.int64)


def with_none(values: np.ndarray) -> np.ndarray:
    """Values of instructions with a 0 at the end, which the number -1 of a missing member finds."""
    return np.append(values, values.dtype.type(0))


class Repaired(NamedTuple):
    """Groups that all fit a row: members int64[G, W], and what it took."""

    members: np.ndarray
    moved: int  # instructions in `members` that stand in another group than they were drawn for
    unplaced_groups: int
    unplaced_instructions: int


# Work of one round of the repair, in pairs of members compared; and rounds at most.
ROUND_PAIRS = 1 << 18
ROUNDS = 32


def repair(
    members: np.ndarray,
    lengths: np.ndarray,
    sequence_length: int,
    same_column: bool,
    rng: np.random.Generator,
) -> Repaired:
    """Makes groups fit a row by swapping members with groups that fit and keep fitting.

    Args:
      members: int64[G, W] global instruction numbers; not changed.
      lengths: int32[N] tokens of each instruction.
      same_column: swap inside a column only (balanced: the members of one domain).
    """
    lengths = with_none(lengths)
    sizes = lengths[members].sum(axis=1, dtype=np.int64)
    if not (sizes > sequence_length).any():
        return Repaired(members, 0, 0, 0)
    width = members.shape[1]
    ours, theirs = np.arange(width), np.arange(width)
    if not same_column:
        ours, theirs = np.repeat(ours, width), np.tile(theirs, width)
    drawn, members = members, members.copy()
    for _ in range(ROUNDS):
        if not _swap_round(members, sizes, lengths, sequence_length, ours, theirs, rng):
            break
    fits = sizes <= sequence_length
    moved = np.count_nonzero((members != drawn)[fits])
    unplaced = np.count_nonzero(members[~fits] >= 0)
    return Repaired(members[fits], int(moved), int(np.count_nonzero(~fits)), int(unplaced))


def _swap_round(
    members: np.ndarray,
    sizes: np.ndarray,
    lengths: np.ndarray,
    sequence_length: int,
    ours: np.ndarray,
    theirs: np.ndarray,
    rng: np.random.Generator,
) -> bool:
    """One swap for every group that is too long, in place; False if there was none to make.

    Each is compared with random fitting groups of its own (the fewer long groups, the more
    partners each sees). It takes the first swap that makes it fit; where there is none, the one
    that shortens it most. Pair p swaps our column ours[p] with the partner's column theirs[p].
    """
    long = rng.permutation(np.flatnonzero(sizes > sequence_length))
    fitting = np.flatnonzero(sizes <= sequence_length)
    long = long[: len(fitting)]
    if not len(long):
        return False
    # Partners are given out disjointly, so the swaps of a round do not disturb one another.
    each = max(1, min(len(fitting), ROUND_PAIRS // len(ours)) // len(long))
    partners = rng.choice(fitting, len(long) * each, replace=False).reshape(-1, each)
    a, b = members[long][:, None, ours], members[partners][:, :, theirs]
    # How much shorter the group gets, and the partner longer: [long, each, pairs].
    gain = lengths[a] - lengths[b]
    room = sequence_length - sizes[partners]
    gain[(gain > room[:, :, None]) | (a < 0) | (b < 0)] = 0
    gain = gain.reshape(len(long), -1)
    enough = gain >= (sizes[long] - sequence_length)[:, None]
    choice = np.where(enough.any(axis=1), enough.argmax(axis=1), gain.argmax(axis=1))
    taken = gain[np.arange(len(long)), choice]
    found = np.flatnonzero(taken > 0)
    partner, pair = np.divmod(choice[found], len(ours))
    left, right = long[found], partners[found, partner]
    i, j = ours[pair], theirs[pair]
    members[left, i], members[right, j] = members[right, j], members[left, i]
    sizes[left] -= taken[found]
    sizes[right] += taken[found]
    return len(found) > 0


def order_members(
    members: np.ndarray, counts: Sequence[int], data: Data, seed: int, epoch: int
) -> np.ndarray:
    """Puts each group's members in data.order; ties keep draw order, missing members stay last.

    Args:
      members: int64[G, W] global instruction numbers.
      counts: training instructions of each domain, in config order.
    """
    if data.order == "shuffled":
        ranks = generator(seed, Stream.MEMBERS, epoch).random(members.shape, np.float32)
        ranks[members < 0] = 2.0
    else:
        domain_ranks = np.arange(len(counts), dtype=np.int16)
        if data.order == "default_first":
            names = [domain.name for domain in data.domains]
            domain_ranks[names.index(data.default_domain)] = -1
        ranks = np.append(np.repeat(domain_ranks, counts), np.int16(len(counts)))[members]
    return np.take_along_axis(members, ranks.argsort(axis=1, kind="stable"), axis=1)
