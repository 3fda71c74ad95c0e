"""The protocol of an evaluation in words: the methods paragraph of a paper, from results.json."""

from collections.abc import Mapping
from typing import Any

from moi_jax.evaluation.bootstrap import RESAMPLES
from moi_jax.evaluation.protocol import Task

Json = dict[str, Any]

# Settings that the sentences below name in words; all others are listed.
TOLD = {"system_prompt", "samples", "temperature", "top_p", "seed", "max_new_tokens", "context"}
TOLD |= {"limit", "too_long", "shots"}
UNITS = {"s": "s", "mib": "MiB"}
INTERVALS = (
    f"Scores go from 0 to 100. Their 95 % intervals are percentile bootstraps over items "
    f"({RESAMPLES:,} resamples). Where all items are right, or all are wrong, they are those of "
    f"Clopper and Pearson."
)


def describe_model(made_by: Json, run: Json) -> str:
    """The model, its prompt, and what it ran on.

    Args:
      made_by: `checkpoint` of results.json.
      run: the provenance of a task; {} before anything has run.
    """
    system = made_by["system_prompt"]
    prompt = "without a system block" if system is None else f'under the system prompt "{system}"'
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
        f"({made_by['template_hash'][:16]}), {prompt}"
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
    limit = f"at most {settings['max_new_tokens']:,} new tokens"
    context = f"a context of {settings['context']:,}"
    others = ", ".join(
        _setting(name, value) for name, value in settings.items()
        if name not in TOLD and value not in (None, "", [])
    )  # fmt: skip
    too_long = {"fail": "counts as wrong", "skip": "is left out"}[settings["too_long"]]
    sentences = [
        f"{task.name}: {count} (sha256 of the files: {files or 'none'})",
        f"{describe_sampling(task, settings)}, {limit} in {context} tokens, {_shots(settings)}",
        *([task.scoring] if task.scoring else []),
        f"An item that does not fit the context {too_long}",
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
    if not how:
        return "One greedy answer to each"
    count = "One answer" if samples == 1 else f"{samples} answers"
    top_p = f", top-p {settings['top_p']}" if settings["top_p"] < 1 else ""
    return f"{count} to each {how}{top_p}, seed {settings['seed']}"
