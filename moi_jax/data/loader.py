"""Batches: any rows of the plan as numpy arrays, read from the tokenised cache."""

from collections.abc import Sequence
from itertools import chain
from typing import Any, Literal, NamedTuple, Protocol

import grain
import numpy as np

from moi_jax.config import Loss
from moi_jax.data.planning.epoch import EpochPlan
from moi_jax.data.planning.training_plan import TrainingPlan
from moi_jax.text.instructions import Instruction, token_weights


class Batch(NamedTuple):
    """Rows as arrays [B, S].

    Example: a row of 10 tokens with two groups, mask chunk. The first group is a chat instruction
    (domain 0) of tokens 11 to 14, whose labels are 13 and 14. The second group is two code
    instructions (domain 1) of tokens 21, 22 and 31, 32, whose labels are 22 and 32. The padding
    token is 9:

        groups        [[11 12 13 14]] [[21 22] [31 32]]

        tokens         11 12 13 14 21 22 31 32  9  9
        targets        12 13 14  9 22  9 32  9  9  9    the next token of the same instruction
        segment_ids     1  1  1  1  2  2  2  2  0  0    attention stays inside a segment
        positions       0  1  2  3  0  1  2  3  0  0
        domain_ids      0  0  0  0  1  1  1  1 -1 -1    the domain of the token in `tokens`
        loss_weights    0  1  1  0  1  0  1  0  0  0    the weight of the target; 0: no label

    With mask row: segment_ids 1 1 1 1 1 1 1 1 0 0, positions 0 1 2 3 4 5 6 7 0 0.
    With mask instruction: segment_ids 1 1 1 1 2 2 3 3 0 0, positions 0 1 2 3 0 1 0 1 0 0.
    """

    # numpy arrays here; jax arrays once they are on a mesh.
    tokens: Any  # int32
    targets: Any  # int32
    segment_ids: Any  # int32, from 1 in every row; padding 0
    positions: Any  # int32, from 0 in every segment; padding 0
    domain_ids: Any  # int32, position of the domain in the config; padding -1
    loss_weights: Any  # float32


class PackedInstruction(NamedTuple):
    """An instruction in a packed row, the id of its domain, and the weight of its labels.

    A label's weight is multiplied by that of its span, see `Instruction.weights`.
    """

    instruction: Instruction
    domain_id: int
    weight: float


Mask = Literal["chunk", "row", "instruction"]


def assemble(
    rows: Sequence[Sequence[Sequence[PackedInstruction]]],
    sequence_length: int,
    pad_id: int,
    mask: Mask,
    targets: str,
) -> Batch:
    """Turns rows of groups of instructions into arrays; see `Batch` for an example.

    Args:
      rows: B rows of whole groups, each with at most sequence_length tokens; [] is an empty row.
      pad_id: the padding token, and the target of tokens that have none.
      mask: what a segment is: a group ("chunk"), the whole row, or an instruction.
      targets: loss.targets, which decides which tokens are labels.

    Returns:
      Arrays of shape [B, sequence_length].
    """
    groups = list(chain.from_iterable(rows))
    placed = list(chain.from_iterable(groups))
    if not placed:
        return _batch(np.zeros((len(rows), sequence_length), bool), pad_id)
    lengths = np.array([len(p.instruction.tokens) for p in placed])
    # Row and segment (counted over the batch) of every instruction.
    group_of = np.repeat(np.arange(len(groups)), [len(group) for group in groups])
    row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])[group_of]
    segment_of = {"chunk": group_of, "row": row_of, "instruction": np.arange(len(placed))}[mask]

    # From here on, arrays have one entry for each token, all rows one after another.
    ends = np.cumsum(lengths)
    starts = ends - lengths
    tokens = np.concatenate([p.instruction.tokens for p in placed])
    weights = np.concatenate([token_weights(p.instruction, targets) for p in placed])
    weights *= np.repeat(np.array([p.weight for p in placed], np.float32), lengths)
    following, following_weights = np.roll(tokens, -1), np.roll(weights, -1)
    following[ends - 1] = pad_id
    following_weights[ends - 1] = 0
    # For each instruction, the first instruction of its segment, and of its row.
    first_of_segment = np.searchsorted(segment_of, segment_of)
    first_of_row = np.searchsorted(row_of, row_of)
    distinct = np.cumsum(np.diff(segment_of, prepend=-1) > 0)
    segment_ids = distinct - distinct[first_of_row] + 1
    positions = np.arange(len(tokens)) - np.repeat(starts[first_of_segment], lengths)

    row_tokens = np.bincount(row_of, weights=lengths, minlength=len(rows))
    real = np.arange(sequence_length) < row_tokens[:, None]
    batch = _batch(real, pad_id)
    batch.tokens[real] = tokens
    batch.targets[real] = following
    batch.segment_ids[real] = np.repeat(segment_ids, lengths)
    batch.positions[real] = positions
    batch.domain_ids[real] = np.repeat([p.domain_id for p in placed], lengths)
    batch.loss_weights[real] = following_weights
    return batch


