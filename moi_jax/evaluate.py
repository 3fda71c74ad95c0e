"""python -m moi_jax.evaluate CKPT...: benchmarks and held-out losses of checkpoints."""

import argparse
import dataclasses
import shlex
import sys
from pathlib import Path

from moi_jax.cli.arguments import (
    COUNT,
    MONEY,
    POSITIVE,
    PROBABILITY,
    SECONDS,
    TEMPERATURE,
    add_hosts,
    add_model,
    local_path,
    text,
)
from moi_jax.cli.command import run_command
from moi_jax.cli.hosts import check_same_command, join_hosts
from moi_jax.cli.jax_environment import prepare_jax
from moi_jax.config.training import COMPILATION_CACHE
from moi_jax.evaluation.options import (
    HELD_OUT,
    BenchmarkOptions,
    EvaluationRequest,
    HeldOutOptions,
    ModelOptions,
    check_request,
)
from moi_jax.evaluation.tasks import TASKS

# The benchmarks of --generate without names.
PROMPT_TASKS = ("gsm8k", "humaneval")


def main() -> int:
    args = _parser().parse_args()
    check_request(
        _request(args, args.checkpoints[0], args.out)
    )  # before jax starts, which takes long
    prepare_jax(COMPILATION_CACHE)

    import jax

    from moi_jax.common.log import show_logs
    from moi_jax.config import Cluster
    from moi_jax.evaluation.evaluate import describe_protocol, evaluate
    from moi_jax.evaluation.several import evaluate_several
    from moi_jax.parallel.hosts import process_index
    from moi_jax.parallel.stuck import limit_batches

    show_logs(warnings_to_stderr=True, process_index=process_index)
    join_hosts(args, Cluster())
    limit_batches(Cluster().stuck_seconds)
    check_same_command(args)
    requests = _requests(args)
    if args.print_protocol:
        for request in requests:
            print(describe_protocol(request, jax.devices()[0].platform))
    elif len(requests) == 1:
        evaluate(requests[0], jax.devices())
    else:
        evaluate_several(requests, jax.devices(), requests[0].benchmarks.out.parent)
    return 0


def _command(args: argparse.Namespace) -> str:
    """The line that repeats this evaluation; an address of a judge is without its secrets."""
    words = sys.argv[1:]
    if args.judge_url:
        from moi_jax.evaluation.tasks.llm_judge import without_secrets

        # Before the words are joined, since that may quote a part of the address.
        shown = without_secrets(args.judge_url)
        words = [word.replace(args.judge_url, shown) for word in words]
    return shlex.join(["python", "-m", "moi_jax.evaluate", *words])


def _requests(args: argparse.Namespace) -> list[EvaluationRequest]:
    """The evaluations that the arguments ask for, each with its directory of results."""
    from moi_jax.checkpoints.items import find_step
    from moi_jax.evaluation.evaluate import RESULTS, default_directory
    from moi_jax.evaluation.several import names_of

    if len(args.checkpoints) == 1:
        (checkpoint,) = args.checkpoints
        return [_request(args, checkpoint, args.out or default_directory(checkpoint))]
    names = names_of([find_step(checkpoint) for checkpoint in args.checkpoints])
    return [
        _request(args, checkpoint, (args.out or RESULTS) / name)
        for checkpoint, name in zip(args.checkpoints, names, strict=True)
    ]


