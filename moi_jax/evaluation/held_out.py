"""Held-out losses per domain and prompt. Each conversation is alone in its row."""

import logging
import math
from collections.abc import Callable, Iterator, Sequence

import numpy as np

from moi_jax import config
from moi_jax.data.cache.domain import DomainCache
from moi_jax.data.cache.selection import Selection
from moi_jax.data.loader import Batch, PackedInstruction, assemble
from moi_jax.evaluation.row_sums import RowSums
from moi_jax.parallel.placing import bucket
from moi_jax.text.prompts import resolve_prompt
from moi_jax.text.rendering import with_system_prompt
from moi_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


# The smallest width of a batch. The others are this width times a power of two.
_SHORTEST_ROW = 128

# The width of a batch, and its rows: each a list of groups, here one group of one instruction.
PlannedBatch = tuple[int, list[list[list[PackedInstruction]]]]
SumRows = Callable[[Batch], RowSums]


class HeldOut:
    """The held-out conversations under their own prompt and under the default prompt.

    Attributes:
      own, default: the planned batches. A domain whose own prompt is the default one is only
        in `own`.
    """

    def __init__(
        self,
        caches: Sequence[DomainCache],
        selections: Sequence[Selection],
        data: config.Data,
        targets: str,
        tokenizer: Tokenizer,
        rows: int,
        row_multiple: int,
    ):
        """
        Args:
          targets: loss.targets.
          rows: rows of a batch at full width; a batch of shorter rows has more of them.
          row_multiple: the number of rows is a multiple of this (the batch shards of the mesh).
        """
        self.domains = [cache.name for cache in caches]
        self._data, self._targets, self._pad_id = data, targets, tokenizer.template.pad
        self._rows, self._row_multiple = rows, row_multiple
        own: list[PackedInstruction] = []
        default: list[PackedInstruction] = []
        self._same_prompt = []
        for index, (cache, selection) in enumerate(zip(caches, selections, strict=True)):
            instructions = cache.read(selection.held_out)
            own += [PackedInstruction(instruction, index, 1.0) for instruction in instructions]
            prompt = resolve_prompt(data, data.domains[index])
            self._same_prompt.append(prompt == data.default_system_prompt)
            if self._same_prompt[-1]:
                continue
            for instruction in instructions:
                other = with_system_prompt(
                    instruction, tokenizer, data.default_system_prompt, data.row_system
                )
                default.append(PackedInstruction(other, index, 1.0))
        fitting = [p for p in default if len(p.instruction.tokens) <= data.sequence_length]
        if len(fitting) < len(default):
            log.info(
                f"{len(default) - len(fitting)} held-out conversations do not fit the "
                f"sequence length under the default prompt; they are left out there",
            )
        self.own, self.default = self._plan(own), self._plan(fitting)

    def losses(
        self, row_sums: SumRows, should_stop: Callable[[], bool] = lambda: False
    ) -> dict[str, float]:
        """Mean losses per token, in nats: eval/<domain>/loss, .../default_prompt/loss, and means.

        Args:
          row_sums: returns the model's sums for a numpy batch.
          should_stop: called before each batch. When it returns True, the result is {}.
        """
        own = self._token_means(self.own, row_sums, should_stop)
        default = self._token_means(self.default, row_sums, should_stop)
        if own is None or default is None:
            return {}
        losses: dict[str, float] = {}
        for index, name in enumerate(self.domains):
            losses[f"eval/{name}/loss"] = own[index]
            same = self._same_prompt[index]
            losses[f"eval/{name}/default_prompt/loss"] = own[index] if same else default[index]
        for kind in ("loss", "default_prompt/loss"):
            values = [losses[f"eval/{name}/{kind}"] for name in self.domains]
            known = [value for value in values if not math.isnan(value)]
            losses[f"eval/mean/{kind}"] = sum(known) / len(known) if known else math.nan
        return losses

    def _token_means(
        self,
        planned: list[PlannedBatch],
        row_sums: SumRows,
        should_stop: Callable[[], bool],
    ) -> list[float] | None:
        nll, tokens = np.zeros((2, len(self.domains)), np.float64)
        for (_, filled), batch in zip(planned, self.batches(planned), strict=True):
            if should_stop():
                return None
            result = row_sums(batch)
            # The rows after the last conversation are padding.
            domains = [groups[0][0].domain_id for groups in filled if groups]
            np.add.at(nll, domains, result.nll[: len(domains)])
            np.add.at(tokens, domains, result.loss_tokens[: len(domains)])
        return [
            n / t if t else math.nan for n, t in zip(nll.tolist(), tokens.tolist(), strict=True)
        ]

    def batches(self, planned: list[PlannedBatch]) -> Iterator[Batch]:
        """The planned batches as numpy batches."""
        for width, filled in planned:
            yield assemble(filled, width, self._pad_id, "instruction", self._targets)

    def _plan(self, placed: list[PackedInstruction]) -> list[PlannedBatch]:
        """One conversation per row, rows of similar length together, the last batch padded."""
        batches = batches_by_width(
            [len(item.instruction.tokens) for item in placed],
            self._rows,
            self._row_multiple,
            self._data.sequence_length,
        )
        return [
            (width, [[[placed[member]]] for member in members] + [[]] * (rows - len(members)))
            for width, members, rows in batches
        ]


def batches_by_width(
    lengths: Sequence[int], rows: int, row_multiple: int, longest: int
) -> list[tuple[int, list[int], int]]:
    """Groups conversations of these lengths into batches: (width, members, rows) each.

    Each conversation has a row of its own; `members` are indices into `lengths`.

    Args:
      rows: rows of a batch of the width `longest`; narrower batches have more.
      row_multiple: the number of rows is a multiple of this.
      longest: the longest length that may occur.
    """
    by_width: dict[int, list[int]] = {}
    for member, length in enumerate(lengths):
        by_width.setdefault(bucket(length, _SHORTEST_ROW, longest), []).append(member)
    batches = []
    for width in sorted(by_width):
        members = by_width[width]
        count = min(rows * longest // width, len(members))
        count = -(-count // row_multiple) * row_multiple
        for first in range(0, len(members), count):
            batches.append((width, members[first : first + count], count))
    return batches
