"""The held-out prompt matrix: every held-out conversation under each of its domain's prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moi_jax import config
from moi_jax.common.errors import UserError
from moi_jax.data.cache.domain import DomainCache
from moi_jax.data.cache.selection import Selection
from moi_jax.data.loader import Batch, PackedInstruction, assemble
from moi_jax.evaluation.held_out import batches_by_width
from moi_jax.evaluation.prompt_matrix.prompts import PromptTable, columns
from moi_jax.evaluation.protocol import evenly_spaced
from moi_jax.evaluation.row_sums import RowSums
from moi_jax.text.instructions import Instruction, system_text
from moi_jax.text.rendering import with_system_prompt
from moi_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOutItem:
    """A held-out conversation. `id` is a hash of its content, so it is the same in every run."""

    id: str
    domain: int
    instruction: Instruction


@dataclass(frozen=True)
class ItemSums:
    """Sums over the labels of each item under the prompt of each column, [items, columns] each.

    Where an item's domain has no prompt in a column, `nll` is nan and the others are 0.
    """

    nll: np.ndarray  # float64, in nats
    loss_tokens: np.ndarray  # int64, equal in all columns of an item
    correct: np.ndarray  # int64


@dataclass(frozen=True)
class _PromptedItem:
    """An item under a prompt, and the columns that this prompt fills."""

    item: int
    prompt: str | None
    columns: list[int]


class PromptMatrix:
    """The held-out conversations, each alone in its row, once under every prompt.

    The labels of the turns count, and never those of the system block (which loss.targets
    qwen_official has). So the same tokens count under every prompt. A conversation that does not
    fit a row under one of its prompts is left out under all of them.

    Attributes:
      items: sorted by domain, then in the order of the cache.
      too_long: domain -> number of conversations left out.
    """

    def __init__(
        self,
        caches: Sequence[DomainCache],
        selections: Sequence[Selection],
        data: config.Data,
        targets: str,
        tokenizer: Tokenizer,
        table: PromptTable,
        rows: int,
        row_multiple: int,
        limit: int | None = None,
    ):
        """
        Args:
          targets: loss.targets.
          table: the prompts of each domain.
          rows: rows of a batch at full width; a batch of shorter rows has more of them.
          row_multiple: the number of rows is a multiple of this (the batch shards of the mesh).
          limit: use this many conversations of each domain, evenly spaced; None is all.
        """
        self.domains = [cache.name for cache in caches]
        self.columns = columns(table)
        self._data, self._targets, self._tokenizer = data, targets, tokenizer
        self.items: list[HeldOutItem] = []
        self.too_long: dict[str, int] = {}
        self._prompted: list[_PromptedItem] = []
        lengths: list[int] = []
        for domain, (cache, selection) in enumerate(zip(caches, selections, strict=True)):
            prompts = table[cache.name]
            records = np.array(evenly_spaced(selection.held_out.tolist(), limit), np.int64)
            self.too_long[cache.name] = 0
            for record, instruction in zip(records, cache.read(records), strict=True):
                item = HeldOutItem(f"{cache.hashes[record, 0]:016x}", domain, instruction)
                prompted = self._distinct(len(self.items), instruction, prompts)
                needed = [len(self._under(instruction, a.prompt).tokens) for a in prompted]
                if max(needed) > data.sequence_length:
                    self.too_long[cache.name] += 1
                    continue
                self.items.append(item)
                self._prompted += prompted
                lengths += needed
        self._batches = batches_by_width(lengths, rows, row_multiple, data.sequence_length)

    @property
    def rows(self) -> int:
        """The number of rows that the model computes."""
        return len(self._prompted)

    def measure(
        self,
        sums: Callable[[Batch], RowSums],
        on_progress: Callable[[int], None] = lambda rows: None,
    ) -> ItemSums:
        """Computes the sums of every row.

        Args:
          sums: returns the model's sums for a numpy batch.
          on_progress: called with the number of rows that are done.

        Raises:
          UserError: a loss is not finite.
        """
        shape = len(self.items), len(self.columns)
        nll = np.full(shape, np.nan)
        loss_tokens, correct = np.zeros((2, *shape), np.int64)
        for width, members, rows in self._batches:
            prompted = [self._prompted[member] for member in members]
            result = sums(self._batch(prompted, width, rows))
            for row, one in enumerate(prompted):
                if not np.isfinite(result.nll[row]):
                    raise self._not_finite(one, result.nll[row])
                nll[one.item, one.columns] = result.nll[row]
                loss_tokens[one.item, one.columns] = result.loss_tokens[row]
                correct[one.item, one.columns] = result.correct[row]
            on_progress(len(prompted))
        return ItemSums(nll, loss_tokens, correct)

    def _distinct(
        self, item: int, instruction: Instruction, prompts: dict[str, str | None]
    ) -> list[_PromptedItem]:
        """The item under each of its prompts. Prompts that give the same text are merged."""
        by_text: dict[str | None, _PromptedItem] = {}
        for name, prompt in prompts.items():
            text = system_text(prompt, instruction.row_system, self._data.row_system)
            one = by_text.setdefault(text, _PromptedItem(item, prompt, []))
            one.columns.append(self.columns.index(name))
        return list(by_text.values())

    def _under(self, instruction: Instruction, prompt: str | None) -> Instruction:
        row_system = self._data.row_system
        other = with_system_prompt(instruction, self._tokenizer, prompt, row_system)
        of_turns = other.spans[:, 0] > other.system_length
        return replace(other, spans=other.spans[of_turns])

    def _batch(self, prompted: Sequence[_PromptedItem], width: int, rows: int) -> Batch:
        filled: list[list[list[PackedInstruction]]] = []
        for one in prompted:
            item = self.items[one.item]
            filled.append(
                [[PackedInstruction(self._under(item.instruction, one.prompt), item.domain, 1.0)]]
            )
        filled += [[]] * (rows - len(filled))
        pad = self._tokenizer.template.pad
        return assemble(filled, width, pad, "instruction", self._targets)

    def _not_finite(self, one: _PromptedItem, loss: float) -> UserError:
        item = self.items[one.item]
        return UserError(
            f"the loss of the held-out conversation {item.id} of domain "
            f"{self.domains[item.domain]} is {loss} under the prompt {one.prompt!r}; check "
            f"the weights, and try --dtype float32"
        )