def _batch(real: np.ndarray, pad_id: int) -> Batch:
    """A batch of padding only, of the shape of `real`."""
    return Batch(
        tokens=np.full(real.shape, pad_id, np.int32),
        targets=np.full(real.shape, pad_id, np.int32),
        segment_ids=np.zeros(real.shape, np.int32),
        positions=np.zeros(real.shape, np.int32),
        domain_ids=np.full(real.shape, -1, np.int32),
        loss_weights=np.zeros(real.shape, np.float32),
    )


class InstructionReader(Protocol):
    """Reads instructions by their index: the cache of a domain."""

    def read(self, indices: Sequence[int]) -> list[Instruction]: ...


class BatchReader:
    """Reads any rows of a plan as a Batch; safe to call from several threads."""

    def __init__(
        self,
        plan: TrainingPlan,
        caches: Sequence[InstructionReader],
        train: Sequence[np.ndarray],
        loss: Loss,
        pad_id: int,
    ):
        """
        Args:
          caches: the cache of each domain, in config order.
          train: int64[n_d] for each domain d: training instruction i of the domain is record
            train[d][i] of its cache.
          pad_id: the padding token.
        """
        self.plan, self.loss, self.pad_id = plan, loss, pad_id
        self._caches, self._train = caches, train

    def read(self, global_rows: Sequence[int] | np.ndarray) -> Batch:
        """Reads rows by their global numbers; each domain's cache is read once.

        Rows past the end of the run are empty.
        """
        planned = [self._planned(int(row)) for row in global_rows]
        numbers = [i for row in planned for group, _ in row for i in group.tolist()]
        instructions = self.instructions(np.unique(np.array(numbers, np.int64)))
        rows = [
            [
                [
                    PackedInstruction(*instructions[i], w)
                    for i, w in zip(group.tolist(), weights, strict=True)
                ]
                for group, weights in row
            ]
            for row in planned
        ]
        data = self.plan.data
        assert data.mask is not None  # resolved by the config
        return assemble(rows, data.sequence_length, self.pad_id, data.mask, self.loss.targets)

    def _planned(self, global_row: int) -> list[tuple[np.ndarray, list[float]]]:
        """The groups of a row: the instruction numbers of each, and the weights of their labels."""
        if global_row >= self.plan.total_rows:
            return []
        epoch, row = self.plan.locate(global_row)
        epoch_plan = self.plan.epoch_plan(epoch)
        normalization = self.loss.normalization
        return [
            (group, label_weights(epoch_plan, group, normalization).tolist())
            for group in epoch_plan.row(row)
        ]

    def instructions(self, numbers: np.ndarray) -> dict[int, tuple[Instruction, int]]:
        """The instructions with these global numbers int64[m], and their domain ids."""
        corpus = self.plan.corpus
        domain_of = corpus.domain_of(numbers)
        found: dict[int, tuple[Instruction, int]] = {}
        for domain in np.unique(domain_of).tolist():
            mine = numbers[domain_of == domain]
            records = self._train[domain][mine - corpus.offsets[domain]]
            for number, instruction in zip(
                mine.tolist(), self._caches[domain].read(records), strict=True
            ):
                found[number] = instruction, domain
        return found


def label_weights(plan: EpochPlan, instructions: np.ndarray, normalization: str) -> np.ndarray:
    """The weight of a label of each instruction under loss.normalization (docs/method.md).

    token: 1. instruction: 1 / (labels of the instruction), so that each instruction sums to 1.
    domain: T / (n T_d), so that each of the n domains that have labels sums to T / n over the
    epoch; T_d is the number of labels of domain d, T that of all domains. Weights of rows and
    messages come on top: they change no count of labels, but these sums.

    Args:
      instructions: int64[m] global numbers.

    Returns:
      float64[m].
    """
    if normalization == "token":
        return np.ones(len(instructions))
    if normalization == "instruction":
        return 1 / plan.corpus.loss_lengths[instructions]
    per_domain = plan.domain_loss_tokens
    share = plan.loss_tokens / np.count_nonzero(per_domain)
    return share / per_domain[plan.corpus.domain_of(instructions)]


def batch_dataset(
    reader: BatchReader,
    start_row: int = 0,
    local_rows: np.ndarray | None = None,
    threads: int = 4,
    prefetch: int = 4,
) -> grain.IterDataset:
    """The batches of a run from any row on; batch k has the B rows from start_row + k B.

    The row is the whole state: a new dataset that starts at the first row of the next batch
    continues exactly, even if B has changed.

    Args:
      local_rows: which rows of each global batch to read, as numbers below B; None for all.
      threads: number of batches read at the same time.
      prefetch: number of batches kept ready.
    """
    plan = reader.plan
    wanted = np.arange(plan.batch_rows) if local_rows is None else local_rows
    return (
        grain.MapDataset.range(start_row, plan.total_rows, plan.batch_rows)
        .map(lambda row: reader.read(row + wanted))
        .to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=prefetch))
    )
