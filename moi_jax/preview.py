"""python -m moi_jax.preview --config FILE [section.key=value ...]: see what is trained on."""

import argparse
import json

from moi_jax.cli.arguments import add_config, local_path
from moi_jax.cli.command import run_command
from moi_jax.common.errors import UserError

ROWS = 2  # shown when neither --rows nor --row is given
# Options that go with another one only.
ONLY_WITH = {"json": "stats", "histogram": "stats", "seed": "audit"}


def main() -> int:
    args = _arguments()

    from moi_jax.config.load import load_config

    config = load_config(args.config, args.overrides)

    from moi_jax.checkpoints.experiment import open_experiment
    from moi_jax.common.log import show_logs
    from moi_jax.data.dataset import open_dataset
    from moi_jax.data.preview.picture import check_picture
    from moi_jax.data.preview.preview import audit_rows, save_picture, show_rows, show_statistics

    for picture in (args.png, args.histogram):
        if picture:
            check_picture(picture)
    show_logs(stderr=True)  # standard output is for what was asked for
    experiment = open_experiment(config)
    dataset = open_dataset(experiment.config, experiment.tokenizer)
    first = args.row or 0
    if args.stats:
        show_logs(stderr=bool(args.json))
        statistics = show_statistics(dataset, args.histogram)
        if args.json:
            print(json.dumps(statistics, indent=2))
    elif args.audit:
        count, difference = audit_rows(dataset, args.audit, args.seed or 0)
        length = dataset.config.data.sequence_length
        print(f"audit: {difference or f'{count} rows of {length} tokens equal'}")
        return 1 if difference else 0
    elif args.png:
        save_picture(dataset, first, args.png)
        print(f"row {first} drawn in {args.png}")
    else:
        show_rows(dataset, first, args.rows or (ROWS if args.row is None else 1))
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moi_jax.preview",
        description="Shows rows as the model is trained on them, by default as text in the "
        "terminal. Text that carries loss is green, or in brackets where there is no colour.",
        epilog="Exit status: 0 done, 2 your mistake (one line says which), 1 a fault of ours, "
        "such as a difference that --audit finds.",
    )
    add_config(parser)
    parser.add_argument(
        "--rows", type=_positive, metavar="N", help=f"how many rows (default: {ROWS})"
    )
    parser.add_argument(
        "--row", type=_count, metavar="R", help="the first row to show, by its number in the run"
    )
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument(
        "--png",
        type=local_path,
        metavar="FILE",
        help="draw row R (default: 0) and its attention mask, as PNG, or as SVG for a FILE.svg",
    )
    ways.add_argument(
        "--stats",
        action="store_true",
        help="sources, drops, lengths, and the mixture of the first epoch, as asked and as planned",
    )
    ways.add_argument(
        "--audit",
        type=_positive,
        metavar="N",
        help="derive N random rows again from the raw files, slowly, and compare every token",
    )
    parser.add_argument(
        "--json",
        action="store_true",
        default=None,
        help="with --stats: only the figures on standard output, as JSON",
    )
    parser.add_argument(
        "--histogram",
        type=local_path,
        metavar="FILE",
        help="with --stats: draw the lengths",
    )
    parser.add_argument("--seed", type=_count, help="with --audit: chooses the rows (default: 0)")
    args = parser.parse_intermixed_args()
    for option, way in ONLY_WITH.items():
        if getattr(args, option) is not None and not getattr(args, way):
            raise UserError(f"--{option} needs --{way}; add it or leave out --{option}")
    if args.rows and (args.png or args.stats or args.audit):
        raise UserError("--rows shows rows in the terminal; leave it out")
    if args.row is not None and (args.stats or args.audit):
        raise UserError("--row chooses a row for the terminal or --png; leave it out")
    return args


def _positive(text: str) -> int:
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return number


def _count(text: str) -> int:
    if (number := int(text)) < 0:
        raise argparse.ArgumentTypeError(f"{text} is below 0")
    return number


if __name__ == "__main__":
    run_command(main)
