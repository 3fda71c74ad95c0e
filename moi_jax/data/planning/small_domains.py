"""Small domains: their few instructions are dealt out so that no row holds one of them twice.

A domain of n instructions allows n chunks in a row. If rows hold nearly as many, a search for a row
without copies fails for most chunks. So the rows are made first, as if all instructions were
different, with at most n chunks each. Then the places of the small domain in these rows are filled
again: each instruction goes to as many rows as it was drawn times. If draw counts differ by at most
one, that is always possible (Gale 1957, Ryser 1957).
"""

from collections.abc import Callable

import numpy as np

from moi_jax.data.planning import packing, swaps

# A search finds rows without copies if a domain has MANY times the chunks of a row. It is not tried
# with fewer than FEW times.
FEW, MANY = 4, 16
NEAR = 1.005  # times the fewest rows: a search that comes so near is good enough
# Once a domain is small, all domains up to this many times the chunks of a row are dealt out.
DEALT = 64
JITTER = 0.1  # of the mean length: between rows that suit about equally, chance decides

Rows = tuple[np.ndarray, np.ndarray]  # the new members, and int64[G], the row of each chunk


def place_chunks(
    members: np.ndarray,
    lengths: np.ndarray,
    limit: int,
    rng: np.random.Generator,
    conversation_of: np.ndarray | None = None,
) -> Rows:
    """Best fit of balanced chunks; a row holds no conversation twice, however small a domain is.

    Args:
      members: int64[G, W] global instruction numbers, a domain in each column; not changed.
      lengths: int32[instructions] tokens of each instruction.
      limit: the tokens of a row.
      conversation_of: see `Corpus.conversation_of`.

    Returns:
      The new members, and int64[G], the row of each chunk.
    """
    chunks, tokens = len(members), int(lengths[members].sum(dtype=np.int64))
    a_row = min(chunks, chunks * limit / tokens)
    held = packing.conversations(members, conversation_of)
    distinct = [int(np.count_nonzero(np.bincount(column))) for column in held.T]
    cycled = [column for column, n in enumerate(distinct) if n < chunks]
    most = min((distinct[column] for column in cycled), default=chunks)
    by_rule, by_tokens = -(-chunks // most), -(-tokens // int(limit * swaps.AIM))
    if not cycled or most >= MANY * a_row:
        return _fitted(members, lengths, limit, None, rng, conversation_of)
    best = None
    if most >= FEW * a_row:
        best = _fitted(members, lengths, limit, None, rng, conversation_of)
        if best[1].max() < NEAR * max(by_rule, by_tokens):
            return best
    columns = [column for column in cycled if distinct[column] < DEALT * a_row]
    for arrange in (_evenly_spread, _fitted) if by_rule > by_tokens else (_fitted, _evenly_spread):
        rows = _dealt_out(members, lengths, limit, most, columns, arrange, rng, conversation_of)
        if rows and (best is None or rows[1].max() < best[1].max()):
            best = rows
        if best and best[1].max() < max(by_rule, by_tokens):
            break
    return best or _fitted(members, lengths, limit, None, rng, conversation_of)


def _dealt_out(
    members: np.ndarray,
    lengths: np.ndarray,
    limit: int,
    most: int,
    columns: list[int],
    arrange: Callable[..., Rows],
    rng: np.random.Generator,
    conversation_of: np.ndarray | None,
) -> Rows | None:
    """Rows that are made as if the instructions of the columns were all different, then dealt out.

    Returns:
      None if other partners make a chunk longer than a row.
    """
    # Every place in the columns has a number of its own.
    own = len(lengths) + np.arange(members.shape[0] * len(columns)).reshape(-1, len(columns))
    apart = members.copy()
    apart[:, columns] = own
    of_place = np.append(np.arange(len(lengths)), members[:, columns].ravel())
    held = None
    if conversation_of is not None:
        held = np.concatenate([conversation_of[:-1], own.ravel(), [-1]])
    apart, row_of = arrange(apart, lengths[of_place], limit, most, rng, held)
    chosen = of_place[apart]
    for column in columns:
        chosen[:, column] = _deal_samples(chosen[:, column], row_of, lengths, conversation_of, rng)
    if (lengths[chosen].sum(axis=1) > limit).any():
        return None
    return _mended(chosen, row_of, lengths, limit, most, rng, conversation_of)


def _fitted(
    members: np.ndarray,
    lengths: np.ndarray,
    limit: int,
    most: int | None,
    rng: np.random.Generator,
    conversation_of: np.ndarray | None,
) -> Rows:
    """Rows as full as best fit and swaps make them, with at most `most` chunks."""
    sizes = lengths[members].sum(axis=1, dtype=np.int64)
    held = packing.conversations(members, conversation_of)
    row_of = packing.best_fit(held, sizes, limit, most)
    return swaps.fill_rows(members, row_of, lengths, limit, True, rng, most, conversation_of)


def _evenly_spread(
    members: np.ndarray,
    lengths: np.ndarray,
    limit: int,
    most: int,
    rng: np.random.Generator,
    conversation_of: np.ndarray | None,
) -> Rows:
    """The fewest rows that `most` and `limit` allow, with equal numbers of chunks and of tokens.

    A row may be too long.
    """
    sizes = lengths[members].sum(axis=1, dtype=np.int64)
    rows = max(-(-len(sizes) // most), -(-int(sizes.sum()) // int(limit * swaps.AIM)))
    order = np.argsort(-sizes, kind="stable")
    row_of, tokens = np.empty(len(sizes), np.int64), np.zeros(rows, np.int64)
    for start in range(0, len(sizes), rows):  # a chunk for every row, the longest to the emptiest
        batch = order[start : start + rows]
        emptiest = np.argsort(tokens, kind="stable")[: len(batch)]
        row_of[batch] = emptiest
        tokens[emptiest] += sizes[batch]
    return members, row_of


def _deal_samples(
    column: np.ndarray,
    row_of: np.ndarray,
    lengths: np.ndarray,
    conversation_of: np.ndarray | None,
    rng: np.random.Generator,
) -> np.ndarray:
    """Deals the conversations of a column, see `deal`; their places take the samples in turn."""
    if conversation_of is None:
        return deal(column, row_of, lengths, rng)
    held = conversation_of[column]
    tokens = np.bincount(held, weights=lengths[column])
    means = tokens / np.maximum(np.bincount(held), 1)
    dealt = np.empty_like(column)
    places = np.argsort(deal(held, row_of, means, rng), kind="stable")
    dealt[places] = column[np.argsort(held, kind="stable")]
    return dealt


def deal(
    column: np.ndarray, row_of: np.ndarray, lengths: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Deals the instructions of a column to its places again, so that no row holds one twice.

    Each row keeps about the tokens that it has. If draw counts differ by more than one, a few
    instructions may still stand twice in a row.

    Args:
      column: int64[G] instructions, many of them several times.
      row_of: int64[G], the row of each place.
      lengths: tokens of each instruction.
    """
    instructions, index, counts = np.unique(column, return_inverse=True, return_counts=True)
    n, of = len(instructions), lengths[instructions]
    before, place = np.unique(row_of * n + index, return_index=True)  # the pairs (row, instruction)
    standing = (before // n)[np.argsort(before % n, kind="stable")]  # rows, by instruction
    standing_starts = np.searchsorted(np.sort(before % n), np.arange(n + 1))
    places, wanted = np.bincount(row_of), np.bincount(row_of, weights=lengths[column])
    dealt = []
    longest_first = np.lexsort((rng.random(n), -of))
    for left, i in zip(range(n, 0, -1), longest_first, strict=True):
        suits = wanted / np.maximum(places, 1) + JITTER * of.mean() * rng.random(len(places))
        # Where it stands already, it stays if it can.
        suits[standing[standing_starts[i] : standing_starts[i + 1]]] += 2 * of.max()
        suits[places == left] = np.inf  # this row needs each of the instructions that are left
        suits[places == 0] = -np.inf
        rows = np.argsort(-suits)[: counts[i]]
        rows = rows[places[rows] > 0]
        dealt.append(rows * n + i)
        places[rows] -= 1
        wanted[rows] -= of[i]
    pairs = np.concatenate(dealt)
    # What is left, where draw counts differ by more than one.
    over = np.repeat(np.arange(n), counts - np.bincount(pairs % n, minlength=n))
    kept = np.isin(before, pairs)
    pairs = pairs[~np.isin(pairs, before)]
    pairs = np.append(pairs, np.repeat(np.arange(len(places)), places) * n + over)
    filled = np.full_like(column, -1)
    filled[place[kept]] = column[place[kept]]
    empty = np.flatnonzero(filled < 0)
    empty = empty[np.lexsort((rng.random(len(empty)), row_of[empty]))]
    filled[empty] = instructions[pairs[np.argsort(pairs // n, kind="stable")] % n]
    return filled


def _mended(
    members: np.ndarray,
    row_of: np.ndarray,
    lengths: np.ndarray,
    limit: int,
    most: int,
    rng: np.random.Generator,
    conversation_of: np.ndarray | None,
) -> Rows:
    """Rows within the limit and without copies: by swaps, then by moving chunks to other rows."""
    sizes = swaps.row_sizes(members, row_of, lengths)
    layout = swaps.Layout(members.copy(), row_of, sizes, lengths, True, True, conversation_of)
    swaps.shorten(layout, limit, rng)
    members, row_of = layout.members, row_of.copy()
    held, sizes = packing.conversations(members, conversation_of), lengths[members].sum(axis=1)
    moved = _misplaced(held, row_of, sizes, limit)
    if len(moved):
        row_of[moved] = row_of.max() + 1 + packing.best_fit(held[moved], sizes[moved], limit, most)
        _, row_of = np.unique(row_of, return_inverse=True)
    return swaps.fill_rows(members, row_of, lengths, limit, True, rng, most, conversation_of)


def _misplaced(held: np.ndarray, row_of: np.ndarray, sizes: np.ndarray, limit: int) -> np.ndarray:
    """The chunks to move, so that the others fit their rows and no row holds a copy.

    Args:
      held: int64[G, W] the conversations of each chunk.
      sizes: int64[G] tokens of each chunk.
    """
    keys = row_of[:, None] * (held.max() + 1) + held
    _, first = np.unique(keys, return_index=True)
    copy = np.ones(keys.size, bool)
    copy[first] = False
    moved = np.any(copy.reshape(keys.shape), axis=1)
    # The longest chunks of a row stay, as many as fit.
    order = np.lexsort((-sizes, row_of))
    order = order[~moved[order]]
    ends = np.cumsum(sizes[order])
    starts = np.searchsorted(row_of[order], np.arange(row_of.max() + 1))
    before = np.append(0, ends)[starts][row_of[order]]
    moved[order[ends - before > limit]] = True
    return np.flatnonzero(moved)
