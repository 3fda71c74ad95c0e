"""python -m moi_jax.prepare --config FILE: sources into the tokenised cache, with the mixture."""

import argparse
import json
import time
from pathlib import Path

from moi_jax.common.errors import UserError, run_command
from moi_jax.config.load import load_config


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
        "plans the first epoch and shows the mixture. Training does the same by itself. What was "
        "cut short goes on where it was.",
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML, see docs/config.md")
    parser.add_argument(
        "overrides", nargs="*", metavar="section.key=value", help="settings that win over FILE"
    )
    parser.add_argument(
        "--workers", metavar="N", help="processes, data.workers; 1: in this process"
    )
    parser.add_argument(
        "--decontaminate",
        metavar="DIR",
        help="benchmark files whose questions no row may hold, data.decontaminate.path",
    )
    parser.add_argument(
        "--shard",
        type=_shard,
        metavar="i/n",
        help="prepare the i-th of n shares of the blocks, i from 1 to n, as one of a job array "
        "with one cache_dir, without the mixture; a prepare without --shard after them assembles",
    )
    parser.add_argument(
        "--report", type=Path, metavar="FILE", help="write rows, mixture and seconds there as JSON"
    )
    args = parser.parse_args()
    if args.shard and args.report:
        raise UserError("--report belongs to the prepare without --shard, which knows the mixture")
    if args.report and not args.report.absolute().parent.is_dir():
        raise UserError(f"--report {args.report}: there is no such directory")
    options = {"workers": args.workers, "decontaminate.path": args.decontaminate}
    overrides = [f"data.{key}={value}" for key, value in options.items() if value is not None]
    config = load_config(args.config, [*args.overrides, *overrides])

    from moi_jax.checkpoints.experiment import open_experiment
    from moi_jax.common.log import show_logs
    from moi_jax.data.cache.prepare import prepare_shard
    from moi_jax.data.cache.selection import row_counts
    from moi_jax.data.dataset import open_dataset

    show_logs()
    experiment = open_experiment(config)
    if args.shard:
        prepare_shard(experiment.config.data, experiment.tokenizer, *args.shard)
        return
    begin = time.perf_counter()
    dataset = open_dataset(experiment.config, experiment.tokenizer)
    prepared = time.perf_counter()
    mixture = dataset.log_mixture(dataset.plan())
    if args.report:
        seconds = {"prepare": prepared - begin, "plan": time.perf_counter() - prepared}
        report = {
            "domains": row_counts(dataset.caches, dataset.selections),
            "files": {cache.name: cache.manifest["files"] for cache in dataset.caches},
            "mixture": mixture,
            "seconds": {name: round(value, 3) for name, value in seconds.items()},
        }
        args.report.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
