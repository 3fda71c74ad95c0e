"""python -m moi_jax.evaluate CKPT: benchmarks and held-out losses of a checkpoint."""

import argparse
import dataclasses
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moi_jax.cli.arguments import (
    COUNT,
    MONEY,
    POSITIVE,
    PROBABILITY,
    TEMPERATURE,
    add_model,
    chosen_system,
    text,
)
from moi_jax.common.errors import UserError, run_command
from moi_jax.evaluation.options import Options
from moi_jax.evaluation.tasks import TASKS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from moi_jax.checkpoints.opener import OpenCheckpoint
    from moi_jax.evaluation.protocol import Item, Task
    from moi_jax.sampling.chat_model import ChatModel

log = logging.getLogger(__name__)


HELD_OUT = "held_out"
CROSSED = "gsm8k,humaneval"


def main() -> int:
    parser = _parser()
    args = parser.parse_args()
    if args.tasks is None and args.lm_eval is None:
        args.tasks = HELD_OUT
    _check(args)
    evaluate(args)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m moi_jax.evaluate",
        description="Runs benchmarks on a checkpoint or the newest step of a run. Results go to "
        "results.json, samples/ and report.html in --out; a killed command goes on when it is "
        "given again. Protocols: docs/evaluation.md.",
        epilog=f"tasks: {', '.join(TASKS)} (the seven), and {HELD_OUT}: the held-out "
        f"conversations of the run under its own and other system prompts.",
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT", help="a step, or a run")
    parser.add_argument("--tasks", metavar="A,B", help=f"or all (default: {HELD_OUT})")
    parser.add_argument(
        "--data",
        type=Path,
        default=Path("data/benchmarks"),
        metavar="DIR",
        help="benchmark files, laid out as docs/evaluation.md says (default: data/benchmarks)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="default: runs/evaluation/ and the checkpoint's name",
    )
    parser.add_argument(
        "--compare",
        type=Path,
        nargs="+",
        default=[],
        metavar="DIR",
        help="results of other checkpoints that report.html is to show beside",
    )
    _add_model(parser.add_argument_group("the model"))
    _add_asking(parser.add_argument_group("how it is asked"))
    _add_tasks(parser)
    return parser


def _add_model(group: "argparse._ArgumentGroup") -> None:
    add_model(group)
    group.add_argument(
        "--slots", type=POSITIVE, default=16, metavar="N", help="answers at once (default: 16)"
    )
    group.add_argument(
        "--context", type=POSITIVE, metavar="N", help="of prompt and answer (default: the model's)"
    )


def _add_asking(group: "argparse._ArgumentGroup") -> None:
    group.add_argument("--limit", type=POSITIVE, metavar="N", help="N items a task, evenly spaced")
    group.add_argument("--shots", type=COUNT, metavar="N", help="worked examples (default: none)")
    group.add_argument(
        "--samples", type=POSITIVE, default=1, metavar="N", help="answers an item, for pass@k"
    )
    group.add_argument(
        "--temperature", type=TEMPERATURE, metavar="T", help="default: the protocol's, 0"
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
        help="an item longer than the context counts as wrong, or is left out",
    )


