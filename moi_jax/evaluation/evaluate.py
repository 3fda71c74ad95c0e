"""One evaluation of one checkpoint: held-out losses, benchmarks, lm-eval tasks, and a report."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax

from moi_jax.checkpoints.items import find_step, parameters_fingerprint, read_items
from moi_jax.checkpoints.opener import OpenCheckpoint, open_checkpoint, open_tokenizer
from moi_jax.checkpoints.parameters import Bases
from moi_jax.common.atomic_files import check_writable
from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.evaluation.benchmarks import all_settings, results_so_far, run_benchmarks
from moi_jax.evaluation.methods import (
    INTERVALS,
    describe_held_out,
    describe_lm_eval,
    describe_model,
    describe_task,
)
from moi_jax.evaluation.options import (
    HELD_OUT,
    BenchmarkOptions,
    EvaluationRequest,
    ModelOptions,
    check_request,
)
from moi_jax.evaluation.prompt_matrix.benchmarks import run_under_prompts
from moi_jax.evaluation.prompt_matrix.measure import measure_held_out
from moi_jax.evaluation.prompt_matrix.prompts import distinct_prompts
from moi_jax.evaluation.protocol import Item, Task, evenly_spaced
from moi_jax.evaluation.provenance import data_digests, open_session
from moi_jax.evaluation.reports.report import write_report
from moi_jax.evaluation.results import read_results
from moi_jax.evaluation.tasks import open_task, task_names
from moi_jax.models.compute import resolve_dtype
from moi_jax.parallel import hosts
from moi_jax.sampling.chat_model import ChatModel, make_chat_model
from moi_jax.text.tokenizer import Tokenizer

RESULTS = Path("runs/evaluation")

log = logging.getLogger(__name__)

Json = dict[str, Any]


@dataclass(frozen=True)
class EvaluationResult:
    """What an evaluation measured. All of it is in the files of `directory` too.

    Attributes:
      results: what results.json holds after this evaluation; None where no benchmark ran.
      held_out: what held_out.json holds; None where the held-out losses were not asked for.
      lm_eval: the results of lm-evaluation-harness; None where none of its tasks ran.
      report: the path of report.html; None where the directory has no results.json.
    """

    directory: Path
    results: Json | None = None
    held_out: Json | None = None
    lm_eval: Json | None = None
    report: Path | None = None


@dataclass(frozen=True)
class _Opened:
    """The tasks of a request, their data read."""

    tasks: list[tuple[Task, list[Item]]]
    prompt_tasks: list[tuple[Task, list[Item]]]
    lm_eval_tasks: list[Any]


def evaluate(
    request: EvaluationRequest,
    devices: Sequence[jax.Device],
    bases: Bases | None = None,
) -> EvaluationResult:
    """Runs everything that the request asks for, and writes it into the directory of results.

        options = BenchmarkOptions(data=Path("data/benchmarks"), out=Path("out"), limit=50)
        request = EvaluationRequest(Path("runs/quickstart"), options, tasks=("gsm8k",))
        evaluate(request, jax.devices()).results["tasks"]["gsm8k"]["score"]

    An evaluation that was killed continues when it is asked for again. Processes that were joined
    (see `moi_jax.parallel.joining`) call it together, and process 0 writes.

    Args:
      devices: the devices that the mesh is made of.
      bases: of adapters, kept for the next checkpoints: see `read_parameters`. The sampler then
        holds a copy of them of its own.

    Raises:
      UserError: the checkpoint, the data, the options or the machine do not allow it. Everything
        that was finished before is kept.
    """
    check_request(request)
    if request.lm_eval_tasks and hosts.joined():
        raise UserError(
            "lm-evaluation-harness runs in one process; give --lm-eval to a command on one host"
        )
    out = request.benchmarks.out
    # Everything that can be refused is refused before the checkpoint is read.
    if hosts.is_main():
        for directory in request.compare:
            read_results(directory / "results.json")
    opened = _open_tasks(request)
    options = request.model
    shares = bases is not None and read_items(request.checkpoint).base is not None
    checkpoint = open_checkpoint(
        request.checkpoint,
        devices=devices,
        dtype=options.dtype,
        mesh=options.mesh,
        chat_template=options.chat_template,
        verify=options.verify,
        base=options.base,
        by_layer=not shares and _only_generates(request, opened),
        bases=bases,
    )
    results = held_out = lm_eval = None
    with jax.set_mesh(checkpoint.mesh):
        model, made_by = _chat_model(checkpoint, options)
        if hosts.is_main():
            check_writable(out)
            if opened.tasks or opened.lm_eval_tasks:
                results_so_far(out, made_by)
        if HELD_OUT in request.tasks:
            held_out = measure_held_out(checkpoint, request.held_out, out)
        if opened.tasks or opened.lm_eval_tasks:
            log.info(f"{checkpoint.step} in {checkpoint.dtype}; progress in {out}/progress.log")
        session = None
        if opened.tasks or opened.prompt_tasks:
            session = open_session(checkpoint, request.command, options.verify)
        if opened.tasks:
            results = run_benchmarks(opened.tasks, model, made_by, request.benchmarks, session)
        if opened.lm_eval_tasks:
            log.info(f"lm-eval: {model.sampler.describe(model.parameters)}")
            from moi_jax.evaluation.harness.run import run_lm_eval

            lm_eval = run_lm_eval(opened.lm_eval_tasks, model, made_by, request.benchmarks)
        if opened.prompt_tasks:
            run_under_prompts(
                opened.prompt_tasks,
                model,
                checkpoint.prompts,
                made_by,
                request.benchmarks,
                session,
            )
    report = hosts.from_main("the report", partial(_report, out, request.compare))
    if report:
        log.info(f"report {report}")
    return EvaluationResult(out, results, held_out, lm_eval, Path(report) if report else None)


def _only_generates(request: EvaluationRequest, opened: _Opened) -> bool:
    """Whether the model is only asked for answers, and for no losses or likelihoods of texts."""
    items = [item for _, of_task in (*opened.tasks, *opened.prompt_tasks) for item in of_task]
    losses = HELD_OUT in request.tasks or opened.lm_eval_tasks
    return not losses and not any(item.choices for item in items)


def _report(out: Path, compare: Sequence[Path]) -> str | None:
    """Writes the report where there are results; returns its path."""
    if not (out / "results.json").exists():
        return None
    return str(write_report([out, *compare], out / "report.html"))


def default_directory(checkpoint: Path) -> Path:
    """Where the results of a checkpoint go unless another directory is named.

    Raises:
      UserError: there is no checkpoint.
    """
    return RESULTS / checkpoint_name(find_step(checkpoint))


def checkpoint_name(step: Path) -> str:
    """A short name of a step directory: "RUN-STEP" within a run, else its own name."""
    step = expand_home(step).resolve()
    if step.parent.name == "checkpoints":
        return f"{step.parent.parent.name}-{step.name}"
    return step.name


def _open_tasks(request: EvaluationRequest) -> _Opened:
    options = request.benchmarks
    names = [name for name in task_names(request.tasks) if name != HELD_OUT]
    tasks = [open_task(name, options) for name in names]
    prompt_tasks = [open_task(name, options) for name in task_names(request.prompt_tasks)]
    lm_eval_tasks: list[Any] = []
    if request.lm_eval_tasks:
        # lm-evaluation-harness is an optional dependency.
        from moi_jax.evaluation.harness.run import open_tasks

        lm_eval_tasks = open_tasks(request.lm_eval_tasks, request.lm_eval_include)
    return _Opened(tasks, prompt_tasks, lm_eval_tasks)


def _chat_model(checkpoint: OpenCheckpoint, options: ModelOptions) -> tuple[ChatModel, Json]:
    """The model under its system prompt, and what identifies it in the results."""
    made_by = _made_by(checkpoint.step, checkpoint.tokenizer, checkpoint.dtype, options)
    make_chat = make_chat_model(
        checkpoint.bind,
        checkpoint.config,
        checkpoint.tokenizer,
        made_by["system_prompt"],
        slots=options.slots,
        context=options.context,
        mesh=checkpoint.mesh,
    )
    return make_chat(checkpoint.parameters), made_by


def _made_by(step: Path, tokenizer: Tokenizer, dtype: str, options: ModelOptions) -> Json:
    """What identifies the model of a step in the results."""
    system_prompt = options.system_prompt
    if system_prompt is None:
        system_prompt = read_items(step).prompts["default_system_prompt"]
    if not options.system_block:
        system_prompt = None
    return {
        "name": checkpoint_name(step),
        "parameters": parameters_fingerprint(step),
        "chat_template": tokenizer.template.name,
        "template_hash": tokenizer.template.fingerprint(),
        "system_prompt": system_prompt,
        "dtype": dtype,
    }


def describe_protocol(request: EvaluationRequest, platform: str) -> str:
    """What the request would run, as a methods paragraph; nothing is run.

    Args:
      platform: of the devices that would run it.

    Raises:
      UserError: as in `evaluate`.
    """
    check_request(request)
    opened, options = _open_tasks(request), request.benchmarks
    step = find_step(request.checkpoint)
    tokenizer, _ = open_tokenizer(step, request.model.chat_template)
    dtype = resolve_dtype(request.model.dtype, platform)
    made_by = _made_by(step, tokenizer, dtype, request.model)
    stored = read_items(step)
    context = request.model.context or stored.model.seq_length
    own_prompt = bool(opened.tasks or opened.lm_eval_tasks)
    told = [describe_model(made_by, {}, own_prompt=own_prompt)]
    if HELD_OUT in request.tasks:
        told.append(describe_held_out(request.held_out))
    told += _describe_tasks(opened.tasks, context, options)
    if opened.lm_eval_tasks:
        told.append(describe_lm_eval(request.lm_eval_tasks, options))
    prompts = distinct_prompts(stored.prompts, tokenizer)
    for words in _describe_tasks(opened.prompt_tasks, context, options):
        told.append(f"Under each of {len(prompts)} system prompts ({', '.join(prompts)}), {words}")
    if opened.tasks or opened.prompt_tasks:
        told.append(INTERVALS)
    return "\n\n".join(told)


def _describe_tasks(
    tasks: Sequence[tuple[Task, Sequence[Item]]], context: int, options: BenchmarkOptions
) -> list[str]:
    """The protocol of each task in words."""
    told = []
    for task, items in tasks:
        # The words do not tell the system prompt, which those about the model do.
        settings = all_settings(task, None, context, options, task.settings())
        asked = len(evenly_spaced(items, options.limit))
        data = data_digests(options.data / task.name)
        told.append(describe_task(task, asked, len(items), settings, data))
    return told
