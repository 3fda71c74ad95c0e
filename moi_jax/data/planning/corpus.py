"""The corpus: lengths of all training instructions, which is all that planning needs."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moi_jax.data.cache.domain import DomainCache, loss_column
from moi_jax.data.cache.selection import Selection


@dataclass(frozen=True)
class Corpus:
    """The lengths of all training instructions.

    Instructions have global numbers, domain by domain: instruction i of domain d is number
    offsets[d] + i.
    """

    names: tuple[str, ...]  # domains in config order
    offsets: np.ndarray  # int64[domains + 1]
    lengths: np.ndarray  # int32[instructions] tokens
    loss_lengths: np.ndarray  # int32[instructions] tokens that carry loss
    source_starts: tuple[np.ndarray, ...]  # int64[sources + 1] of each domain, into the domain

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        lengths: Sequence[np.ndarray],
        loss_lengths: Sequence[np.ndarray],
        source_starts: Sequence[np.ndarray] | None = None,
    ) -> "Corpus":
        """From int32[n_d] arrays of each domain; source_starts None: one source a domain."""
        counts = [len(domain) for domain in lengths]
        return cls(
            tuple(names),
            np.cumsum([0, *counts]),
            np.concatenate(lengths).astype(np.int32),
            np.concatenate(loss_lengths).astype(np.int32),
            tuple(source_starts or [np.array([0, count]) for count in counts]),
        )

    @classmethod
    def of_training(
        cls, caches: Sequence[DomainCache], selections: Sequence[Selection], targets: str
    ) -> "Corpus":
        """The corpus of the instructions selected for training; `targets` is loss.targets."""
        column = loss_column(targets)
        lengths = [c.lengths[s.train] for c, s in zip(caches, selections, strict=True)]
        starts: list[np.ndarray] = [
            np.searchsorted(selection.train, cache.source_starts)
            for cache, selection in zip(caches, selections, strict=True)
        ]
        return cls.of(
            [cache.name for cache in caches],
            [domain[:, 0] for domain in lengths],
            [domain[:, column] for domain in lengths],
            starts,
        )

    @property
    def counts(self) -> list[int]:
        """The number of training instructions of each domain."""
        return np.diff(self.offsets).tolist()

    @cached_property
    def domain_loss_tokens(self) -> np.ndarray:
        """int64[domains]: loss tokens of each domain, counting each instruction once."""
        sums = np.append(0, np.cumsum(self.loss_lengths, dtype=np.int64))
        return np.diff(sums[self.offsets])

    def domain_of(self, instructions: np.ndarray) -> np.ndarray:
        """int64[...]: the domain id (position in config order) of each global number."""
        return np.searchsorted(self.offsets, instructions, side="right") - 1