def _request(args: argparse.Namespace, checkpoint: Path, out: Path | None) -> EvaluationRequest:
    """The evaluation of a checkpoint that the arguments ask for."""
    from moi_jax.config.load import load_config

    tasks = args.tasks
    if tasks is None:
        tasks = () if args.lm_eval is not None else (HELD_OUT,)
    options = {f.name: getattr(args, f.name) for f in dataclasses.fields(BenchmarkOptions)}
    options["out"] = out
    return EvaluationRequest(
        checkpoint,
        BenchmarkOptions(**options),
        tasks,
        model=ModelOptions(
            dtype=args.dtype,
            mesh=args.mesh,
            chat_template=args.chat_template,
            verify=args.verify,
            base=args.base,
            system_prompt=args.system,
            system_block=not args.no_system,
            slots=args.slots,
            context=args.context,
        ),
        held_out=HeldOutOptions(
            config=load_config(args.config) if args.config else None,
            untrained=args.untrained,
            paraphrases=dict(args.paraphrase),
            limit=args.limit,
        ),
        prompt_tasks=args.generate,
        lm_eval_tasks=args.lm_eval or (),
        lm_eval_include=args.include_path,
        compare=tuple(args.compare),
        command=_command(args),
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moi_jax.evaluate",
        description="Runs benchmarks on a checkpoint or on the newest step of a run. It writes "
        "results.json, samples/ and report.html into --out. If the command is killed, the same "
        "command continues. Protocols: docs/evaluation.md.",
        epilog=f"tasks: {', '.join(TASKS)} (all: the seven of the paper), and {HELD_OUT}: the "
        "losses of the run's held-out conversations under their own and other system prompts.",
    )
    parser.add_argument(
        "checkpoints",
        type=Path,
        nargs="+",
        metavar="CKPT",
        help="a step directory, or a run; several share the base of their adapters",
    )
    parser.add_argument(
        "--tasks", type=_names, metavar="A,B", help=f"names of tasks, or all (default: {HELD_OUT})"
    )
    parser.add_argument(
        "--data",
        type=local_path,
        default=Path("data/benchmarks"),
        metavar="DIR",
        help="benchmark files, see docs/evaluation.md (default: data/benchmarks)",
    )
    parser.add_argument(
        "--out",
        type=local_path,
        metavar="DIR",
        help="directory of results (default: runs/evaluation/ and the checkpoint's name); with "
        "several checkpoints, each has a directory of its name in it",
    )
    parser.add_argument(
        "--compare",
        type=local_path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="results of other checkpoints, shown in report.html for comparison",
    )
    parser.add_argument(
        "--print-protocol",
        action="store_true",
        help="print what would be run, as a methods paragraph, and run nothing",
    )
    _add_model(parser.add_argument_group("the model"))
    _add_generation(parser.add_argument_group("generation"))
    _add_tasks(parser)
    add_hosts(parser)
    return parser


def _add_model(group: "argparse._ArgumentGroup") -> None:
    add_model(group)
    group.add_argument(
        "--slots", type=POSITIVE, default=16, metavar="N", help="answers in parallel (default: 16)"
    )
    group.add_argument(
        "--context",
        type=POSITIVE,
        metavar="N",
        help="tokens of prompt and answer (default: the model's)",
    )


