"""Same-domain swaps between groups: groups longer than a row are mended, and rows are filled.

Groups are drawn at random, and stay so but for the few instructions that change places here.
"""

from collections import deque
from dataclasses import dataclass

import numpy as np

from moi_jax.data.planning import packing

# Pairs of instructions compared in a round and for one row at most, and rounds at most.
ROUND_PAIRS = 1 << 22
ROW_PAIRS = 1 << 11
ROUNDS = 32
IDLE_ROUNDS = 3  # in a row without a swap: other partners would not help either


@dataclass
class Layout:
    """Groups in rows, changed in place.

    Attributes:
      members: int64[G, W] global instruction numbers of each group, -1 for none.
      row_of: int64[G], the row of each group.
      sizes: int64[R] tokens of each row.
      lengths: int32[instructions + 1] tokens of each instruction; the last is 0, for -1.
      same_column: swap inside a column only (balanced: the members of one domain).
    """

    members: np.ndarray
    row_of: np.ndarray
    sizes: np.ndarray
    lengths: np.ndarray
    same_column: bool

    def __post_init__(self) -> None:
        self._order = np.argsort(self.row_of, kind="stable")
        self._starts = np.append(0, np.cumsum(np.bincount(self.row_of, minlength=len(self.sizes))))

    @property
    def pairs(self) -> int:
        """Pairs of instructions that two rows may swap, at most."""
        groups, width = int(np.diff(self._starts).max()), self.members.shape[1]
        return groups**2 * (width if self.same_column else width**2)

    def places(self, rows: np.ndarray) -> np.ndarray:
        """int64[r, n, C]: the places in `members.ravel()` of rows' instructions, -1 for none.

        An instruction may be swapped with those of its own column of C alone.
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


def shorten(layout: Layout, limit: int, rng: np.random.Generator) -> None:
    """Swaps instructions of rows over `limit` tokens with rows that keep within it.

    A row that no swap makes fit stays too long.
    """
    idle = 0
    for _ in range(ROUNDS):
        long = rng.permutation(np.flatnonzero(layout.sizes > limit))
        idle = 0 if _round(layout, long, limit, rng) else idle + 1
        if not len(long) or idle == IDLE_ROUNDS:
            return


def _round(layout: Layout, long: np.ndarray, limit: int, rng: np.random.Generator) -> int:
    """One swap for every row that is too long; returns how many were made.

    Each is compared with random rows of its own that have room (the fewer long rows, the more
    partners each sees; the more room, the likelier). It takes the first swap that makes it fit;
    where there is none, the one that shortens it most.
    """
    roomy = np.flatnonzero(layout.sizes < limit)
    # Partners are given out disjointly, so the swaps of a round do not disturb one another.
    most = min(len(roomy), max(1, ROUND_PAIRS // layout.pairs))
    long = long[:most]
    if not len(long):
        return 0
    ours = layout.places(long)  # [l, m, C]
    each = max(1, min(most // len(long), ROW_PAIRS // layout.pairs))
    partners = _by_room(roomy, limit - layout.sizes[roomy], len(long) * each, rng)
    partners = partners.reshape(each, len(long)).T.ravel()
    theirs = layout.places(partners).reshape(len(long), each, -1, ours.shape[2])
    # How much shorter the row gets, and the partner longer: [l, each, m, n, C].
    a, b = layout.numbers(ours)[:, None, :, None], layout.numbers(theirs)[:, :, None]
    gain = layout.lengths[a] - layout.lengths[b]
    room = (limit - layout.sizes[partners]).reshape(len(long), each, 1, 1, 1)
    gain[(gain > room) | (a < 0) | (b < 0)] = 0
    shape = gain.shape[1:]
    gain = gain.reshape(len(long), -1)
    enough = gain >= (layout.sizes[long] - limit)[:, None]
    choice = np.where(enough.any(axis=1), enough.argmax(axis=1), gain.argmax(axis=1))
    index = np.arange(len(long))
    partner, i, j, column = np.unravel_index(choice, shape)
    left, right = ours[index, i, column], theirs[index, partner, j, column]
    taken = gain[index, choice]
    ours_stand, theirs_stand = layout.numbers(ours), layout.numbers(theirs[index, partner])
    flat = layout.members.reshape(-1)
    copies = (ours_stand == flat[right][:, None, None]).any(axis=(1, 2))
    copies |= (theirs_stand == flat[left][:, None, None]).any(axis=(1, 2))
    done = np.flatnonzero((taken > 0) & ~copies)
    left, right, taken = left[done], right[done], taken[done]
    flat[left], flat[right] = flat[right], flat[left]
    layout.sizes[long[done]] -= taken
    layout.sizes[partners.reshape(-1, each)[done, partner[done]]] += taken
    return len(done)


def repair_groups(
    members: np.ndarray,
    lengths: np.ndarray,
    sequence_length: int,
    same_column: bool,
    rng: np.random.Generator,
) -> np.ndarray:
    """Makes groups fit a row by swapping members with groups that fit and keep fitting.

    Args:
      members: int64[G, W] global instruction numbers; not changed.
      lengths: int32[instructions] tokens of each instruction.
      same_column: swap inside a column only (balanced: the members of one domain).

    Returns:
      Members of the groups now: `members` itself where all of them fit; else a copy, in which
      those that nothing made fit are still too long.
    """
    lengths = np.append(lengths, np.int32(0))
    sizes = lengths[members].sum(axis=1, dtype=np.int64)
    if not (sizes > sequence_length).any():
        return members
    members = members.copy()
    layout = Layout(members, np.arange(len(members)), sizes, lengths, same_column)
    shorten(layout, sequence_length, rng)
    return members


def _by_room(
    rows: np.ndarray, room: np.ndarray, count: int, rng: np.random.Generator
) -> np.ndarray:
    """`count` of the rows, drawn without replacement with chances in proportion to their room.

    By exponential keys (Efraimidis and Spirakis 2006).
    """
    keys = rng.standard_exponential(len(rows)) / room
    if count < len(rows):
        nearest = np.argpartition(keys, count)[:count]
        rows, keys = rows[nearest], keys[nearest]
    return rows[np.argsort(keys)]


# Share of the tokens' room that filling aims at: the fewer tokens are left free, the harder the
# last swaps are to find.
AIM = 0.999
HOSTS_TRIED = 6  # rows a group is moved to, one after another
WORTH = 0.9  # share of the emptied rows that must be saved: hopeless tries move a lot for little


def fill_rows(
    members: np.ndarray,
    row_of: np.ndarray,
    lengths: np.ndarray,
    sequence_length: int,
    same_column: bool,
    rng: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """Takes rows away and finds room for their groups in the others, by swaps.

    Whole groups leave gaps too small for another group. The rows with the largest gaps are
    emptied; each of their groups moves to another row with a gap, which is then too long, and
    swaps instructions for shorter ones of rows that still have room. Where that saves fewer
    rows than it was worth, it is tried with half as many, or with as many as were saved.

    Args:
      members: int64[G, W] global instruction numbers.
      row_of: int64[G], the row of each group.
      lengths: int32[instructions] tokens of each instruction.
      same_column: swap inside a column only (balanced: the members of one domain).

    Returns:
      members and row_of now.
    """
    lengths = np.append(lengths, np.int32(0))
    tokens, rows = int(lengths[members].sum(dtype=np.int64)), int(row_of.max()) + 1
    emptied = rows - -(-tokens // int(sequence_length * AIM))
    while emptied > 0:
        filled, now = _without_rows(
            members, row_of, emptied, lengths, sequence_length, same_column, rng
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
) -> tuple[np.ndarray, np.ndarray]:
    """One try of `fill_rows`: members and row_of after so many rows were emptied.

    A group whose host stays too long moves on to another one. Those that find no room stand in
    rows of their own.
    """
    members = members.copy()
    by_size = np.argsort(np.bincount(row_of, weights=lengths[members].sum(axis=1)), kind="stable")
    number = np.full(len(by_size), -1)
    number[by_size[emptied:]] = np.arange(len(by_size) - emptied)  # the emptiest host first
    row_of, hosts = number[row_of], np.arange(len(by_size) - emptied)
    for _ in range(HOSTS_TRIED):
        guests = _host(members, row_of, lengths, hosts)
        if not len(guests):
            break
        hosts = np.setdiff1d(hosts, row_of[guests])
        placed = np.flatnonzero(row_of >= 0)
        inside = members[placed]
        sizes = np.bincount(row_of[placed], weights=lengths[inside].sum(axis=1)).astype(np.int64)
        layout = Layout(inside, row_of[placed], sizes, lengths, same_column)
        shorten(layout, sequence_length, rng)
        members[placed] = inside
        row_of[guests[layout.sizes[row_of[guests]] > sequence_length]] = -1
        hosts = hosts[np.argsort(layout.sizes[hosts], kind="stable")]
    outside = np.flatnonzero(row_of < 0)
    if len(outside):
        sizes = lengths[members[outside]].sum(axis=1, dtype=np.int64)
        own = packing.best_fit(members[outside], sizes, sequence_length)
        row_of[outside] = int(row_of.max()) + 1 + own
    return members, row_of


def _host(
    members: np.ndarray, row_of: np.ndarray, lengths: np.ndarray, hosts: np.ndarray
) -> np.ndarray:
    """Gives groups without a row (-1) a host of its own, in order, that holds none of its members.

    Sets row_of of those that found one, in place, and returns them.
    """
    homeless = np.flatnonzero(row_of < 0)
    homeless = homeless[np.argsort(-lengths[members[homeless]].sum(axis=1), kind="stable")]
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
