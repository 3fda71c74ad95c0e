"""python -m moi_jax.audit RUN: a run proves itself, from its data to its last step."""

import argparse
import logging
from pathlib import Path

from moi_jax.cli.arguments import COUNT, POSITIVE, add_base, local_path, text
from moi_jax.cli.command import run_command
from moi_jax.cli.jax_environment import prepare_jax
from moi_jax.common.deterministic import ask_for_determinism
from moi_jax.common.errors import UserError
from moi_jax.config.training import COMPILATION_CACHE

# Not __name__, which is __main__ in a command.
log = logging.getLogger("moi_jax.audit")


def main() -> int:
    args = _arguments()
    if args.check:
        return _check(args.check)

    prepare_jax(COMPILATION_CACHE)  # a replay needs the flags of the run
    _refuse_processes()

    import jax

    from moi_jax.common.log import show_logs
    from moi_jax.evaluation.while_training import make_evaluations
    from moi_jax.training.audit.audit import AuditOptions, audit
    from moi_jax.training.audit.finding import OK
    from moi_jax.training.audit.saved_run import find_run, was_deterministic

    show_logs(warnings_to_stderr=True)
    if was_deterministic(find_run(args.run)):
        ask_for_determinism()
    options = AuditOptions(
        run=args.run,
        overrides=tuple(args.overrides),
        out=args.out,
        rows=args.rows,
        steps=args.steps,
        seed=args.seed,
        base=args.base,
    )
    result = audit(options, jax.devices(), make_evaluations)
    log.info(f"{'passed' if result.verdict == OK else result.verdict}: {result.summary}")
    log.info(f"findings {result.file}")
    log.info(f"page     {result.page}")
    return 0 if result.verdict == OK else 1


def _refuse_processes() -> None:
    from moi_jax.parallel.cluster_environment import find_place

    if place := find_place(None, None, None, join_seconds=10):
        raise UserError(
            f"{place.found_by} started {place.count} processes, and an audit runs in one; start it "
            f"as one task on one host"
        )


def _check(file: Path) -> int:
    from moi_jax.training.audit.signed import check_signed

    content = check_signed(file)
    if content is None:
        print(f"{file} has changed since the audit wrote it")
        return 1
    print(f"{file} is as it was written: {content['run']}, {content['date']}, {content['verdict']}")
    return 0


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moi_jax.audit",
        description="Checks that a run is what it says: checkpoints, data, recorded figures and "
        "the realised mix; rows run segment by segment, and steps replayed from a checkpoint. It "
        "changes nothing in the run, which may go on meanwhile.",
        epilog="Exit status: 0 passed, 1 a check failed or could not be made, 2 your mistake "
        "(one line says which). What it proves: docs/audit.md.",
    )
    parser.add_argument("run", nargs="?", type=Path, metavar="RUN", help="the directory of a run")
    parser.add_argument(
        "overrides",
        nargs="*",
        type=text,
        metavar="section.key=value",
        help="settings that may differ in a resumed run, such as data.root=DIR or mesh.fsdp=2",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="DIR",
        help="directory of the findings (default: RUN/audit)",
    )
    parser.add_argument(
        "--rows",
        type=POSITIVE,
        default=32,
        metavar="N",
        help="random rows that are run segment by segment (default: 32)",
    )
    parser.add_argument(
        "--steps",
        type=POSITIVE,
        default=20,
        metavar="N",
        help="steps that are replayed at most (default: 20)",
    )
    parser.add_argument("--seed", type=COUNT, default=0, metavar="N", help="chooses the rows")
    add_base(parser)
    parser.add_argument(
        "--check",
        type=local_path,
        metavar="FILE",
        help="only tell whether an audit.json was altered",
    )
    args = parser.parse_intermixed_args()
    if bool(args.check) == bool(args.run):
        raise UserError("name either the directory of a run, or --check with an audit.json")
    return args


if __name__ == "__main__":
    run_command(main)
