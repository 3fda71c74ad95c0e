"""python -m moi_jax.train --config FILE [section.key=value ...]: fine-tune with MoI."""

import argparse
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moi_jax.cli.arguments import add_config, add_hosts
from moi_jax.cli.command import run_command
from moi_jax.cli.hosts import join_hosts, mistakes_told_to_hosts
from moi_jax.cli.jax_environment import prepare_jax
from moi_jax.cli.signals import StopSignals
from moi_jax.common.deterministic import ask_for_determinism
from moi_jax.parallel.xla_flags import describe_flags, likely_platform

# Not __name__, which is __main__ in a command. A line that cannot be written is left out of the
# log, while print() would raise: the run ends as it should, whatever became of standard output.
log = logging.getLogger("moi_jax.train")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m moi_jax.train",
        description="Fine-tunes a model on a mixture of chat data, as the config says.",
        epilog="To resume a run that was stopped, give the same command again. Exit status: 0 "
        "done, 2 your mistake (one line says which), 1 a fault of ours, 128 + the signal's "
        "number if SIGTERM or SIGINT stopped the run (it saves first), 75 if another host was "
        "lost, a step was stuck or an object store did not answer.",
    )
    add_config(parser)
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print the resolved config, the flags of XLA as comments, and exit",
    )
    parser.add_argument(
        "--print-sharding",
        action="store_true",
        help="print how the mesh splits each parameter, and exit; needs no devices unless an axis "
        "of the mesh is -1",
    )
    parser.add_argument(
        "--fresh", action="store_true", help="start over; an old run is moved aside, not deleted"
    )
    parser.add_argument(
        "--allow-change",
        action="store_true",
        help="resume although optimizer, batch size, length or patience of the run changed",
    )
    parser.add_argument(
        "--strict-resume",
        action="store_true",
        help="stop if the newest checkpoint is damaged; else the run resumes from the one before",
    )
    add_hosts(parser)
    args = parser.parse_args()

    from moi_jax.config.load import load_config

    with mistakes_told_to_hosts(args):
        config = load_config(args.config, args.overrides)
    if args.print_config:
        print(config.to_yaml() + describe_flags(likely_platform()), end="")
        return 0
    if args.print_sharding:
        from moi_jax.training.sharding import print_sharding

        print_sharding(config)
        return 0
    prepare_jax(config.train.compilation_cache)
    if config.train.deterministic:
        ask_for_determinism()

    from moi_jax.common.log import show_logs
    from moi_jax.evaluation.while_training import make_evaluations
    from moi_jax.parallel.hosts import process_index
    from moi_jax.training.train import train

    show_logs(process_index=process_index)
    join_hosts(args, config.cluster)
    signals = StopSignals(config.checkpoint.grace_seconds)
    result = train(
        config,
        make_evaluations=make_evaluations,
        fresh=args.fresh,
        allow_change=args.allow_change,
        strict_resume=args.strict_resume,
        stop=_stop(signals, config.cluster.stuck_seconds),
    )
    if not result.finished:
        log.info(
            f"saved step {result.step} to {result.directory}; give the same command again to resume"
        )
        return signals.exit_status
    _log_answers(result.directory)
    log.info(f"checkpoint {result.checkpoint}")
    log.info(f"report     {result.report}")
    return 0


@contextmanager
def _stop(signals: StopSignals, stuck_seconds: int) -> Iterator[Callable[[], bool]]:
    """Yields the function that the run calls after each step to know whether to stop."""
    from moi_jax.parallel.stuck import ending_when_stuck

    with (
        signals.watching() as should_stop,
        ending_when_stuck(stuck_seconds, should_stop) as watched,
    ):
        yield watched


def _log_answers(directory: Path) -> None:
    """Logs the sample answers before and after training, by prompt."""
    import json

    path = directory / "samples.jsonl"
    if not path.exists():
        return
    answers = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    prompts: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for answer in answers:
        key = (answer["domain"], answer["system"], answer["prompt"])
        prompts.setdefault(key, []).append(answer)
    for (domain, system, prompt), given in prompts.items():
        log.info(f"{domain}, {system} system prompt")
        log.info(f"  user: {prompt}")
        for answer in given if len(given) == 1 else (given[0], given[-1]):
            log.info(f"  step {answer['step']}: {answer['answer']}")


if __name__ == "__main__":
    run_command(main)
