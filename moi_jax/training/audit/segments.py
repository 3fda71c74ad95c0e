"""Checks packing: a segment run alone gives the token losses that it has within its row."""

from collections.abc import Callable, Sequence

import jax
import numpy as np

from moi_jax.checkpoints.parameters import read_parameters
from moi_jax.common.errors import UserError
from moi_jax.data.loader import Batch
from moi_jax.models.decoder import Tree
from moi_jax.models.loss import token_scores
from moi_jax.parallel.context import context_places, context_shards
from moi_jax.parallel.placing import batch_shards, bucket, place_rows, replicated
from moi_jax.training.audit.finding import Finding, passed
from moi_jax.training.audit.mix import sample_rows
from moi_jax.training.audit.row_figures import RowFigures
from moi_jax.training.audit.saved_run import PlannedRun, SavedRun

SHORTEST_ROW = 512  # few widths, since each is one compilation
# The largest difference of one token's loss, and of a row's mean loss, in nats.
TOKEN_BARS = {"float64": 1e-9, "float32": 2e-5, "bfloat16": 0.25}

TokenLosses = Callable[[Batch], np.ndarray]


def check_segments(
    run: SavedRun, data: PlannedRun, rows: RowFigures, seed: int, count: int
) -> Finding:
    """Runs random rows of the run through its newest model, whole and segment by segment."""
    chosen = sample_rows(len(rows.tokens), count, seed)
    losses = _token_losses(run)
    reader = data.dataset.batch_reader(data.plan)
    pad, longest = reader.pad_id, data.plan.data.sequence_length
    width = batch_shards(run.mesh)
    worst_token = worst_row = 0.0
    segments = 0
    for first in range(0, len(chosen), width):
        part = chosen[first : first + width]
        # Rows past the end of the run are empty.
        batch = reader.read([*part, *[data.plan.total_rows] * (width - len(part))])
        within = losses(batch)
        for index, row in enumerate(part):
            cut = cut_segments(Batch(*(array[index] for array in batch)))
            segments += len(cut)
            alone = np.concatenate(_run_alone(cut, losses, pad, longest, width))
            difference = within[index, : len(alone)] - alone
            worst_token = max(worst_token, float(np.abs(difference).max()))
            worst_row = max(worst_row, float(abs(difference.mean())))
            _check(run, row, difference)
    kind = f"{run.config.model.compute_dtype} on {run.mesh.devices.flat[0].platform}"
    return passed(
        f"{segments:,} segments of {len(chosen):,} rows give alone the token losses that they "
        f"have in their rows, within {worst_token:.1e} nats ({kind}; bar {_bar(run):g})",
        rows=chosen,
        segments=segments,
        worst_token=worst_token,
        worst_row_mean=worst_row,
        token_bar=_bar(run),
        row_bar=run.loss_bar,
    )


def cut_segments(row: Batch) -> list[Batch]:
    """The segments of one row [S], each as arrays of its own length."""
    ends = np.flatnonzero(np.diff(row.segment_ids, append=-1)) + 1
    starts = [0, *ends.tolist()]
    return [
        Batch(*(array[start:end] for array in row))
        for start, end in zip(starts, ends.tolist(), strict=False)
        if row.segment_ids[start] > 0
    ]


def _run_alone(
    segments: Sequence[Batch], losses: TokenLosses, pad: int, longest: int, width: int
) -> list[np.ndarray]:
    """The token losses of each segment, alone at the beginning of a row of its own."""
    found: dict[int, np.ndarray] = {}
    by_width: dict[int, list[int]] = {}
    for number, segment in enumerate(segments):
        size = bucket(len(segment.tokens), SHORTEST_ROW, longest)
        by_width.setdefault(size, []).append(number)
    for size, numbers in by_width.items():
        step = width * max(1, longest // size)
        for first in range(0, len(numbers), step):
            part = numbers[first : first + step]
            result = losses(_stack([segments[n] for n in part], size, pad, step))
            for line, number in zip(result, part, strict=False):
                found[number] = line[: len(segments[number].tokens)]
    return [found[number] for number in range(len(segments))]


def _stack(segments: Sequence[Batch], size: int, pad: int, rows: int) -> Batch:
    """A batch [rows, size] with a segment at the beginning of each row; the others are empty."""
    batch = Batch(
        tokens=np.full((rows, size), pad, np.int32),
        targets=np.full((rows, size), pad, np.int32),
        segment_ids=np.zeros((rows, size), np.int32),
        positions=np.zeros((rows, size), np.int32),
        domain_ids=np.full((rows, size), -1, np.int32),
        loss_weights=np.zeros((rows, size), np.float32),
    )
    for index, segment in enumerate(segments):
        length = len(segment.tokens)
        batch.tokens[index, :length] = segment.tokens
        batch.targets[index, :length] = segment.targets
        batch.segment_ids[index, :length] = 1
        batch.positions[index, :length] = np.arange(length)
    return batch


def _token_losses(run: SavedRun) -> TokenLosses:
    """A function from a numpy batch [B, S] to its token losses float[B, S]."""
    dtype = run.config.param_dtype
    parameters = read_parameters(
        run.newest.path, run.experiment.model, dtype, run.mesh, verify=False, base=run.base
    )

    def step(parameters: Tree, batch: Batch) -> jax.Array:
        model = run.bind(parameters)
        hidden = model.hidden_states(
            batch.tokens, batch.positions, batch.segment_ids, extend_context=False
        )
        counts = batch.segment_ids > 0
        return token_scores(hidden, model.head_kernel(), batch.targets, counts)[0]

    jitted = jax.jit(step, out_shardings=replicated(run.mesh))

    def losses(batch: Batch) -> np.ndarray:
        of_places = jax.device_get(jitted(parameters, place_rows(batch, run.mesh)))
        return of_places[:, context_places(batch.tokens.shape[1], context_shards(run.mesh))]

    return losses


def _check(run: SavedRun, row: int, difference: np.ndarray) -> None:
    """Raises UserError if the differences of a row's tokens float[n] are too large."""
    worst = int(np.abs(difference).argmax())
    if abs(difference[worst]) <= _bar(run) and abs(difference.mean()) <= run.loss_bar:
        return
    raise UserError(
        f"row {row}, position {worst}: the loss differs by {abs(difference[worst]):.1e} nats from "
        f"that of the segment alone (bar {_bar(run):g}), and the row's mean by "
        f"{abs(difference.mean()):.1e} (bar {run.loss_bar:g}); segments see each other, or the "
        f"attention of this backend is not exact"
    )


def _bar(run: SavedRun) -> float:
    return TOKEN_BARS[run.config.model.compute_dtype]
