"""Checks the realised mix: what the rows hold that the run has read, against what was planned."""

import random
from itertools import chain

import numpy as np

from moi_jax.common.errors import UserError
from moi_jax.data.loader import Batch
from moi_jax.data.planning.corpus import Corpus
from moi_jax.training.audit.finding import Finding, passed
from moi_jax.training.audit.row_figures import RowFigures
from moi_jax.training.audit.saved_run import PlannedRun

READ_ALL = 5_000  # rows; of a longer run so many are drawn at random
READ_AT_ONCE = 64


def check_mix(data: PlannedRun, rows: RowFigures, seed: int, at_least: int) -> Finding:
    """The rows that the loader gives hold the instructions of the plan, domain by domain.

    The plan is counted over all rows that the run has seen. The loader's arrays are counted
    position by position, over all of these rows or over a random sample.

    Args:
      at_least: rows of the sample, if that is more than READ_ALL.
    """
    seen, names = len(rows.tokens), data.dataset.corpus.names
    chosen = sample_rows(seen, max(READ_ALL, at_least), seed)
    reader = data.dataset.batch_reader(data.plan)
    found = np.zeros((3, len(names)), np.int64)
    for first in range(0, len(chosen), READ_AT_ONCE):
        part = chosen[first : first + READ_AT_ONCE]
        batch = reader.read(part)
        for index, row in enumerate(part):
            found += _count_row(data, row, Batch(*(array[index] for array in batch)))
    planned = [rows.occurrences, rows.domain_tokens, rows.domain_loss_tokens]
    for what, counts, expected in zip(
        ("instructions", "tokens", "loss tokens"), found, planned, strict=True
    ):
        for name, count, right in zip(names, counts, expected[chosen].sum(axis=0), strict=True):
            if count != right:
                raise UserError(
                    f"{len(chosen):,} rows hold {count:,} {what} of domain {name}, and the plan "
                    f"has {right:,}; the cache is not the one that the run was planned for"
                )
    totals = dict(zip(names, rows.occurrences.sum(axis=0).tolist(), strict=True))
    whole = max(sum(totals.values()), 1)
    shares = ", ".join(f"{name} {count / whole:.1%}" for name, count in totals.items())
    of_them = "all of them" if len(chosen) == seen else f"{len(chosen):,} of them at random"
    return passed(
        f"{whole:,} instructions in {seen:,} rows: {shares}; read again, {of_them}, as planned",
        planned={name: int(count) for name, count in totals.items()},
        rows=seen,
        rows_read=len(chosen),
        read=_by_domain(names, found),
    )


def sample_rows(seen: int, count: int, seed: int) -> list[int]:
    """`count` random rows of those below `seen`, in order; all of them if there are no more."""
    return sorted(random.Random(seed).sample(range(seen), min(count, seen)))


def _by_domain(names: tuple[str, ...], found: np.ndarray) -> dict[str, dict[str, int]]:
    keys = ("instructions", "tokens", "loss_tokens")
    return {
        name: dict(zip(keys, counts, strict=True))
        for name, counts in zip(names, found.T.tolist(), strict=True)
    }


def _count_row(data: PlannedRun, number: int, row: Batch) -> np.ndarray:
    """int64[3, domains]: instructions, tokens and labels in the arrays [S] of a row.

    An instruction counts if the row has its domain, its segment and its number of labels at the
    place that the plan gives it.

    Raises:
      UserError: something else stands there.
    """
    corpus = data.dataset.corpus
    epoch, row_of_epoch = data.plan.locate(number)
    groups = data.plan.epoch_plan(epoch).row(row_of_epoch)
    instructions = np.concatenate(groups)
    starts = np.append(0, np.cumsum(corpus.lengths[instructions]))
    segments = _segments(groups, data.plan.data.mask)
    labels = row.loss_weights > 0
    found = np.zeros((3, len(corpus.names)), np.int64)
    for instruction, segment, start, end in zip(
        instructions.tolist(), segments, starts[:-1].tolist(), starts[1:].tolist(), strict=True
    ):
        domain = int(corpus.domain_of(np.array(instruction)))
        count = int(labels[start:end].sum())
        right = count == corpus.loss_lengths[instruction]
        right &= bool((row.domain_ids[start:end] == domain).all())
        right &= bool((row.segment_ids[start:end] == segment).all())
        if not right:
            raise UserError(
                f"row {number} does not hold instruction {_name(corpus, instruction)} at the "
                f"positions {start} to {end - 1}, where it is planned; the cache is not the one "
                f"that the run was planned for"
            )
        found[:, domain] += (1, end - start, count)
    if (row.segment_ids[starts[-1] :] != 0).any():
        raise UserError(f"row {number} holds more than its planned {starts[-1]:,} tokens")
    return found


def _segments(groups: list[np.ndarray], mask: str | None) -> list[int]:
    """The segment of each instruction of a row, see `data.loader.assemble`."""
    if mask == "row":
        return [1] * sum(map(len, groups))
    if mask == "instruction":
        return list(range(1, sum(map(len, groups)) + 1))
    return list(chain(*([number] * len(group) for number, group in enumerate(groups, 1))))


def _name(corpus: Corpus, instruction: int) -> str:
    domain = int(corpus.domain_of(np.array(instruction)))
    return f"{instruction - corpus.offsets[domain]} of domain {corpus.names[domain]}"
