"""The protocol of an evaluation in words: the methods paragraph of a paper, from results.json."""

from collections.abc import Mapping, Sequence
from importlib.metadata import version
from typing import Any

from moi_jax.evaluation.bootstrap import RESAMPLES
from moi_jax.evaluation.options import BenchmarkOptions, HeldOutOptions
from moi_jax.evaluation.prompt_matrix.gaps import INTERVAL
from moi_jax.evaluation.protocol import Task

Json = dict[str, Any]

# Settings that the sentences below name in words; all others are listed.
TOLD = {"system_prompt", "samples", "temperature", "top_p", "seed", "max_new_tokens", "context"}
TOLD |= {"limit", "too_long", "shots"}
UNITS = {"s": "s", "mib": "MiB"}
INTERVALS = (
    f"Scores go from 0 to 100. Unless something else is said, their 95 % intervals are percentile "
    f"bootstraps over items ({RESAMPLES:,} resamples)."
)
# See `bootstrap.share_interval`.
ALL_OR_NONE = (
    "Where a metric is 1 for all items, or 0 for all, its interval is that of Clopper and Pearson"
)


def describe_model(made_by: Json, run: Json, *, own_prompt: bool = True) -> str:
    """The model, its prompt, and what it ran on.

    Args:
      made_by: `checkpoint` of results.json.
      run: the provenance of a task; {} before anything has run.
      own_prompt: False where all tasks have system prompts of their own.
    """
    system = made_by["system_prompt"]
    prompt = f', under the system prompt "{system}"'
    if system is None:
        prompt = ", without a system block"
    if not own_prompt:
        prompt = ""
    parts = [f"{made_by['name']} was evaluated in {made_by['dtype']}"]
    if run:
        versions, commit = run["versions"], run["commit"]
        code = f" (commit {commit})" if commit else f" (code {versions['code']})"
        parts[0] += (
            f" on {run['device']} with moi_jax {versions['moi_jax']}{code} and jax "
            f"{versions['jax']}"
        )
        began = f", which began from {run['base']}" if run["base"] else ""
        found = f"is {run['values']}" if run["values"] else "was not taken (--no-verify)"
        parts.append(f"The sha256 of its parameters{began}, {found}")
    parts.append(
        f"Prompts are rendered by the chat template {made_by['chat_template']} "
        f"({made_by['template_hash'][:16]}){prompt}"
    )
    return " ".join(f"{part}." for part in parts)


def describe_task(task: Task, asked: int, items: int, settings: Json, data: Json) -> str:
    """How a task is asked and scored.

    Args:
      asked: how many of its `items` are run.
      settings: as results.json has them.
      data: the digests of its files.
    """
    files = ", ".join(f"{name} {digest[:16]}" for name, digest in data.items())
    count = f"{asked:,} items" if asked == items else f"{asked:,} of {items:,} items, evenly spaced"
    chosen = settings.get("method") == "likelihood"
    several = settings["samples"] > 1 and not chosen
    limit = "" if chosen else f"at most {settings['max_new_tokens']:,} new tokens "
    context = f"in a context of {settings['context']:,} tokens"
    others = ", ".join(
        _setting(name, value) for name, value in settings.items()
        if name not in TOLD and value not in (None, "", [])
    )  # fmt: skip
    sentences = [
        f"{task.name}: {count} (sha256 of the files: {files or 'none'})",
        f"{describe_sampling(task, settings)}, {limit}{context}, {_shots(settings)}",
        *([task.scoring] if task.scoring else []),
        *(["The score of an item is the mean over its answers"] if several else []),
        _too_long(task, settings),
        *([] if task.rated else [ALL_OR_NONE]),
        *([f"Further settings: {others}"] if others else []),
    ]
    return " ".join(f"{sentence}." for sentence in sentences)


def _setting(name: str, value: Any) -> str:
    """ "code timeout 3 s" for code_timeout_s: 3.0, for example."""
    *words, last = name.split("_")
    if words and last in UNITS:
        return f"{' '.join(words)} {value:g} {UNITS[last]}"
    shown = ", ".join(map(str, value)) if isinstance(value, list) else value
    return f"{' '.join([*words, last])} {shown}"


def _too_long(task: Task, settings: Mapping[str, Any]) -> str:
    if settings["too_long"] == "skip":
        return "An item that does not fit the context is left out"
    if task.rated:
        return "An answer for which the context has no room is empty"
    return "An item that does not fit the context counts as wrong"


def _shots(settings: Mapping[str, Any]) -> str:
    shots = settings.get("shots") or 0
    return f"{shots} worked examples" if shots else "without worked examples"


def describe_sampling(task: Task, settings: Mapping[str, Any]) -> str:
    """How answers are sampled: "One greedy answer to each", for example."""
    samples, temperature = settings["samples"], settings["temperature"]
    if settings.get("method") == "likelihood":
        return "The likeliest of the given choices"
    how = f"at temperature {temperature}" if temperature else ""
    if temperature is None:
        how = task.own_temperature
    to = "each" if task.turns == 1 else f"each of the {task.turns} turns of an item"
    if not how:
        return f"One greedy answer to {to}"
    count = "One answer" if samples == 1 else f"{samples} answers"
    top_p = f", top-p {settings['top_p']}" if settings["top_p"] < 1 else ""
    return f"{count} to {to} {how}{top_p}, seed {settings['seed']}"


def describe_held_out(options: HeldOutOptions) -> str:
    """How the held-out losses are measured."""
    config = "the given config" if options.config else "the config of the checkpoint"
    limit = f", {options.limit:,} of each domain, evenly spaced" if options.limit else ""
    start = options.untrained or "the start of training, if it can be opened"
    sentences = [
        f"held_out: losses and accuracies on the held-out conversations of {config}{limit}",
        "Each conversation is alone in its row. It is read under its own system prompt, the "
        "default prompt, the prompts of the other domains, a paraphrase, an unrelated prompt, and "
        "without any",
        f"The same is measured for {start}",
        f"Intervals are {INTERVAL}",
    ]
    return " ".join(f"{sentence}." for sentence in sentences)


def describe_lm_eval(names: Sequence[str], options: BenchmarkOptions) -> str:
    """How tasks of lm-evaluation-harness are asked; it must be installed."""
    shots = "with the worked examples of the task"
    if options.shots is not None:
        shots = f"with {options.shots} worked examples" if options.shots else _shots({})
    given = {
        "at most {:,} new tokens": options.max_new_tokens,
        "temperature {}": options.temperature,
        "top-p {}": options.top_p if options.top_p < 1 else None,
        "seed {}": options.seed or None,
    }
    changed = ", ".join(words.format(value) for words, value in given.items() if value is not None)
    but = f", but with {changed}" if changed else ""
    sentences = [
        f"lm-evaluation-harness {version('lm_eval')}: {', '.join(names)}",
        f"The first {options.limit:,} items of each" if options.limit else "All items",
        f"Prompts are rendered by the chat template, {shots}",
        f"Answers are made as the task says{but}",
        "Metrics and their standard errors are those of the harness",
    ]
    return " ".join(f"{sentence}." for sentence in sentences)
