"""Runs benchmarks on one model: answers, scores, samples and results in one directory.

DIR/results.json, DIR/samples/TASK.jsonl    what people read, written whole
DIR/answers/TASK.jsonl                      the model's texts as they come: a killed run goes on
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich import progress
from rich.console import Console

from moi_jax.console import say
from moi_jax.errors import UserError, cannot_write
from moi_jax.evaluation.answering import AnswerLog, answer_items, evenly_spaced, places
from moi_jax.evaluation.chat_model import ChatModel
from moi_jax.evaluation.options import Options
from moi_jax.evaluation.protocol import Item, Task
from moi_jax.evaluation.results import Scored, overall, summarize
from moi_jax.whole_files import write_whole

Json = dict[str, Any]


def run_task(
    task: Task,
    items: Sequence[Item],
    model: ChatModel,
    options: Options,
    log: AnswerLog,
    console: Console,
) -> tuple[list[Scored], int]:
    """Answers and scores of the items, and the number left out as too long (options.too_long)."""
    total = sum(len(places(item, options)) for item in items)
    with _bar(f"{task.name}: answers", total, console) as advance:
        answered = answer_items(task, items, model, options, log, advance)
    kept = answered
    if options.too_long == "skip":
        kept = [(item, answer) for item, answer in answered if "too_long" not in answer.finishes]
    scored: list[Scored] = []
    with _bar(f"{task.name}: scores", len(kept), console) as advance:
        for (item, answer), score in zip(kept, task.score(kept), strict=True):
            scored.append((item, answer, score))
            advance()
    return scored, len(answered) - len(kept)


def run_benchmarks(
    tasks: Sequence[tuple[Task, Sequence[Item]]],
    model: ChatModel,
    made_by: Json,
    options: Options,
    console: Console,
) -> Json:
    """Runs the tasks one after another and writes results and samples into options.out.

    Args:
      tasks: each with all of its items.
      made_by: what stands for the model in the results: checkpoint, prompts, template.

    Returns:
      What results.json holds: also the tasks of earlier calls on the same model.

    Raises:
      UserError: options.out holds results of another model or of other settings.
    """
    path = options.out / "results.json"
    results: Json = {"checkpoint": made_by, "tasks": {}}
    if path.exists():
        results = read_results(path)
    if results["checkpoint"] != made_by:
        raise UserError(
            f"{path} holds results of another model or system prompt "
            f"({_difference(results['checkpoint'], made_by)}); choose another --out"
        )
    for task, items in tasks:
        asked = evenly_spaced(items, options.limit)
        settings = _settings(task, model, options)
        log = AnswerLog(options.out / "answers" / f"{task.name}.jsonl", {**made_by, **settings})
        with closing(log):
            scored, skipped = run_task(task, asked, model, options, log, console)
        summary = summarize(task, scored, skipped, whole=options.limit is None)
        summary["settings"] = {**settings, "limit": options.limit, **summary["settings"]}
        results["tasks"][task.name] = summary
        results["overall"] = overall(results["tasks"])
        _write(options.out / "samples" / f"{task.name}.jsonl", _samples(scored))
        _write(path, json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        say(console, f"{task.name}: {describe(summary)}")
        for note in summary["notes"]:
            say(console, f"  {note}")
    return results


def describe(summary: Json) -> str:
    """A task's results in one line."""
    if summary["score"] is None:
        metrics = summary["metrics"].items()
        means = ", ".join(f"{name} {metric['mean']:.3f}" for name, metric in metrics)
        return f"no score; {means or 'nothing was measured'} over {summary['items']} items"
    low, high = summary["interval"]
    failures = ", ".join(f"{count} {kind}" for kind, count in summary["failures"].items())
    line = f"{summary['score']:.1f} ({low:.1f} to {high:.1f}) over {summary['items']} items"
    return f"{line}; {failures}" if failures else line


def read_results(path: Path) -> Json:
    """Raises UserError where the file is missing or damaged."""
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        if {"checkpoint", "tasks"} <= results.keys():
            return results
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"cannot read {path}: {error}; is that a directory of results?") from None
    raise UserError(f"{path} is no results.json of an evaluation")


def parameters_fingerprint(step: Path) -> str:
    """Of a checkpoint's parameters, by their files' names (which are random) and sizes."""
    folder = step / "parameters"
    files = sorted(
        (str(file.relative_to(folder)), file.stat().st_size)
        for file in folder.rglob("*")
        if file.is_file()
    )
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]


def _settings(task: Task, model: ChatModel, options: Options) -> Json:
    """What, beside the model and the prompts, decides the answers of a task."""
    return {
        "system_prompt": model.system_prompt,
        "samples": options.samples,
        "temperature": options.temperature,
        "top_p": options.top_p,
        "seed": options.seed,
        "max_new_tokens": options.max_new_tokens or task.max_new_tokens,
        "context": model.sampler.context,
    }


def _difference(before: Json, now: Json) -> str:
    keys = [key for key in now if before.get(key) != now[key]]
    return ", ".join(f"{key} {before.get(key)!r}, now {now[key]!r}" for key in keys)


def _samples(scored: Sequence[Scored]) -> str:
    lines = []
    for item, answer, score in scored:
        line = {
            "id": item.id,
            "group": item.group,
            "messages": [
                {"role": message.role, "content": message.content} for message in item.messages
            ],
            "follow_ups": list(item.follow_ups),
            "answers": list(answer.texts),
            "finishes": list(answer.finishes),
            "log_likelihoods": list(answer.log_likelihoods),
            "gold": item.gold,
            **asdict(score),
        }
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)


def _write(path: Path, text: str) -> None:
    """Raises UserError where the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        raise cannot_write(path, error) from None


@contextmanager
def _bar(what: str, total: int, console: Console) -> Iterator[Callable[[], None]]:
    """A progress bar on a terminal; call what it yields for each thing done."""
    columns = (
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TimeElapsedColumn(),
        progress.TimeRemainingColumn(),
    )
    off = not console.is_terminal
    with progress.Progress(*columns, console=console, transient=True, disable=off) as bar:
        task = bar.add_task(what, total=total)
        yield lambda: bar.advance(task)
