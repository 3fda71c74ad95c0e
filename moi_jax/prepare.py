"""python -m moi_jax.prepare --config FILE: sources into the tokenised cache, with the mixture."""

import argparse
import json

from moi_jax.cli.arguments import add_config, local_path
from moi_jax.cli.command import run_command
from moi_jax.common.errors import UserError


def _shard(text: str) -> tuple[int, int]:
    """i/n as two numbers."""
    shard, shards = map(int, text.split("/"))
    if not 1 <= shard <= shards:
        raise ValueError
    return shard, shards


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m moi_jax.prepare",
        description="Reads the sources of a config, renders and tokenises them into the cache, "
        "plans the first epoch and shows the mixture. Training does the same by itself. After an "
        "interruption, give the same command again and it continues.",
    )
    add_config(parser)
    parser.add_argument(
        "--workers", metavar="N", help="number of processes, data.workers; 1 works in this process"
    )
    parser.add_argument(
        "--decontaminate",
        metavar="DIR",
        help="benchmark files; rows that hold one of their questions are dropped "
        "(data.decontaminate.path)",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="i/n",
        help="prepare only the i-th of n shares of the blocks (i from 1 to n), as one job of an "
        "array that shares a cache_dir; a last prepare without --shard then puts them together",
    )
    parser.add_argument(
        "--report",
        type=local_path,
        metavar="FILE",
        help="write row counts, mixture and seconds as JSON",
    )
    args = parser.parse_args()
    if args.shard and args.report:
        raise UserError("a --shard does not know the mixture, which --report writes; leave one out")
    if args.report and not args.report.absolute().parent.is_dir():
        raise UserError(f"--report {args.report}: there is no such directory")

    from moi_jax.config.load import load_config

    options = {"workers": args.workers, "decontaminate.path": args.decontaminate}
    overrides = [f"data.{key}={value}" for key, value in options.items() if value is not None]
    config = load_config(args.config, [*args.overrides, *overrides])

    from moi_jax.checkpoints.experiment import open_experiment
    from moi_jax.common.log import show_logs
    from moi_jax.data.cache.prepare import prepare_shard
    from moi_jax.data.preparation import prepare_data

    show_logs()
    experiment = open_experiment(config)
    if args.shard:
        prepare_shard(experiment.config.data, experiment.tokenizer, *args.shard)
        return
    report = prepare_data(experiment.config, experiment.tokenizer)
    if args.report:
        args.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
