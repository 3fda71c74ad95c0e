"""python -m moi_jax.preview --config FILE [section.key=value ...]: see what is trained on."""

import argparse
import json
import logging
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from moi_jax.common.errors import UserError, run_command
from moi_jax.config.load import load_config

if TYPE_CHECKING:
    from moi_jax.data.dataset import Dataset
    from moi_jax.data.planning.training_plan import TrainingPlan

log = logging.getLogger(__name__)


ROWS = 2  # shown when neither --rows nor --row is given
# Options that go with one way to look alone.
ONLY_WITH = {"json": "stats", "histogram": "stats", "seed": "audit"}


def main() -> int:
    args = _arguments()
    config = load_config(args.config, args.overrides)

    from moi_jax.checkpoints.experiment import open_experiment
    from moi_jax.common.log import show_logs
    from moi_jax.data.dataset import open_dataset
    from moi_jax.data.preview.picture import check_picture

    for picture in (args.png, args.histogram):
        if picture:
            check_picture(picture)
    # Any text may stand in the data, whatever the terminal's encoding can show.
    sys.stdout.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    show_logs(stderr=True)  # standard output is for what was asked for
    experiment = open_experiment(config)
    dataset = open_dataset(experiment.config, experiment.tokenizer)
    run = dataset.plan()
    if args.stats:
        show_logs(stderr=bool(args.json))
        _show_statistics(dataset, run, args)
    elif args.audit:
        return _audit(dataset, run, args.audit, args.seed or 0)
    else:
        _show_rows(dataset, run, args)
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moi_jax.preview",
        description="Shows rows as they are trained on, by default their text in the terminal; "
        "what carries loss is green, or between brackets where there is no colour.",
        epilog="Exit status: 0 done, 2 your mistake (one line says which), 1 a fault of ours, "
        "such as a difference that --audit finds.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML, see docs/config.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over FILE"
    )
    parser.add_argument("--rows", type=_positive, metavar="N", help=f"how many rows ({ROWS})")
    parser.add_argument(
        "--row", type=_count, metavar="R", help="the first row to show, by its number in the run"
    )
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--png",
        type=Path,
        metavar="FILE",
        help="draw row R (0) and its attention mask; a FILE.svg becomes SVG",
    )
    ways.add_argument(
        "--stats",
        action="store_true",
        help="sources, drops, lengths and the mixture of the first epoch, asked and planned",
    )
    ways.add_argument(
        "--audit",
        type=_positive,
        metavar="N",
        help="derive N random rows anew from the raw files, slowly, and compare every token",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        default=None,
        help="with --stats: the figures alone on standard output",
    )
    parser.add_argument(
        "--histogram", type=Path, metavar="FILE", help="with --stats: draw the lengths"
    )
    parser.add_argument("--seed", type=_count, help="with --audit: chooses the rows (0)")
    args = parser.parse_intermixed_args()
    for option, way in ONLY_WITH.items():
        if getattr(args, option) is not None and not getattr(args, way):
            raise UserError(f"--{option} goes with --{way}; add it or leave --{option} out")
    if args.rows and (args.png or args.stats or args.audit):
        raise UserError("--rows is for rows in the terminal; leave it out")
    if args.row is not None and (args.stats or args.audit):
        raise UserError("--row is for rows in the terminal and --png; leave it out")
    return args


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


def _show_rows(dataset: "Dataset", run: "TrainingPlan", args: argparse.Namespace) -> None:
    from rich.console import Console

    from moi_jax.data.preview.picture import draw_row
    from moi_jax.data.preview.row import print_legend, print_row, view_row

    source, first = dataset.batch_reader(run), args.row or 0
    if first >= run.total_rows:
        raise UserError(f"--row {first} is past the run's last row, {run.total_rows - 1}")
    if args.png:
        draw_row(view_row(source, first), args.png)
        print(f"row {first} drawn in {args.png}")
        return
    console = Console()
    print_legend(console)
    rows = args.rows or (ROWS if args.row is None else 1)
    for row in range(first, min(first + rows, run.total_rows)):
        print()
        print_row(view_row(source, row), dataset.tokenizer, console)


def _show_statistics(dataset: "Dataset", run: "TrainingPlan", args: argparse.Namespace) -> None:
    from moi_jax.data.preview.picture import draw_lengths
    from moi_jax.data.preview.statistics import length_statistics, log_accounts, log_lengths

    mixture = dataset.log_mixture(run)
    lengths = length_statistics(dataset.corpus)
    log_lengths(lengths)
    log_accounts(mixture)
    if args.histogram:
        draw_lengths(dataset.corpus, dataset.config.data.sequence_length, args.histogram)
        log.info(f"lengths drawn in {args.histogram}")
    if args.json:
        print(json.dumps({**mixture, "lengths": lengths}, indent=2))


def _audit(dataset: "Dataset", run: "TrainingPlan", count: int, seed: int) -> int:
    import random

    from moi_jax.data.preview.audit import audit

    rows = sorted(random.Random(seed).sample(range(run.total_rows), min(count, run.total_rows)))
    train = [selection.train for selection in dataset.selections]
    records = [len(cache.lengths) for cache in dataset.caches]
    difference = audit(dataset.batch_reader(run), train, records, dataset.tokenizer, rows)
    if difference:
        print(f"audit: {difference}")
        return 1
    length = dataset.config.data.sequence_length
    print(f"audit: {len(rows)} rows of {length} tokens equal")
    return 0


if __name__ == "__main__":
    run_command(main)
