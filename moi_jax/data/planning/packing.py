"""Packing: which groups share a row (best fit, sequential, or one group for each row).

A group is never cut, and the same conversation never occurs twice in a row. Example: groups of 6,
5, 4 and 3 tokens in rows of 10 tokens are packed as 6 + 4 and 5 + 3 by best_fit.
"""

from array import array
from typing import Literal

import numpy as np


def conversations(members: np.ndarray, conversation_of: np.ndarray | None) -> np.ndarray:
    """The conversation of each member, -1 for none.

    Args:
      members: global instruction numbers, -1 for none.
      conversation_of: see `Corpus.conversation_of`; None if each instruction is a conversation.
    """
    return members if conversation_of is None else conversation_of[members]


def pack(
    members: np.ndarray,
    sizes: np.ndarray,
    sequence_length: int,
    packing: Literal["best_fit", "sequential", "none"],
) -> np.ndarray:
    """Assigns every group to a row of sequence_length tokens.

    Args:
      members: int64[G, W] the conversations of each group, -1 for none.
      sizes: int64[G] tokens of each group, 1 <= size <= sequence_length, in draw order.

    Returns:
      int64[G], the row of each group; rows are numbered from 0 in the order of opening.
    """
    if packing == "best_fit":
        return best_fit(members, sizes, sequence_length)
    if packing == "sequential":
        return sequential(members, sizes, sequence_length)
    return np.arange(len(sizes))


def repeated_members(members: np.ndarray) -> np.ndarray:
    """bool[G, W]: True for members that occur more than once in all groups."""
    present = members >= 0
    occurrences = np.bincount(members[present])
    return present & (occurrences[members] > 1)


# How many rows are tried for a group before a new row is opened, if instructions repeat.
ROWS_TRIED = 16


class OpenRows:
    """Rows with free tokens, in one stack for each number of free tokens.

    Bit f of `mask` is set if the stack of rows with f free tokens is not empty. So a shift and the
    lowest set bit give the tightest row for a group, without a search.
    """

    def __init__(self, sequence_length: int):
        self.stacks: list[list[int]] = [[] for _ in range(sequence_length + 1)]
        self.mask = 0

    def push(self, row: int, free: int) -> None:
        stack = self.stacks[free]
        if not stack:
            self.mask |= 1 << free
        stack.append(row)

    def tightest(self, size: int) -> int:
        """The smallest number of free tokens >= size that a row has; -1 if no row has that many."""
        fitting = self.mask >> size
        return size + (fitting & -fitting).bit_length() - 1 if fitting else -1

    def pop(self, free: int, index: int = -1) -> int:
        stack = self.stacks[free]
        row = stack.pop(index)
        if not stack:
            self.mask ^= 1 << free
        return row


class Copies:
    """Knows whether a row already holds an instruction of a group.

    It stores only the instructions that occur more than once: usually few, often none.
    """

    def __init__(self, members: np.ndarray):
        repeated = repeated_members(members)
        self.any = bool(repeated.any())
        self._ids = members[repeated].data
        self._starts = np.append(0, np.cumsum(repeated.sum(axis=1))).data
        # A signature has bit (number mod 61) set for every instruction. If the signatures of a
        # group and a row share no bit, they share no instruction, and nothing else is compared.
        bits = np.where(repeated, 1 << members % 61, 0)
        self._signatures = np.bitwise_or.reduce(bits, axis=1).data
        self._row_signatures = np.zeros(len(members), np.int64).data
        # The groups of a row as a linked list: the last one, and for each group the one before it.
        self._last = np.full(len(members), -1).data
        self._previous = np.full(len(members), -1).data

    def stand_in(self, row: int, group: int) -> bool:
        if not self._signatures[group] & self._row_signatures[row]:
            return False
        ids = set(self._of(group))
        other = self._last[row]
        while other >= 0:
            if not ids.isdisjoint(self._of(other)):
                return True
            other = self._previous[other]
        return False

    def add(self, row: int, group: int) -> None:
        self._row_signatures[row] |= self._signatures[group]
        self._previous[group] = self._last[row]
        self._last[row] = group

    def _of(self, group: int) -> memoryview:
        return self._ids[self._starts[group] : self._starts[group + 1]]


