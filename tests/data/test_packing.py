"""Placing groups in rows, against plain placing by search."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moi_jax.data.planning import packing

from support.plans import groups

CAPACITY = 50


def present(group: np.ndarray) -> set[int]:
    return set(group[group >= 0].tolist())


def plain_best_fit(members: np.ndarray, sizes: np.ndarray) -> list[int]:
    """Best-fit decreasing by search over all rows; over ROWS_TRIED of them for larger groups."""
    rows: list[dict] = []
    row_of = [0] * len(sizes)
    lone = members.shape[1] == 1
    copies = Counter(members[:, 0].tolist())
    rows_needed = sum(sizes) / CAPACITY

    def place(group: int) -> tuple:
        if not lone:
            return (-sizes[group], group)
        count = copies[int(members[group, 0])]
        spread_first = count > 1 and count >= rows_needed / packing.MANY
        return (not spread_first, -sizes[group], members[group, 0])

    by_size = sorted(range(len(sizes)), key=place)
    for time, group in enumerate(by_size):
        fitting = [row for row in rows if row["free"] >= sizes[group]]
        fitting.sort(key=lambda row: (row["free"], -row["used"]))
        fitting = fitting[: None if lone else packing.ROWS_TRIED]
        row = next((r for r in fitting if not r["holds"] & present(members[group])), None)
        if row is None:
            row = {"number": len(rows), "free": CAPACITY, "holds": set()}
            rows.append(row)
        row["free"] -= sizes[group]
        row["used"] = time
        row["holds"] |= present(members[group])
        row_of[group] = row["number"]
    return row_of


def plain_sequential(members: np.ndarray, sizes: np.ndarray) -> list[int]:
    row, used, holds, row_of = -1, CAPACITY, set(), []
    for group, size in zip(members, sizes, strict=True):
        if used + size > CAPACITY or holds & present(group):
            row, used, holds = row + 1, 0, set()
        used += size
        holds |= present(group)
        row_of.append(row)
    return row_of


@given(groups(CAPACITY))
def test_best_fit_places_like_a_plain_search(case):
    members, sizes = case
    placed = packing.pack(members, sizes, CAPACITY, "best_fit")
    assert placed.tolist() == plain_best_fit(members, sizes)


@given(groups(CAPACITY))
def test_sequential_places_like_a_plain_loop(case):
    members, sizes = case
    placed = packing.pack(members, sizes, CAPACITY, "sequential")
    assert placed.tolist() == plain_sequential(members, sizes)


@given(groups(CAPACITY), st.sampled_from(["best_fit", "sequential", "none"]))
def test_rows_hold_at_most_their_length_and_no_instruction_twice(case, how):
    members, sizes = case
    row_of = packing.pack(members, sizes, CAPACITY, how)
    assert sorted(set(row_of.tolist())) == list(range(row_of.max() + 1))
    for row in range(row_of.max() + 1):
        mine = members[row_of == row]
        assert sizes[row_of == row].sum() <= CAPACITY
        assert len(set(mine[mine >= 0].tolist())) == np.count_nonzero(mine >= 0)


def test_none_gives_every_group_its_own_row():
    members = np.arange(4)[:, None]
    assert packing.pack(members, np.ones(4, int), CAPACITY, "none").tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("how", ["best_fit", "sequential"])
def test_copies_are_kept_apart_at_the_price_of_rows(how):
    members = np.zeros((5, 1), int)
    assert sorted(packing.pack(members, np.ones(5, int), CAPACITY, how)) == [0, 1, 2, 3, 4]


def test_best_fit_opens_a_row_after_trying_so_many_with_copies():
    # Twenty rows hold instruction 0 and fit most tightly; a 21st without it has more room.
    members = np.array([[0, 2 + i] for i in range(20)] + [[1, 30], [0, 31]])
    sizes = np.array([30] * 20 + [25, 20])
    placed = packing.pack(members, sizes, CAPACITY, "best_fit")
    assert placed.tolist() == plain_best_fit(members, sizes) == list(range(22))


def test_instructions_whose_signatures_collide_may_share_a_row():
    # 0 and 61 have the same signature; both occur twice.
    members = np.array([[0], [61], [0], [61]])
    row_of = packing.pack(members, np.array([20, 19, 18, 17]), CAPACITY, "best_fit")
    assert row_of.tolist() == [0, 0, 1, 1]


def test_best_fit_fills_better_than_draw_order():
    sizes = np.random.default_rng(0).integers(1, CAPACITY, 2000)
    members = np.arange(2000)[:, None]
    rows = {
        how: packing.pack(members, sizes, CAPACITY, how).max() + 1
        for how in ("best_fit", "sequential")
    }
    assert sizes.sum() / (rows["best_fit"] * CAPACITY) > 0.98
    assert rows["best_fit"] < 0.85 * rows["sequential"]