def _add_generation(group: "argparse._ArgumentGroup") -> None:
    group.add_argument(
        "--limit", type=POSITIVE, metavar="N", help="N items per task, evenly spaced"
    )
    group.add_argument(
        "--shots", type=COUNT, metavar="N", help="worked examples per prompt (default: none)"
    )
    group.add_argument(
        "--samples", type=POSITIVE, default=1, metavar="N", help="answers per item, for pass@k"
    )
    group.add_argument(
        "--temperature", type=TEMPERATURE, metavar="T", help="default: the protocol's, mostly 0"
    )
    group.add_argument("--top-p", type=PROBABILITY, default=1.0, metavar="P")
    group.add_argument("--seed", type=COUNT, default=0, metavar="N")
    group.add_argument(
        "--max-new-tokens", type=POSITIVE, metavar="N", help="default: the task's own"
    )
    group.add_argument(
        "--too-long",
        choices=("fail", "skip"),
        default="fail",
        help="an item longer than the context counts as wrong (fail) or is left out (skip)",
    )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    code = parser.add_argument_group("humaneval, mbpp")
    code.add_argument(
        "--allow-code-execution",
        action="store_true",
        help="run the code that the model writes, in a sandbox",
    )
    code.add_argument(
        "--sandbox",
        choices=("strict", "weak"),
        default="strict",
        help="weak: run even if this machine cannot enforce every limit",
    )
    code.add_argument(
        "--code-timeout",
        type=SECONDS,
        default=3.0,
        metavar="SECONDS",
        help="for a program with its tests (default: 3, as in openai/human-eval)",
    )
    code.add_argument(
        "--code-packages",
        type=_names,
        default=(),
        metavar="A,B",
        help="installed packages that programs may import, such as numpy (default: none)",
    )
    mmlu = parser.add_argument_group("mmlu")
    mmlu.add_argument("--mmlu-method", choices=("generate", "likelihood"), default="generate")
    mmlu.add_argument(
        "--mmlu-errors",
        choices=("keep", "skip"),
        default="keep",
        help="questions whose error_type, a column of MMLU-Redux, is not ok",
    )
    judge = parser.add_argument_group("mt_bench")
    judge.add_argument(
        "--judge", metavar="MODEL", help="the judge; without one, answers are only written"
    )
    judge.add_argument(
        "--judge-url",
        metavar="URL",
        help="an OpenAI-compatible API; its key is read from OPENAI_API_KEY",
    )
    judge.add_argument(
        "--judge-price",
        type=MONEY,
        nargs=2,
        metavar=("IN", "OUT"),
        help="dollars per million input and output tokens, to show the cost before the first call",
    )
    judge.add_argument(
        "--judge-max-cost", type=MONEY, metavar="DOLLARS", help="stop before the cost exceeds this"
    )
    teval = parser.add_argument_group("teval")
    teval.add_argument(
        "--teval-system",
        choices=("default_then_user", "as_user", "as_system"),
        default="default_then_user",
        help="where the system text of an item goes",
    )
    teval.add_argument(
        "--teval-tools",
        choices=("published", "native"),
        default="published",
        help="native: tools and calls as the model's chat template writes them, where the answer "
        "is a call",
    )
    teval.add_argument(
        "--teval-compat",
        action="store_true",
        help="score plans exactly as upstream, with its mistake",
    )
    teval.add_argument(
        "--teval-embedder", metavar="NAME", help="sentence-transformers model, for plan and reason"
    )
    held_out = parser.add_argument_group(HELD_OUT)
    held_out.add_argument(
        "--config",
        type=local_path,
        metavar="FILE",
        help="config of the data (default: the checkpoint's own)",
    )
    held_out.add_argument(
        "--untrained",
        type=Path,
        metavar="CKPT",
        help="a checkpoint to compare with (default: the start of the run)",
    )
    held_out.add_argument(
        "--paraphrase",
        type=_paraphrase,
        action="append",
        default=[],
        metavar="DOMAIN=TEXT",
        help="another wording of a domain's prompt (built in for the shipped prompts)",
    )
    held_out.add_argument(
        "--generate",
        type=_names,
        nargs="?",
        const=PROMPT_TASKS,
        default=(),
        metavar="A,B",
        help=f"run these benchmarks under each prompt too ({','.join(PROMPT_TASKS)})",
    )
    harness = parser.add_argument_group("lm-evaluation-harness")
    harness.add_argument("--lm-eval", type=_names, metavar="A,B", help="names of its tasks")
    harness.add_argument("--include-path", type=local_path, metavar="DIR", help="more task files")


def _names(given: str) -> tuple[str, ...]:
    """Each name of a comma-separated list once."""
    return tuple(dict.fromkeys(filter(None, map(str.strip, given.split(",")))))


def _paraphrase(given: str) -> tuple[str, str]:
    domain, equals, prompt = text(given).partition("=")
    if not (domain and equals and prompt):
        raise argparse.ArgumentTypeError(f"{given!r} is not DOMAIN=TEXT")
    return domain, prompt


if __name__ == "__main__":
    run_command(main)