def best_fit(
    members: np.ndarray, sizes: np.ndarray, sequence_length: int, most: int | None = None
) -> np.ndarray:
    """Best-fit decreasing: largest group first, each into the open row with the least free tokens.

    Groups of equal size keep draw order; among equally tight rows the one used last is taken. A row
    that already holds an instruction of the group is skipped for the next tightest one; after
    ROWS_TRIED rows a new row is opened.

    If each group is one instruction, all rows are tried, and the conversations that many rows must
    take come first: for their copies there would be no row left at the end.

    Args:
      members: int64[G, W] the conversations of each group, -1 for none.
      most: the largest number of groups in a row; None for any number.
    """
    copies = Copies(members)
    order, lone = np.argsort(-sizes, kind="stable"), members.shape[1] == 1
    if lone:  # copies one after another, also where the samples of a conversation differ in size
        alone = members[:, 0]
        longest = np.zeros(alone.max() + 1, np.int64)
        np.maximum.at(longest, alone, sizes)
        late = ~_wanted_by_many(members, sizes, sequence_length)
        order = np.lexsort((-sizes, alone, -longest[alone], late))
    # A row that took a copy is held back until the next instruction comes: then no open row holds
    # one, and none has to be searched.
    search = copies.any and not lone
    open_rows = OpenRows(sequence_length)
    takes = array("q")  # how many groups each row still takes
    placed = array("q")
    held: list[tuple[int, int]] = []
    last, rows, most = -1, 0, most or len(sizes)
    kinds = members[order, 0]
    for group, size, kind in zip(order.data, sizes[order].data, kinds.data, strict=True):
        if lone and kind != last:
            for row, free in held:
                open_rows.push(row, free)
            held, last = [], kind
        free, index = open_rows.tightest(size), -1
        if free >= 0 and search:
            free, index = without_copies(open_rows, copies, group, free)
        if free >= 0:
            row = open_rows.pop(free, index)
        else:
            row, free, rows = rows, sequence_length, rows + 1
            takes.append(most)
        if free > size and takes[row] > 1:
            takes[row] -= 1
            if lone:
                held.append((row, free - size))
            else:
                open_rows.push(row, free - size)
        if search:
            copies.add(row, group)
        placed.append(row)
    row_of = np.empty(len(sizes), np.int64)
    row_of[order] = np.frombuffer(placed, np.int64)
    return row_of


MANY = 8  # an instruction with copies for at least one row in so many comes first


def _wanted_by_many(members: np.ndarray, sizes: np.ndarray, sequence_length: int) -> np.ndarray:
    """bool[G]: groups of one instruction that occurs in a good part of the rows."""
    copies = np.bincount(members[:, 0])[members[:, 0]]
    return (copies > 1) & (copies * sequence_length * MANY >= sizes.sum())


def without_copies(open_rows: OpenRows, copies: Copies, group: int, free: int) -> tuple[int, int]:
    """(free, index) of the tightest row that holds none of the group's instructions.

    Args:
      free: the smallest number of free tokens to look at.

    Returns:
      (-1, -1) if there is none among the first ROWS_TRIED rows.
    """
    tried = 0
    while free >= 0:
        stack = open_rows.stacks[free]
        for index in range(len(stack) - 1, -1, -1):
            if not copies.stand_in(stack[index], group):
                return free, index
            tried += 1
            if tried == ROWS_TRIED:
                return -1, -1
        free = open_rows.tightest(free + 1)
    return -1, -1


def sequential(members: np.ndarray, sizes: np.ndarray, sequence_length: int) -> np.ndarray:
    """Next fit in draw order: a row ends before a group that is too long or repeats a member."""
    groups = len(sizes)
    ends = np.cumsum(sizes)
    # For a row that begins at each group: the first group that no longer fits ...
    stop = np.searchsorted(ends, ends - sizes + sequence_length, side="right")
    # ... or that repeats an instruction of the row,
    stop = np.minimum(stop, np.minimum.accumulate(next_copy(members)[::-1])[::-1])
    # but at least the next group: with few instructions a group may hold one twice.
    stop = np.maximum(stop, np.arange(1, groups + 1))
    starts = array("q")
    group, stops = 0, stop.data
    while group < groups:
        starts.append(group)
        group = stops[group]
    opens = np.zeros(groups, np.int64)
    opens[np.frombuffer(starts, np.int64)] = 1
    return np.cumsum(opens) - 1


def next_copy(members: np.ndarray) -> np.ndarray:
    """int64[G]: for each group, the next one that shares an instruction with it; G if none does."""
    groups = len(members)
    group, column = np.nonzero(repeated_members(members))
    ids = members[group, column]
    order = np.argsort(ids, kind="stable")
    group, ids = group[order], ids[order]
    copy = ids[1:] == ids[:-1]
    following = np.full(groups, groups)
    np.minimum.at(following, group[:-1][copy], group[1:][copy])
    return following
