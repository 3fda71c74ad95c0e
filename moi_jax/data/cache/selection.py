"""Selection: which cached instructions are trained on, which are held out, which are left out."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from moi_jax import config
from moi_jax.common.errors import UserError
from moi_jax.data.cache.domain import DomainCache, loss_column
from moi_jax.data.cache.writer import NOTES


@dataclass(frozen=True)
class Selection:
    """Which instructions of a domain's cache are used.

    Attributes:
      train, held_out: int64, ascending indices into the cache.
      duplicates: instructions left out because an equal one is used.
      no_loss_tokens: instructions left out because they have no label.
      unplaceable: instructions left out because no group can hold them.
    """

    train: np.ndarray
    held_out: np.ndarray
    duplicates: int
    no_loss_tokens: int
    unplaceable: int = 0

    def keep(self, kept: np.ndarray) -> "Selection":
        """The selection that trains only where bool[train] `kept` is True."""
        unplaceable = int(np.count_nonzero(~kept))
        return dataclasses.replace(self, train=self.train[kept], unplaceable=unplaceable)


def select(
    caches: Sequence[DomainCache],
    held_out: config.HeldOut,
    targets: str,
    domains: Sequence[config.Domain] = (),
) -> list[Selection]:
    """Leaves out duplicates and instructions without labels, and holds some out by content.

    Of equal conversations in any domain the one with the most labels is used (a turn may have the
    weight 0), and of these the first. A share of each source is held out. The hash of a
    conversation's turns alone decides whether it is held out, never its position or the seed.
    Conversations with the same turns are either all held out, in every domain and under every
    system text, or all trained on.

    Args:
      caches: in config order.
      held_out: how many are held out: max(fraction, min rows), at most 10 % of the source.
      targets: loss.targets.
      domains: the domains of the caches; their sources may set `held_out` themselves.

    Raises:
      UserError: a domain has no instruction left.
    """
    column = loss_column(targets)
    candidates = [np.flatnonzero(cache.lengths[:, column]) for cache in caches]
    hashes = [cache.hashes[rows, 0] for cache, rows in zip(caches, candidates, strict=True)]
    labels = [cache.lengths[rows, column] for cache, rows in zip(caches, candidates, strict=True)]
    used = _one_of_equals(np.concatenate(hashes), np.concatenate(labels))
    offsets = np.cumsum([len(rows) for rows in candidates])[:-1]
    kept_rows = []
    for cache, rows, unique in zip(caches, candidates, np.split(used, offsets), strict=True):
        kept_rows.append(rows[unique])
        if not unique.any():
            raise UserError(
                f"domain {cache.name} has nothing to train on: {len(cache.hashes) - len(rows)} "
                f"rows without loss tokens, {len(rows)} equal to rows of other domains"
            )
    turns = [cache.hashes[kept, 1] for cache, kept in zip(caches, kept_rows, strict=True)]
    shares = [[source.held_out or held_out for source in domain.sources] for domain in domains]
    shares = shares or [[held_out] * (len(cache.source_starts) - 1) for cache in caches]
    held_turns = []
    for cache, kept, domain, own in zip(caches, kept_rows, turns, shares, strict=True):
        by_source = np.split(domain, np.searchsorted(kept, cache.source_starts[1:-1]))
        held_turns += [_held_out_turns(*pair) for pair in zip(by_source, own, strict=True)]
    all_held_turns = np.concatenate(held_turns)
    selections = []
    for cache, rows, kept, domain in zip(caches, candidates, kept_rows, turns, strict=True):
        held = np.isin(domain, all_held_turns)
        selections.append(
            Selection(
                train=kept[~held],
                held_out=kept[held],
                duplicates=len(rows) - len(kept),
                no_loss_tokens=len(cache.hashes) - len(rows),
            )
        )
    return selections


def _one_of_equals(hashes: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """bool[n]: True for one row of each hash, the first of those with the most labels."""
    order = np.lexsort((-labels, hashes))  # stable
    in_order = hashes[order]
    begins = np.ones(len(hashes), bool)  # of a run of equal hashes
    begins[1:] = in_order[1:] != in_order[:-1]
    used = np.zeros(len(hashes), bool)
    used[order[begins]] = True
    return used


def _held_out_turns(turns: np.ndarray, held_out: config.HeldOut) -> np.ndarray:
    """The hashes of the turns that a source holds out: those that are smallest when mixed."""
    order = np.argsort(_mix(turns))
    count = _held_out_count(len(turns), held_out)
    # Equal turns stay together: they are trained on if holding them out would exceed the count.
    while 0 < count < len(turns) and turns[order[count]] == turns[order[count - 1]]:
        count -= 1
    return turns[order[:count]]


def _held_out_count(rows: int, held_out: config.HeldOut) -> int:
    # Round first: 0.07 * 100 is 7.000000000000001.
    share = math.ceil(round(held_out.fraction * rows, 6))
    return min(max(share, held_out.min), rows // 10)


def _mix(hashes: np.ndarray) -> np.ndarray:
    """splitmix64 (Steele et al. 2014), so that held-out rows are not a prefix of the hash order."""
    mixed = hashes + np.uint64(0x9E3779B97F4A7C15)
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def row_counts(
    caches: Sequence[DomainCache], selections: Sequence[Selection]
) -> dict[str, dict[str, Any]]:
    """What became of each domain's rows: read = sum of dropped + held_out + train."""
    return {
        cache.name: {
            "read": cache.manifest["read"],
            "dropped": {
                **cache.manifest["dropped"],
                "duplicate": selection.duplicates,
                "no_loss_tokens": selection.no_loss_tokens,
                "unplaceable": selection.unplaceable,
            },
            "held_out": len(selection.held_out),
            "train": len(selection.train),
            **{note: cache.manifest[note] for note in NOTES},
            "empty_files": cache.manifest["empty_files"],
        }
        for cache, selection in zip(caches, selections, strict=True)
    }
