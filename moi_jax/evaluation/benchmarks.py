"""Runs benchmarks on one model and writes everything into one directory.

DIR/results.json, DIR/samples/TASK.jsonl    results and samples, for people; written at once
DIR/answers/TASK.jsonl                      the model's texts, written as they arrive, so that an
                                            evaluation that was killed continues
DIR/progress.log                            how far the work is, a line a minute

Of the processes of a run, process 0 alone scores, and reads and writes these files.
"""

import json
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from moi_jax.common.atomic_files import atomic_write_text
from moi_jax.common.errors import UserError, cannot_write
from moi_jax.common.progress import count_bar
from moi_jax.common.progress_lines import progress_lines
from moi_jax.evaluation.methods import describe_task
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Response, Score, Task, evenly_spaced
from moi_jax.evaluation.provenance import Session
from moi_jax.evaluation.responses import (
    collect_responses,
    count_tokens,
    forget_changed,
    log_places,
)
from moi_jax.evaluation.results import Scored, describe, outcome, overall, read_results, summarize
from moi_jax.parallel import hosts
from moi_jax.sampling.chat_model import ChatModel
from moi_jax.sampling.response_log import ResponseLog, json_line

log = logging.getLogger(__name__)


Json = dict[str, Any]


def run_task(
    task: Task,
    items: Sequence[Item],
    model: ChatModel,
    options: BenchmarkOptions,
    log: ResponseLog,
    after_each: Callable[[], None] = lambda: None,
    progress: Path | None = None,
) -> tuple[list[Scored], int]:
    """Responses and scores of the items, and the number of items left out as too long.

    Args:
      options: too_long="skip" leaves out items that do not fit the context.
      after_each: called after every answer and every score; an exception from it ends the task.
      progress: the file of the lines that tell how far the work is; None writes none.
    """

    def report(on_progress: Callable[[int], None], count: int) -> None:
        on_progress(count)
        after_each()

    forget_changed(items, model, options, log)
    places = [place for item in items for place in log_places(item, options)]

    def answered() -> tuple[int, int]:
        done = [log.found[place] for place in places if place in log.found]
        return len(done), sum(record.get("tokens", 0) for record in done)

    with (
        count_bar(f"{task.name}: answers", len(places)) as on_progress,
        progress_lines(progress, f"{task.name} answers", len(places), answered),
    ):
        responses = collect_responses(
            task, items, model, options, log, partial(report, on_progress)
        )
    kept = responses
    if options.too_long == "skip":
        kept = [
            (item, response) for item, response in responses if "too_long" not in response.finishes
        ]
    scored: list[Scored] = []
    with (
        count_bar(f"{task.name}: scores", len(kept)) as on_progress,
        progress_lines(progress, f"{task.name} scores", len(kept), lambda: (len(scored), 0)),
    ):
        for (item, response), score in zip(kept, _scores(task, kept), strict=True):
            scored.append((item, response, score))
            report(on_progress, 1)
    return scored, len(responses) - len(kept)


def _scores(task: Task, responses: Sequence[tuple[Item, Response]]) -> Iterator[Score]:
    """The scores, one by one: process 0 finds them, and tells each to the others."""
    if not hosts.is_main():
        for _ in responses:
            yield Score(**hosts.from_main("a score", dict))
        return
    for score in task.score(responses):
        hosts.from_main("a score", partial(asdict, score))
        yield score