def _add_tasks(parser: argparse.ArgumentParser) -> None:
    code = parser.add_argument_group("humaneval, mbpp")
    code.add_argument(
        "--allow-code-execution", action="store_true", help="run what the model writes, sandboxed"
    )
    code.add_argument(
        "--sandbox",
        choices=("strict", "weak"),
        default="strict",
        help="weak: also where this machine cannot enforce every limit",
    )
    mmlu = parser.add_argument_group("mmlu")
    mmlu.add_argument("--mmlu-method", choices=("generate", "likelihood"), default="generate")
    judge = parser.add_argument_group("mt_bench")
    judge.add_argument("--judge", metavar="MODEL", help="without one answers are only written")
    judge.add_argument(
        "--judge-url", metavar="URL", help="of an OpenAI-compatible API; key in OPENAI_API_KEY"
    )
    judge.add_argument(
        "--judge-price",
        type=MONEY,
        nargs=2,
        metavar=("IN", "OUT"),
        help="dollars per million tokens read and written, to tell the cost before the first call",
    )
    judge.add_argument(
        "--judge-max-cost", type=MONEY, metavar="DOLLARS", help="ended before it is passed"
    )
    teval = parser.add_argument_group("teval")
    teval.add_argument(
        "--teval-system",
        choices=("default_then_user", "as_user", "as_system"),
        default="default_then_user",
        help="where an item's own system text goes",
    )
    teval.add_argument(
        "--teval-compat", action="store_true", help="plan scores as upstream, its mistake included"
    )
    teval.add_argument(
        "--teval-embedder", metavar="NAME", help="of sentence-transformers, for plan and reason"
    )
    held_out = parser.add_argument_group(HELD_OUT)
    held_out.add_argument(
        "--config", type=Path, metavar="FILE", help="the run's data (default: the checkpoint's own)"
    )
    held_out.add_argument(
        "--untrained",
        type=Path,
        metavar="CKPT",
        help="shown beside (default: what the run began from)",
    )
    held_out.add_argument(
        "--paraphrase",
        type=_paraphrase,
        action="append",
        default=[],
        metavar="DOMAIN=TEXT",
        help="another wording of a domain's prompt (default: known for the shipped prompts)",
    )
    held_out.add_argument(
        "--generate",
        nargs="?",
        const=CROSSED,
        metavar="A,B",
        help=f"cross the prompts with these benchmarks too ({CROSSED})",
    )
    harness = parser.add_argument_group("lm-evaluation-harness")
    harness.add_argument("--lm-eval", metavar="A,B", help="its tasks, by their names there")
    harness.add_argument("--include-path", type=Path, metavar="DIR", help="its tasks of your own")


def _paraphrase(given: str) -> tuple[str, str]:
    domain, equals, prompt = text(given).partition("=")
    if not (domain and equals and prompt):
        raise argparse.ArgumentTypeError(f"{given!r} is not DOMAIN=TEXT")
    return domain, prompt


def _check(args: argparse.Namespace) -> None:
    """Raises UserError where options do not go together."""
    if args.samples > 1 and not args.temperature:
        raise UserError("--samples above 1 needs a --temperature: greedy answers are all the same")
    names, harness = task_names(args.tasks), names_of(args.lm_eval)
    if not names and not harness:
        raise UserError("neither --tasks nor --lm-eval names a task, so there is nothing to do")
    if names == [HELD_OUT] and not harness and (args.system is not None or args.no_system):
        raise UserError("held_out has system prompts of its own; --system is for other tasks")


def names_of(given: str | None) -> list[str]:
    """Each name of a comma-separated list once."""
    return list(dict.fromkeys(filter(None, map(str.strip, (given or "").split(",")))))


def task_names(given: str | None) -> list[str]:
    """The tasks of such a list; all is the seven."""
    listed = names_of(given)
    return list(dict.fromkeys(name for n in listed for name in (TASKS if n == "all" else [n])))


