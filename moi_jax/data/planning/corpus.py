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
    offsets[d] + i. A conversation is one instruction, or several samples beside each other, of
    which each draw of the conversation takes the next one.
    """

    names: tuple[str, ...]  # domains in config order
    offsets: np.ndarray  # int64[domains + 1]
    lengths: np.ndarray  # int32[instructions] tokens
    loss_lengths: np.ndarray  # int32[instructions] tokens that carry loss
    conversation_starts: np.ndarray  # int64[conversations + 1] into instructions
    # int64[sources + 1] of each domain, into the conversations of the domain
    source_starts: tuple[np.ndarray, ...]

    @classmethod
    def of(
        cls,
        names: Sequence[str],
        lengths: Sequence[np.ndarray],
        loss_lengths: Sequence[np.ndarray],
        source_starts: Sequence[np.ndarray] | None = None,
        samples: Sequence[np.ndarray] | None = None,
    ) -> "Corpus":
        """From int32[n_d] arrays of each domain.

        Args:
          source_starts: None: one source a domain.
          samples: int64[c_d] of each domain, the number of samples of each conversation; None:
            all have one.
        """
        counts = [len(domain) for domain in lengths]
        if samples is None:
            samples = [np.ones(count, np.int64) for count in counts]
        return cls(
            tuple(names),
            np.cumsum([0, *counts]),
            np.concatenate(lengths).astype(np.int32),
            np.concatenate(loss_lengths).astype(np.int32),
            np.append(0, np.cumsum(np.concatenate(samples))),
            tuple(source_starts or [np.array([0, len(domain)]) for domain in samples]),
        )

    @classmethod
    def of_training(
        cls, caches: Sequence[DomainCache], selections: Sequence[Selection], targets: str
    ) -> "Corpus":
        """The corpus of the instructions selected for training; `targets` is loss.targets."""
        column = loss_column(targets)
        pairs = list(zip(caches, selections, strict=True))
        lengths = [cache.lengths[selection.train] for cache, selection in pairs]
        samples, starts = [], []
        for cache, selection in pairs:
            _, first, count = np.unique(
                cache.conversation_of[selection.train], return_index=True, return_counts=True
            )
            samples.append(count)
            starts.append(np.searchsorted(selection.train[first], cache.source_starts))
        return cls.of(
            [cache.name for cache in caches],
            [domain[:, 0] for domain in lengths],
            [domain[:, column] for domain in lengths],
            starts,
            samples,
        )

    @cached_property
    def conversation_offsets(self) -> np.ndarray:
        """int64[domains + 1] into conversation_starts: the conversations of each domain."""
        return np.searchsorted(self.conversation_starts, self.offsets)

    @cached_property
    def counts(self) -> list[int]:
        """The number of training conversations of each domain."""
        return np.diff(self.conversation_offsets).tolist()

    @cached_property
    def conversation_of(self) -> np.ndarray | None:
        """int64[instructions + 1], the conversation of each; the last is -1, for the index -1.

        None if every conversation is one instruction.
        """
        samples = np.diff(self.conversation_starts)
        if len(samples) == len(self.lengths):
            return None
        return np.append(np.repeat(np.arange(len(samples)), samples), -1)

    def samples(self, domain: int) -> np.ndarray:
        """int64[c_d + 1]: where the samples of each conversation of a domain begin."""
        first, after = self.conversation_offsets[domain : domain + 2]
        return self.conversation_starts[first : after + 1]

    @cached_property
    def domain_loss_tokens(self) -> np.ndarray:
        """int64[domains]: loss tokens of each domain, counting each instruction once."""
        sums = np.append(0, np.cumsum(self.loss_lengths, dtype=np.int64))
        return np.diff(sums[self.offsets])

    @cached_property
    def loss_tokens_per_draw(self) -> np.ndarray:
        """float64[domains]: the mean loss tokens of a draw, over the samples of a conversation."""
        sums = np.append(0, np.cumsum(self.loss_lengths, dtype=np.int64))
        means = np.diff(sums[self.conversation_starts]) / np.diff(self.conversation_starts)
        of_domain = np.diff(np.append(0, np.cumsum(means))[self.conversation_offsets])
        return of_domain / np.maximum(self.counts, 1)

    def domain_of(self, instructions: np.ndarray) -> np.ndarray:
        """int64[...]: the domain id (position in config order) of each global number."""
        return np.searchsorted(self.offsets, instructions, side="right") - 1