def run_benchmarks(
    tasks: Sequence[tuple[Task, Sequence[Item]]],
    model: ChatModel,
    made_by: Json,
    options: BenchmarkOptions,
    session: Session | None = None,
) -> Json:
    """Runs the tasks one after another and writes results and samples into options.out.

    Args:
      tasks: each with all of its items.
      made_by: what identifies the model in the results: checkpoint, system prompt, template.
      session: adds to each task what made its figures (`run`), and its protocol in words.

    Returns:
      The content of results.json, with the tasks of earlier calls on the same model.

    Raises:
      UserError: options.out holds results of another model, or answers of other settings.
    """
    with_tools = [item for _, items in tasks for item in items if item.tools]
    for item in with_tools[:1]:  # a template without a form for tools is refused here
        model.prompt(item.messages, item.tools)
    results = hosts.from_main("earlier results", partial(results_so_far, options.out, made_by))
    with ExitStack() as opened:
        # All logs are opened before the first task, so that a mistake shows before hours of work.
        logs = []
        for task, _ in tasks:
            path = options.out / "answers" / f"{task.name}.jsonl"
            made = {**made_by, **answer_settings(task, *_asked_by(model), options)}
            logs.append(opened.enter_context(closing(ResponseLog(path, made))))
        for (task, items), log in zip(tasks, logs, strict=True):
            begun, asked = monotonic(), evenly_spaced(items, options.limit)
            progress = options.out / "progress.log" if hosts.is_main() else None
            scored, skipped = run_task(task, asked, model, options, log, progress=progress)
            summary = hosts.from_main(
                "the results of a task",
                partial(summarize, task, scored, skipped, all_items=options.limit is None),
            )
            own = summary["settings"]
            summary["settings"] = all_settings(task, *_asked_by(model), options, own)
            if session:
                summary |= _provenance(task, asked, items, summary["settings"], session, begun, log)
            _tell(task.name, summary, results["tasks"].get(task.name))
            results["tasks"][task.name] = summary
            results["overall"] = overall(results["tasks"])
            if hosts.is_main():
                _write(options.out / "samples" / f"{task.name}.jsonl", _samples(task, scored))
                _write(options.out / "results.json", json.dumps(results, indent=1) + "\n")
    return results


def results_so_far(out: Path, made_by: Json) -> Json:
    """The content of results.json in `out`; without tasks where there is no such file.

    Raises:
      UserError: the file is damaged, or it is of another model or system prompt.
    """
    path = out / "results.json"
    if not path.exists():
        return {"checkpoint": made_by, "tasks": {}, "overall": None}
    results = read_results(path)
    if results["checkpoint"] != made_by:
        differs = _difference(results["checkpoint"], made_by)
        raise UserError(
            f"{path} holds results of another model or system prompt ({differs}); choose another "
            f"--out"
        )
    return results


def _provenance(
    task: Task,
    asked: Sequence[Item],
    items: Sequence[Item],
    settings: Json,
    session: Session,
    begun: float,
    log: ResponseLog,
) -> Json:
    """`run`, what made the figures of a task that has just ended, and `protocol`, its words."""
    folder = task.options.data / task.name
    places = [place for item in asked for place in log_places(item, task.options)]
    run = hosts.from_main(
        "the provenance", lambda: session.of_task(folder, begun, count_tokens(places, log))
    )
    protocol = describe_task(task, len(asked), len(items), settings, run["data"])
    return {"run": run, "protocol": protocol}


def _tell(name: str, summary: Json, before: Json | None) -> None:
    log.info(f"{name}: {describe(summary)}")
    for note in summary["notes"]:
        log.info(f"  {note}")
    if before and before["settings"] != summary["settings"]:
        differs = _difference(before["settings"], summary["settings"])
        log.info(f"  this replaces an earlier result: {describe(before)} ({differs})")


def _asked_by(model: ChatModel) -> tuple[str | None, int]:
    return model.system_prompt, model.sampler.context


def answer_settings(
    task: Task, system_prompt: str | None, context: int, options: BenchmarkOptions
) -> Json:
    """The settings, apart from the model and the items, that determine the answers."""
    return {
        "system_prompt": system_prompt,
        "samples": options.samples,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "max_new_tokens": options.max_new_tokens or task.max_new_tokens,
        "context": context,
    }


def all_settings(
    task: Task, system_prompt: str | None, context: int, options: BenchmarkOptions, own: Json
) -> Json:
    """The settings of a task as results.json has them.

    Args:
      own: those of `Task.settings`.
    """
    return {
        **answer_settings(task, system_prompt, context, options),
        "limit": options.limit,
        "too_long": options.too_long,
        **own,
    }


def _difference(before: Json, now: Json) -> str:
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return ", ".join(f"{key} {before.get(key)!r}, now {now.get(key)!r}" for key in keys)


def _samples(task: Task, scored: Sequence[Scored]) -> str:
    lines = []
    for item, response, score in scored:
        line = {
            "id": item.id,
            "group": item.group,
            "messages": [
                {"role": message.role, "content": message.content} for message in item.messages
            ],
            "follow_ups": list(item.follow_ups),
            "answers": list(response.texts),
            "finishes": list(response.finishes),
            "log_likelihoods": list(response.log_likelihoods),
            "gold": item.gold,
            "outcome": outcome(task, response, score),
            **asdict(score),
        }
        lines.append(json_line(line))
    return "".join(lines)


def _write(path: Path, text: str) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        atomic_write_text(path, text)
    except OSError as error:
        raise cannot_write(path, error) from None
