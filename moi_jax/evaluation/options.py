"""What an evaluation is asked to do. Light to import: the command builds it before jax starts."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from moi_jax.common.errors import UserError

if TYPE_CHECKING:
    from moi_jax.config import Config

# The task of the held-out losses, beside the names of the benchmarks.
HELD_OUT = "held_out"


@dataclass(frozen=True)
class BenchmarkOptions:
    """How benchmarks are run. Each task reads the options that concern it.

    Attributes:
      data: the directory of benchmark files, see docs/evaluation.md.
      out: the directory of results, and of the files that a task keeps for itself.
      limit: run this many items of each task, evenly spaced over the file; None is all.
      shots: worked examples before the question; None is the task's own number.
      samples: answers to each item; more than one needs a temperature.
      temperature: None is the protocol's own (0 except for MT-Bench).
      max_new_tokens: None is the task's own.
      too_long: an item that does not fit the context counts as wrong (fail) or is left out (skip).
    """

    data: Path
    out: Path
    limit: int | None = None
    shots: int | None = None
    samples: int = 1
    temperature: float | None = None
    top_p: float = 1.0
    seed: int = 0
    max_new_tokens: int | None = None
    too_long: Literal["fail", "skip"] = "fail"
    # HumanEval and MBPP
    allow_code_execution: bool = False
    sandbox: Literal["strict", "weak"] = "strict"
    code_timeout: float = 3.0  # seconds of a program with its tests, as in openai/human-eval
    code_packages: tuple[str, ...] = ()  # installed packages that programs may import
    # MMLU
    mmlu_method: Literal["generate", "likelihood"] = "generate"
    mmlu_errors: Literal["keep", "skip"] = "keep"  # questions that MMLU-Redux marks as faulty
    # MT-Bench
    judge: str | None = None  # the name of the judge model at the endpoint
    judge_url: str | None = None
    judge_max_cost: float | None = None  # in US dollars
    judge_price: tuple[float, float] | None = None  # dollars per million tokens: prompts, judgments
    # T-Eval
    teval_system: Literal["default_then_user", "as_user", "as_system"] = "default_then_user"
    teval_tools: Literal["published", "native"] = "published"
    teval_compat: bool = False
    teval_embedder: str | None = None  # a name or path for sentence-transformers


@dataclass(frozen=True)
class ModelOptions:
    """How the checkpoint is opened and asked.

    Attributes:
      dtype: of parameters and computation; auto is float32 on a CPU and bfloat16 elsewhere.
      mesh: devices along the axes, such as "fsdp=2,tensor=4"; None is all devices on tensor.
      chat_template: its name or its file; None is the one that the checkpoint was made with.
      verify: compare the files of the parameters with their checksums first.
      base: of a checkpoint of adapters; None is where it was when they were trained.
      system_prompt: of chats that bring none; None is the one saved in the checkpoint.
      system_block: False for no system block at all in these chats.
      slots: answers that are generated at the same time.
      context: tokens of prompt and answer together; None is the model's trained length.
    """

    dtype: str = "auto"
    mesh: str | None = None
    chat_template: str | None = None
    verify: bool = True
    base: Path | None = None
    system_prompt: str | None = None
    system_block: bool = True
    slots: int = 16
    context: int | None = None


@dataclass(frozen=True)
class HeldOutOptions:
    """How the held-out losses are measured.

    Attributes:
      config: the config whose held-out conversations are used; None is the checkpoint's own.
      untrained: a checkpoint to compare with; None is the one that training started from.
      paraphrases: domain -> another wording of its prompt; it replaces one that is known here.
      limit: use this many conversations of each domain, evenly spaced; None is all.
      rows: rows of a batch at full width; shorter rows come in larger batches.
    """

    config: Config | None = None
    untrained: Path | None = None
    paraphrases: Mapping[str, str] = field(default_factory=dict)
    limit: int | None = None
    rows: int = 8


@dataclass(frozen=True)
class EvaluationRequest:
    """One evaluation of one checkpoint, see `moi_jax.evaluation.evaluate.evaluate`.

    Attributes:
      checkpoint: a step directory, or a run (its newest step).
      benchmarks: the options of all tasks, and the directory of results.
      tasks: names of benchmarks, "all" for the seven, and `HELD_OUT`.
      prompt_tasks: benchmarks that also run under each prompt of the prompt matrix.
      lm_eval_tasks: tasks, groups or tags of lm-evaluation-harness.
      lm_eval_include: a directory of further task files for lm-evaluation-harness.
      compare: directories of other results that report.html shows beside these.
      command: the line that asked for it, for results.json; None where a program did.
    """

    checkpoint: Path
    benchmarks: BenchmarkOptions
    tasks: tuple[str, ...] = (HELD_OUT,)
    model: ModelOptions = ModelOptions()
    held_out: HeldOutOptions = HeldOutOptions()
    prompt_tasks: tuple[str, ...] = ()
    lm_eval_tasks: tuple[str, ...] = ()
    lm_eval_include: Path | None = None
    compare: tuple[Path, ...] = ()
    command: str | None = None


def check_request(request: EvaluationRequest) -> None:
    """Raises UserError where options do not go together."""
    options = request.benchmarks
    if options.samples > 1 and not options.temperature:
        raise UserError("--samples above 1 needs a --temperature: greedy answers are all the same")
    if not request.tasks and not request.lm_eval_tasks:
        raise UserError("neither --tasks nor --lm-eval names a task, so there is nothing to do")
    prompt_given = request.model.system_prompt is not None or not request.model.system_block
    if request.tasks == (HELD_OUT,) and not request.lm_eval_tasks and prompt_given:
        raise UserError("held_out has system prompts of its own; --system is for other tasks")