def evaluate(args: argparse.Namespace) -> None:
    """Runs what the arguments ask for.

    Raises:
      UserError: checkpoint, data, options or machine do not allow it; what was finished is kept.
    """
    import jax

    from moi_jax.checkpoints.items import find_step
    from moi_jax.checkpoints.opener import open_checkpoint
    from moi_jax.common.atomic_files import check_writable
    from moi_jax.common.log import show_logs
    from moi_jax.config.load import load_config
    from moi_jax.evaluation.prompts.measure import HeldOutOptions, measure_held_out
    from moi_jax.evaluation.results import read_results
    from moi_jax.evaluation.runner import results_so_far, run_benchmarks
    from moi_jax.evaluation.tasks import open_task

    show_logs(process_index=jax.process_index())
    args.out = args.out or Path("runs/evaluation") / checkpoint_name(find_step(args.checkpoint))
    options = Options(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Options)})
    names = task_names(args.tasks)
    # What can be refused is refused before the checkpoint is read.
    for directory in args.compare:
        read_results(directory / "results.json")
    tasks = [open_task(name, options) for name in names if name != HELD_OUT]
    crossed = [open_task(name, options) for name in task_names(args.generate)]
    harness = _open_harness(args)
    held_out = HeldOutOptions(
        config=load_config(args.config) if args.config else None,
        untrained=args.untrained,
        paraphrases=dict(args.paraphrase),
        limit=args.limit,
    )
    checkpoint = open_checkpoint(
        args.checkpoint,
        devices=jax.devices(),
        dtype=args.dtype,
        mesh=args.mesh,
        chat_template=args.chat_template,
    )
    with jax.set_mesh(checkpoint.mesh):
        prompt = chosen_system(args, checkpoint.prompts["default_system_prompt"])
        model, made_by = _chat_model(checkpoint, args, prompt)
        check_writable(args.out)
        if tasks:
            results_so_far(args.out, made_by)
        if HELD_OUT in names:
            measure_held_out(checkpoint, held_out, args.out)
        if tasks or harness:
            log.info(f"{checkpoint.step} in {checkpoint.dtype}; {model.sampler.describe()}")
            run_benchmarks(tasks, model, made_by, options)
            if harness:
                from moi_jax.evaluation.harness.run import run_lm_eval

                run_lm_eval(harness, model, made_by, options)
        if crossed:
            _crossed_prompts(checkpoint, model, made_by, crossed, options)
    if (args.out / "results.json").exists():
        from moi_jax.evaluation.reports.report import write_report

        log.info(f"report {write_report([args.out, *args.compare], args.out / 'report.html')}")


def checkpoint_name(step: Path) -> str:
    """A short name: that of the folder, or of the run and the step."""
    step = step.expanduser().resolve()
    if step.parent.name == "checkpoints":
        return f"{step.parent.parent.name}-{step.name}"
    return step.name


def _open_harness(args: argparse.Namespace) -> "list[Any]":
    if not names_of(args.lm_eval):
        return []
    from moi_jax.evaluation.harness.run import open_tasks

    return open_tasks(names_of(args.lm_eval), args.include_path)


def _chat_model(
    checkpoint: "OpenCheckpoint", args: argparse.Namespace, system_prompt: str | None
) -> "tuple[ChatModel, dict[str, Any]]":
    """The model under a system prompt, and what stands for it in its results."""
    from moi_jax.checkpoints.items import parameters_fingerprint
    from moi_jax.sampling.chat_model import make_chat_model

    make_chat = make_chat_model(
        checkpoint.bind,
        checkpoint.config,
        checkpoint.tokenizer,
        system_prompt,
        slots=args.slots,
        context=args.context,
        mesh=checkpoint.mesh,
    )
    template = checkpoint.tokenizer.template
    made_by = {
        "name": checkpoint_name(checkpoint.step),
        "parameters": parameters_fingerprint(checkpoint.step),
        "chat_template": template.name,
        "template_hash": template.fingerprint(),
        "system_prompt": system_prompt,
        "dtype": checkpoint.dtype,
    }
    return make_chat(checkpoint.parameters), made_by


def _crossed_prompts(
    checkpoint: "OpenCheckpoint",
    model: "ChatModel",
    made_by: "dict[str, Any]",
    tasks: "Sequence[tuple[Task, Sequence[Item]]]",
    options: Options,
) -> None:
    """The tasks under each prompt of the checkpoint and some that it never saw, side by side."""
    from moi_jax.evaluation.prompts.crossing import single_prompts
    from moi_jax.evaluation.reports.report import write_report
    from moi_jax.evaluation.runner import run_benchmarks
    from moi_jax.evaluation.tasks import make_task

    directories = []
    for name, prompt in single_prompts(checkpoint.prompts, checkpoint.tokenizer).items():
        log.info(f"{name}: {'no system block' if prompt is None else prompt}")
        under = dataclasses.replace(options, out=options.out / "prompts" / name.replace(" ", "_"))
        # Made anew: a task may keep files of its own beside the results.
        again = [(make_task(task.name, under), items) for task, items in tasks]
        asked = dataclasses.replace(model, system_prompt=prompt)
        run_benchmarks(again, asked, {**made_by, "system_prompt": prompt}, under)
        directories.append(under.out)
    log.info(f"report {write_report(directories, options.out / 'prompts' / 'report.html')}")


if __name__ == "__main__":
    run_command(main)
