"""Swaps of instructions between groups: they repair groups longer than a row, and fill rows.

Groups are drawn at random and stay so, except for the few instructions that are swapped here.
"""

import math
from collections import deque
from dataclasses import dataclass

import numpy as np

from moi_jax.data.planning import packing

# Limits: pairs of instructions compared in a round, pairs compared for one row, and rounds.
ROUND_PAIRS = 1 << 22
ROW_PAIRS = 1 << 11
ROUNDS = 32
IDLE_ROUNDS = 3  # in a row without a swap: other partners would not help either


@dataclass
class Layout:
    """Groups in rows; swaps change it in place.

    Attributes:
      members: int64[G, W] global instruction numbers of each group, -1 for none.
      row_of: int64[G], the row of each group.
      sizes: int64[R], the tokens of each row.
      lengths: int32[instructions + 1], the tokens of each instruction; the last is 0, for -1.
      same_column: swap only within a column (balanced: the instructions of one domain).
      repeats: whether a conversation may stand in two rows, so that a swap could bring it twice
        into one.
      conversation_of: see `Corpus.conversation_of`.
    """

    members: np.ndarray
    row_of: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray
    same_column: bool
    repeats: bool
    conversation_of: np.ndarray | None = None

    def __post_init__(self) -> None:
        self._order = np.argsort(self.row_of, kind="stable")
        self._starts = np.append(0, np.cumsum(np.bincount(self.row_of, minlength=len(self.sizes))))

    @property
    def pairs(self) -> int:
        """The largest number of pairs of instructions that two rows could swap."""
        groups, width = int(np.diff(self._starts).max()), self.members.shape[1]
        return groups**2 * (width if self.same_column else width**2)

    def places(self, rows: np.ndarray) -> np.ndarray:
        """int64[r, n, C]: the indices in `members.ravel()` of the rows' instructions, -1 for none.

        An instruction may be swapped only with those of its own column of C.
        """
        width = self.members.shape[1]
        counts = self._starts[rows + 1] - self._starts[rows]
        slots = np.arange(counts.max())
        groups = self._order[np.minimum(self._starts[rows][:, None] + slots, len(self._order) - 1)]
        places = groups[:, :, None] * width + np.arange(width)
        places[slots >= counts[:, None]] = -1
        return places if self.same_column else places.reshape(len(rows), -1, 1)

    def numbers(self, places: np.ndarray) -> np.ndarray:
        """The instructions at places, -1 for none."""
        return np.where(places < 0, -1, self.members.ravel()[places])


