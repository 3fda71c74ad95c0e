"""The held-out prompt matrix: every held-out conversation under each of its domain's prompts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from moi_jax import config
from moi_jax.common.errors import UserError
from moi_jax.data.cache.domain import DomainCache
from moi_jax.data.cache.selection import Selection
from moi_jax.data.loader import Batch, PackedInstruction, assemble
from moi_jax.evaluation.answering import evenly_spaced
from moi_jax.evaluation.held_out import batches_by_width
from moi_jax.evaluation.prompts.crossing import Crossed, columns
from moi_jax.evaluation.row_sums import RowSums
from moi_jax.text.rendering import Instruction, system_text, with_system_prompt
from moi_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class HeldOutItem:
    """A held-out conversation. `id` is the hash of its content, the same in any run."""

    id: str
    domain: int
    instruction: Instruction


@dataclass(frozen=True)
class ItemSums:
    """Sums over the labels of each item under each column's prompt, [items, columns] each.

    A column that an item's domain has no prompt for is nan in `nll`, and 0 in the others.
    """

    nll: np.ndarray  # float64, in nats
    loss_tokens: np.ndarray  # int64, of an item the same in all columns
    correct: np.ndarray  # int64


@dataclass(frozen=True)
class _Asked:
    """An item under a prompt, and the columns that this is what the model sees in."""

    item: int
    prompt: str | None
    columns: list[int]


class PromptMatrix:
    """The held-out conversations, each of them once under every prompt, alone in its row.

    What is counted of a conversation are the labels of its turns, never those of the system
    block (which loss.targets qwen_official has): the same tokens under every prompt. One that is
    too long for a row under any of its prompts is left out under all.

    Attributes:
      items: by domain, then in the order of the cache.
      too_long: how many were left out, by domain.
    """

    def __init__(
        self,
        caches: Sequence[DomainCache],
        selections: Sequence[Selection],
        data: config.Data,
        targets: str,
        tokenizer: Tokenizer,
        crossed: Crossed,
        rows: int,
        row_multiple: int,
        limit: int | None = None,
    ):
        """
        Args:
          targets: loss.targets.
          crossed: the prompts of each domain.
          rows: rows of a batch at full width; shorter rows come in larger batches.
          row_multiple: rows of a batch divide by this (the batch shards of the mesh).
          limit: that many conversations of each domain, evenly spaced; None is all.
        """
        self.domains = [cache.name for cache in caches]
        self.columns = columns(crossed)
        self._data, self._targets, self._tokenizer = data, targets, tokenizer
        self.items: list[HeldOutItem] = []
        self.too_long: dict[str, int] = {}
        self._asked: list[_Asked] = []
        lengths: list[int] = []
        for domain, (cache, selection) in enumerate(zip(caches, selections, strict=True)):
            prompts = crossed[cache.name]
            records = np.array(evenly_spaced(selection.held_out.tolist(), limit), np.int64)
            self.too_long[cache.name] = 0
            for record, instruction in zip(records, cache.read(records), strict=True):
                item = HeldOutItem(f"{cache.hashes[record, 0]:016x}", domain, instruction)
                asked = self._ask(len(self.items), instruction, prompts)
                needed = [len(self._under(instruction, a.prompt).tokens) for a in asked]
                if max(needed) > data.sequence_length:
                    self.too_long[cache.name] += 1
                    continue
                self.items.append(item)
                self._asked += asked
                lengths += needed
        self._batches = batches_by_width(lengths, rows, row_multiple, data.sequence_length)

    @property
    def rows(self) -> int:
        """How many rows the model is asked for."""
        return len(self._asked)

    def measure(
        self, sums: Callable[[Batch], RowSums], advance: Callable[[int], None] = lambda rows: None
    ) -> ItemSums:
        """Asks the model for every row.

        Args:
          sums: the model's, of a numpy batch.
          advance: told the rows done.

        Raises:
          UserError: a loss is not finite.
        """
        shape = len(self.items), len(self.columns)
        nll = np.full(shape, np.nan)
        loss_tokens, correct = np.zeros((2, *shape), np.int64)
        for width, members, rows in self._batches:
            asked = [self._asked[member] for member in members]
            result = sums(self._batch(asked, width, rows))
            for row, one in enumerate(asked):
                if not np.isfinite(result.nll[row]):
                    raise self._not_finite(one, result.nll[row])
                nll[one.item, one.columns] = result.nll[row]
                loss_tokens[one.item, one.columns] = result.loss_tokens[row]
                correct[one.item, one.columns] = result.correct[row]
            advance(len(asked))
        return ItemSums(nll, loss_tokens, correct)

    def _ask(
        self, item: int, instruction: Instruction, prompts: dict[str, str | None]
    ) -> list[_Asked]:
        """The prompts of an item, those that come to the same text as one."""
        by_text: dict[str | None, _Asked] = {}
        for name, prompt in prompts.items():
            text = system_text(prompt, instruction.row_system, self._data.row_system)
            one = by_text.setdefault(text, _Asked(item, prompt, []))
            one.columns.append(self.columns.index(name))
        return list(by_text.values())

    def _under(self, instruction: Instruction, prompt: str | None) -> Instruction:
        row_system = self._data.row_system
        other = with_system_prompt(instruction, self._tokenizer, prompt, row_system)
        of_turns = other.spans[:, 0] > other.system_length
        return replace(other, spans=other.spans[of_turns])

    def _batch(self, asked: Sequence[_Asked], width: int, rows: int) -> Batch:
        filled: list[list[list[PackedInstruction]]] = []
        for one in asked:
            item = self.items[one.item]
            filled.append(
                [[PackedInstruction(self._under(item.instruction, one.prompt), item.domain, 1.0)]]
            )
        filled += [[]] * (rows - len(filled))
        pad = self._tokenizer.template.pad
        return assemble(filled, width, pad, "instruction", self._targets)

    def _not_finite(self, one: _Asked, loss: float) -> UserError:
        item = self.items[one.item]
        return UserError(
            f"the loss of the held-out conversation {item.id} of domain "
            f"{self.domains[item.domain]} is {loss} under the prompt {one.prompt!r}; are these "
            f"weights sound, and does it happen in float32?"
        )
