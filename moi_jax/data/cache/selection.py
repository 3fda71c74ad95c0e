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
from moi_jax.data.cache.writer import NOTES, RENDERING_NOTES


@dataclass(frozen=True)
class Selection:
    """Which instructions of a domain's cache are used.

    Attributes:
      train, held_out: int64, ascending indices into the cache: the samples, those with labels, of
        whole conversations.
      duplicates: conversations left out because an equal one is used.
      no_loss_tokens: conversations left out because they have no label.
      unplaceable: conversations none of whose samples is left, because no group can hold them.
    """

    train: np.ndarray
    held_out: np.ndarray
    duplicates: int
    no_loss_tokens: int
    unplaceable: int = 0

    def keep(self, kept: np.ndarray, cache: DomainCache) -> "Selection":
        """The selection that trains only where bool[train] `kept` is True."""
        train = self.train[kept]
        unplaceable = cache.conversations(self.train) - cache.conversations(train)
        return dataclasses.replace(self, train=train, unplaceable=unplaceable)


def select(
    caches: Sequence[DomainCache],
    held_out: config.HeldOut,
    targets: str,
    domains: Sequence[config.Domain] = (),
) -> list[Selection]:
    """Leaves out duplicates and conversations without labels, and holds some out by content.

    Whole conversations are left out or held out, whether they have one sample or several. Of equal
    conversations in any domain the one with the most labels is used (a turn may have the weight
    0), and of these the first. A share of each source is held out. The hash of a conversation's
    turns alone decides whether it is held out, never its position or the seed. Conversations with
    the same turns are either all held out, in every domain and under every system text, or all
    trained on.

    Args:
      caches: in config order.
      held_out: how many are held out: max(fraction, min rows), at most 10 % of the source.
      targets: loss.targets.
      domains: the domains of the caches; their sources may set `held_out` themselves.

    Raises:
      UserError: a domain has no instruction left.
    """
    domains_found = [_Conversations.of(cache, loss_column(targets)) for cache in caches]
    candidates = [np.flatnonzero(found.labels) for found in domains_found]
    pairs = list(zip(domains_found, candidates, strict=True))
    used = _one_of_equals(
        np.concatenate([found.whole[rows] for found, rows in pairs]),
        np.concatenate([found.labels[rows] for found, rows in pairs]),
    )
    used_of_domain = np.split(used, np.cumsum([len(rows) for rows in candidates])[:-1])
    kept_rows = []
    for (found, rows), unique in zip(pairs, used_of_domain, strict=True):
        kept_rows.append(rows[unique])
        if not unique.any():
            raise UserError(
                f"domain {found.cache.name} has nothing to train on: "
                f"{len(found.labels) - len(rows)} rows without loss tokens, {len(rows)} equal to "
                f"rows of other domains"
            )
    shares = [[source.held_out or held_out for source in domain.sources] for domain in domains]
    shares = shares or [[held_out] * (len(cache.source_starts) - 1) for cache in caches]
    held_turns = []
    for found, kept, own in zip(domains_found, kept_rows, shares, strict=True):
        by_source = np.split(found.turns[kept], found.source_borders(kept))
        held_turns += [_held_out_turns(*pair) for pair in zip(by_source, own, strict=True)]
    all_held_turns = np.concatenate(held_turns)
    selections = []
    for (found, rows), kept in zip(pairs, kept_rows, strict=True):
        held = np.isin(found.turns[kept], all_held_turns)
        selections.append(
            Selection(
                train=found.samples(kept[~held]),
                held_out=found.samples(kept[held]),
                duplicates=len(rows) - len(kept),
                no_loss_tokens=len(found.labels) - len(rows),
            )
        )
    return selections


@dataclass(frozen=True)
class _Conversations:
    """The c conversations of a domain's cache, each with all of its samples.

    Attributes:
      first: int64[c], the first sample of each.
      labels: int64[c], the loss tokens of all samples of each.
      loss_tokens: int32[n], those of each sample.
    """

    cache: DomainCache
    first: np.ndarray
    labels: np.ndarray
    loss_tokens: np.ndarray

    @classmethod
    def of(cls, cache: DomainCache, column: int) -> "_Conversations":
        loss_tokens = cache.lengths[:, column]
        first = np.flatnonzero(np.diff(cache.conversation_of, prepend=-1))
        sums = np.append(0, np.cumsum(loss_tokens, dtype=np.int64))
        labels = np.diff(sums[np.append(first, len(loss_tokens))])
        return cls(cache, first, labels, loss_tokens)

    @property
    def whole(self) -> np.ndarray:
        """uint64[c]: the hashes of all messages."""
        return self.cache.hashes[self.first, 0]

    @property
    def turns(self) -> np.ndarray:
        """uint64[c]: the hashes of the turns."""
        return self.cache.hashes[self.first, 1]

    def source_borders(self, kept: np.ndarray) -> np.ndarray:
        """int64[sources - 1]: where the conversations `kept` of each later source begin."""
        return np.searchsorted(self.first[kept], self.cache.source_starts[1:-1])

    def samples(self, kept: np.ndarray) -> np.ndarray:
        """int64, ascending: the samples of the conversations `kept` that have labels."""
        chosen = np.zeros(len(self.first), bool)
        chosen[kept] = True
        return np.flatnonzero(chosen[self.cache.conversation_of] & (self.loss_tokens > 0))


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
            "held_out": cache.conversations(selection.held_out),
            "train": cache.conversations(selection.train),
            **{note: cache.manifest[note] for note in NOTES},
            **{note: cache.manifest.get(note, 0) for note in RENDERING_NOTES},
            "empty_files": cache.manifest["empty_files"],
        }
        for cache, selection in zip(caches, selections, strict=True)
    }