def row_sizes(members: np.ndarray, row_of: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int64[R]: the tokens of each row."""
    return np.bincount(row_of, weights=lengths[members].sum(axis=1)).astype(np.int64)


def shorten(layout: Layout, limit: int, rng: np.random.Generator) -> None:
    """Shortens rows over `limit` tokens by swaps with rows that stay within it.

    A row that no swap can make fit stays too long.
    """
    idle = 0
    for _ in range(ROUNDS):
        long = rng.permutation(np.flatnonzero(layout.sizes > limit))
        idle = 0 if _round(layout, long, limit, rng) else idle + 1
        if not len(long) or idle == IDLE_ROUNDS:
            return


def _round(layout: Layout, long: np.ndarray, limit: int, rng: np.random.Generator) -> int:
    """Makes one swap for every row that is too long; returns the number of swaps.

    Each long row is compared with random partners: rows that have room and are compared with no
    other long row. Rows with more room are likelier partners. The long row takes the first swap
    that makes it fit, or else the swap that shortens it most.
    """
    roomy = np.flatnonzero(layout.sizes < limit)
    # No two long rows share a partner, so the swaps of a round are independent.
    most = min(len(roomy), max(1, ROUND_PAIRS // layout.pairs))
    long = long[:most]
    if not len(long):
        return 0
    ours = layout.places(long)  # [l, m, C]
    each = max(1, min(most // len(long), ROW_PAIRS // layout.pairs))
    partners = _by_room(roomy, limit - layout.sizes[roomy], len(long) * each, rng)
    partners = partners.reshape(each, len(long)).T.ravel()
    theirs = layout.places(partners).reshape(len(long), each, -1, ours.shape[2])
    # The tokens that a swap moves from the row to the partner: [l, each, m, n, C].
    a, b = layout.numbers(ours)[:, None, :, None], layout.numbers(theirs)[:, :, None]
    gain = layout.lengths[a] - layout.lengths[b]
    room = (limit - layout.sizes[partners]).reshape(len(long), each, 1, 1, 1)
    gain[(gain > room) | (a < 0) | (b < 0)] = 0
    excess = layout.sizes[long] - limit
    index, choice = np.arange(len(long)), _choose(gain, excess)
    if layout.repeats:  # what stands in both rows must stay, or one of them would hold it twice
        a, b = (packing.conversations(numbers, layout.conversation_of) for numbers in (a, b))
        taken = np.unravel_index(choice, gain.shape[1:])
        bad = np.flatnonzero(_brings_a_copy(a, b, taken))
        row, partner, i, j, column = np.nonzero((a[bad] == b[bad]) & (a[bad] >= 0))
        gain[bad[row], partner, i, :, column] = 0
        gain[bad[row], partner, :, j, column] = 0
        choice[bad] = _choose(gain[bad], excess[bad])
    partner, i, j, column = np.unravel_index(choice, gain.shape[1:])
    left, right = ours[index, i, column], theirs[index, partner, j, column]
    taken = gain[index, partner, i, j, column]
    done = np.flatnonzero(taken > 0)
    left, right, taken = left[done], right[done], taken[done]
    flat = layout.members.reshape(-1)
    flat[left], flat[right] = flat[right], flat[left]
    layout.sizes[long[done]] -= taken
    layout.sizes[partners.reshape(-1, each)[done, partner[done]]] += taken
    return len(done)


def _choose(gain: np.ndarray, excess: np.ndarray) -> np.ndarray:
    """int64[l]: the flat index of the first gain that is enough for a row, or of the largest one.

    Args:
      gain: int[l, each, m, n, C] tokens.
      excess: int[l], what each row has too much.
    """
    gain = gain.reshape(len(gain), math.prod(gain.shape[1:]))  # there may be no row
    enough = gain >= excess[:, None]
    return np.where(enough.any(axis=1), enough.argmax(axis=1), gain.argmax(axis=1))


def _brings_a_copy(a: np.ndarray, b: np.ndarray, swap: tuple[np.ndarray, ...]) -> np.ndarray:
    """bool[l]: whether a swap brings a conversation into a row that holds it already.

    Args:
      a: int64[l, 1, m, 1, C], the conversations of each row.
      b: int64[l, each, 1, n, C], those of its partners.
      swap: int64[l] each: the partner, the places in the row and in the partner, and the column.
    """
    partner, i, j, column = swap
    index = np.arange(len(a))
    ours, theirs = a[index, 0, :, 0], b[index, partner, 0]  # [l, m, C], [l, n, C]
    left, right = ours[index, i, column], theirs[index, j, column]
    copied = (ours == right[:, None, None]).any(axis=(1, 2))
    return copied | (theirs == left[:, None, None]).any(axis=(1, 2))


def repair_groups(
    members: np.ndarray,
    lengths: np.ndarray,
    sequence_length: int,
    same_column: bool,
    rng: np.random.Generator,
    conversation_of: np.ndarray | None = None,
) -> np.ndarray:
    """Makes groups fit a row by swaps with groups that fit, before and after the swap.

    Example: with lengths [9, 5, 4, 1] and rows of 10 tokens, the groups [[0, 1], [2, 3]] have 14
    and 5 tokens. They become [[2, 1], [0, 3]], with 9 and 10 tokens.

    Args:
      members: int64[G, W] global instruction numbers; not changed.
      lengths: int32[instructions] tokens of each instruction.
      same_column: swap only within a column (balanced: the instructions of one domain).
      conversation_of: see `Corpus.conversation_of`.

    Returns:
      int64[G, W]: `members` itself if all groups fit, otherwise a repaired copy. Groups that no
      swap can make fit are still too long.
    """
    lengths = np.append(lengths, np.int32(0))
    sizes = lengths[members].sum(axis=1, dtype=np.int64)
    if not (sizes > sequence_length).any():
        return members
    members = members.copy()
    # The instructions of a balanced group are of different domains, whatever is swapped.
    rows = np.arange(len(members))
    repeats = not same_column
    layout = Layout(members, rows, sizes, lengths, same_column, repeats, conversation_of)
    shorten(layout, sequence_length, rng)
    if same_column:
        _match_anew(members, lengths, sequence_length, rng)
    return members


# How many groups take part, for each one that is too long, until all of these fit.
TAKE_PART = (8, 32, 128)


def _match_anew(
    members: np.ndarray, lengths: np.ndarray, limit: int, rng: np.random.Generator
) -> None:
    """Matches groups that no swap could mend with others anew, long instructions with short ones.

    It changes `members` in place. Groups that still do not fit stay too long.
    """
    sizes = lengths[members].sum(axis=1, dtype=np.int64)
    long = np.flatnonzero(sizes > limit)
    others = rng.permutation(np.flatnonzero(sizes <= limit))
    fewest = len(long)
    for each in TAKE_PART:
        if not fewest:
            return
        chosen = np.append(long, others[: each * len(long)])
        matched = long_with_short(lengths[members[chosen]])
        matched = np.take_along_axis(members[chosen], matched, axis=0)
        still_long = int(np.count_nonzero(lengths[matched].sum(axis=1) > limit))
        if still_long < fewest:
            members[chosen], fewest = matched, still_long


def long_with_short(lengths: np.ndarray) -> np.ndarray:
    """Matches the values of columns so that the longest row is short: long ones with short ones.

    The columns are added one after another, the most varied one first. Each gives its shortest
    value to the row that is the longest so far.

    Args:
      lengths: int[G, W].

    Returns:
      int64[G, W]: for `np.take_along_axis(lengths, ..., axis=0)`.
    """
    order = np.empty(lengths.shape, np.int64)
    rows = np.zeros(len(lengths), np.int64)
    for column in np.argsort(-lengths.std(axis=0)):
        longest_first = np.argsort(-rows, kind="stable")
        order[longest_first, column] = np.argsort(lengths[:, column], kind="stable")
        rows += lengths[order[:, column], column]
    return order


def _by_room(
    rows: np.ndarray, room: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """Draws `count` rows without replacement, with probabilities in proportion to their room.

    The method is that of exponential keys (Efraimidis and Spirakis 2006).
    """
    keys = rng.standard_exponential(len(rows)) / room
    if count < len(rows):
        nearest = np.argpartition(keys, count)[:count]
        rows, keys = rows[nearest], keys[nearest]
    return rows[np.argsort(keys)]


# The fill that is aimed at. The fewer tokens stay free, the harder it is to find the last swaps.
AIM = 0.999
HOSTS_TRIED = 6  # rows that a group is moved to, one after another
WORTH = 0.9  # share of the emptied rows that a try must save, or it moves many groups for little


def fill_rows(
    members: np.ndarray,
    row_of: np.ndarray,
    lengths: np.ndarray,
    sequence_length: int,
    same_column: bool,
    rng: np.random.Generator,
    most: int | None = None,
    conversation_of: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Removes rows and makes room for their groups in the other rows, by swaps.

    Packing whole groups leaves gaps that are too small for another group. So the rows with the
    largest gaps are emptied. Each of their groups moves to another row with a gap; that row is then
    too long, and swaps instructions for shorter ones of rows that still have room. If this saves
    too few rows, it is tried again with fewer.

    Args:
      members: int64[G, W] global instruction numbers.
      row_of: int64[G], the row of each group.
      lengths: int32[instructions] tokens of each instruction.
      same_column: swap only within a column (balanced: the instructions of one domain).
      most: the largest number of groups in a row; None for any number.
      conversation_of: see `Corpus.conversation_of`.

    Returns:
      The new members and row_of.
    """
    lengths = np.append(lengths, np.int32(0))
    tokens, rows = int(lengths[members].sum(dtype=np.int64)), int(row_of.max()) + 1
    present = packing.conversations(members[members >= 0], conversation_of)
    most_copies = int(np.bincount(present).max())  # each in a row of its own
    emptied = rows - max(-(-tokens // int(sequence_length * AIM)), most_copies)
    while emptied > 0:
        filled, now = _without_rows(
            members,
            row_of,
            emptied,
            lengths,
            sequence_length,
            same_column,
            rng,
            most,
            conversation_of,
        )
        saved = rows - 1 - int(now.max())
        if saved >= WORTH * emptied:
            return filled, now
        emptied = max(saved, emptied // 2)
    return members, row_of


def _without_rows(
    members: np.ndarray,
    row_of: np.ndarray,
    emptied: int,
    lengths: np.ndarray,
    sequence_length: int,
    same_column: bool,
    rng: np.random.Generator,
    most: int | None,
    conversation_of: np.ndarray | None,
) -> tuple[np.ndarray, np.ndarray]:
    """One try of `fill_rows`: the members and row_of after emptying `emptied` rows.

    If its host stays too long, a group moves on to another one. Groups that find no host are
    packed into new rows.
    """
    members = members.copy()
    held = packing.conversations(members, conversation_of)
    repeats = bool(packing.repeated_members(held).any())
    by_size = np.argsort(np.bincount(row_of, weights=lengths[members].sum(axis=1)), kind="stable")
    number = np.full(len(by_size), -1)
    number[by_size[emptied:]] = np.arange(len(by_size) - emptied)  # hosts: the emptiest one first
    row_of, hosts = number[row_of], np.arange(len(by_size) - emptied)
    if most:
        hosts = hosts[np.bincount(row_of[row_of >= 0], minlength=len(hosts)) < most]
    for _ in range(HOSTS_TRIED):
        held = packing.conversations(members, conversation_of)
        guests = _host(held, lengths[members].sum(axis=1), row_of, hosts)
        if not len(guests):
            break
        hosts = np.setdiff1d(hosts, row_of[guests])
        placed = np.flatnonzero(row_of >= 0)
        inside = members[placed]
        sizes = row_sizes(inside, row_of[placed], lengths)
        layout = Layout(
            inside, row_of[placed], sizes, lengths, same_column, repeats, conversation_of
        )
        shorten(layout, sequence_length, rng)
        members[placed] = inside
        row_of[guests[layout.sizes[row_of[guests]] > sequence_length]] = -1
        hosts = hosts[np.argsort(layout.sizes[hosts], kind="stable")]
    outside = np.flatnonzero(row_of < 0)
    if len(outside):
        sizes = lengths[members[outside]].sum(axis=1, dtype=np.int64)
        held = packing.conversations(members[outside], conversation_of)
        own = packing.best_fit(held, sizes, sequence_length, most)
        row_of[outside] = int(row_of.max()) + 1 + own
    return members, row_of


def _host(
    members: np.ndarray, sizes: np.ndarray, row_of: np.ndarray, hosts: np.ndarray
) -> np.ndarray:
    """Assigns a host to each group without a row (-1); no two groups get the same one.

    A host must hold none of the group's members. Longer groups come first, and hosts are tried in
    order. Sets row_of in place, and returns the groups that got a host.

    Args:
      members: int64[G, W] the conversations of each group.
      sizes: int64[G] tokens of each group.
    """
    homeless = np.flatnonzero(row_of < 0)
    homeless = homeless[np.argsort(-sizes[homeless], kind="stable")]
    order = np.argsort(row_of, kind="stable")
    starts = np.searchsorted(row_of[order], hosts)
    ends = np.searchsorted(row_of[order], hosts, side="right")
    guests: list[int] = []
    free = deque(range(len(hosts)))
    for group in homeless.tolist():
        mine = set(members[group][members[group] >= 0].tolist())
        passed: list[int] = []
        while free and len(passed) < packing.ROWS_TRIED:
            host = free.popleft()
            standing = members[order[starts[host] : ends[host]]]
            if mine.isdisjoint(standing.ravel().tolist()):
                row_of[group] = hosts[host]
                guests.append(group)
                break
            passed.append(host)
        free.extendleft(reversed(passed))
    return np.array(guests, np.int64)
