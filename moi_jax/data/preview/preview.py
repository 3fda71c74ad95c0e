"""What `preview` shows of a run's data: rows, a picture, statistics, and an audit of random rows.

experiment = open_experiment(load_config("configs/quickstart.yaml"))
show_rows(open_dataset(experiment.config, experiment.tokenizer), first=3)
"""

import logging
import random
from pathlib import Path
from typing import Any

from rich.console import Console

from moi_jax.common.errors import UserError
from moi_jax.data.dataset import Dataset
from moi_jax.data.planning.training_plan import TrainingPlan
from moi_jax.data.preview.audit import audit
from moi_jax.data.preview.picture import draw_lengths, draw_row
from moi_jax.data.preview.row import print_legend, print_row, view_row
from moi_jax.data.preview.statistics import length_statistics, log_accounts, log_lengths

log = logging.getLogger(__name__)


def show_rows(dataset: Dataset, first: int = 0, count: int = 1) -> None:
    """Prints the text of rows; the text that carries loss is coloured, or in brackets.

    Raises:
      UserError: the run has no row `first`.
    """
    run = dataset.plan()
    _check_row(run, first)
    source, console = dataset.batch_reader(run), Console()
    print_legend(console)
    for row in range(first, min(first + count, run.total_rows)):
        console.print()
        print_row(view_row(source, row, dataset.tokenizer), dataset.tokenizer, console)


def save_picture(dataset: Dataset, row: int, path: Path) -> None:
    """Draws one row and its attention mask.

    Raises:
      UserError: the run has no such row, or `path` cannot be written.
    """
    run = dataset.plan()
    _check_row(run, row)
    draw_row(view_row(dataset.batch_reader(run), row, dataset.tokenizer), path)


def show_statistics(dataset: Dataset, histogram: Path | None = None) -> dict[str, Any]:
    """Logs the sources, drops, lengths and mixture of the first epoch.

    Args:
      histogram: where the lengths are drawn, if anywhere.

    Returns:
      The mixture (see `mixture_statistics`), with the lengths under "lengths".
    """
    mixture = dataset.log_mixture(dataset.plan())
    lengths = length_statistics(dataset.corpus)
    log_lengths(lengths)
    log_accounts(mixture)
    if histogram:
        draw_lengths(dataset.corpus, dataset.config.data.sequence_length, histogram)
        log.info(f"wrote the histogram of lengths to {histogram}")
    return {**mixture, "lengths": lengths}


def audit_rows(dataset: Dataset, count: int, seed: int = 0) -> tuple[int, str | None]:
    """Compares random rows of the loader with rows that are derived from the raw files.

    Returns:
      The number of rows compared, and the first difference in words (None: all are equal).
    """
    run = dataset.plan()
    count = min(count, run.total_rows)
    rows = sorted(random.Random(seed).sample(range(run.total_rows), count))
    train = [selection.train for selection in dataset.selections]
    records = [len(cache.lengths) for cache in dataset.caches]
    return count, audit(dataset.batch_reader(run), train, records, dataset.tokenizer, rows)


def _check_row(run: TrainingPlan, row: int) -> None:
    if row >= run.total_rows:
        raise UserError(f"there is no row {row}: the run has the rows 0 to {run.total_rows - 1}")
