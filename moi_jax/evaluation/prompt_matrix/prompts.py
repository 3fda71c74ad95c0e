"""The system prompts of the matrix: which prompts the conversations of each domain get."""

from collections.abc import Mapping
from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.config import CONTROL_TOKEN
from moi_jax.text.tokenizer import Tokenizer

OWN, DEFAULT, PARAPHRASE, UNRELATED, NONE = "own", "default", "paraphrase", "unrelated", "none"

# domain -> column -> prompt; None means no system block.
PromptTable = dict[str, dict[str, str | None]]

# Paraphrases of the prompts in the shipped configs.
PARAPHRASES = {
    "You are a helpful assistant.": "You are an assistant who helps.",
    "You are a programmer.": "You are a software developer.",
    "You are a mathematician.": "You are an expert in mathematics.",
    "You are an assistant that solves tasks with tools.": (
        "You are an agent that gets things done by calling tools."
    ),
}

# Prompts of several lengths. The one that is nearest to a prompt in number of tokens is used.
UNRELATED_PROMPTS = (
    "You are a gardener.",
    "You are a baker of fine bread.",
    "You are a gardener who looks after old roses.",
    "You are a sailor who mends the nets on a small boat.",
    "You are a gardener who looks after old roses in a park by the sea.",
    "You are a baker who gets up long before the sun, kneads the dough by hand and sells bread.",
    "You are a gardener who looks after old roses in a park by the sea. In spring you cut them, "
    "in summer you water them, and in winter you cover them with straw against the frost.",
)


def columns(table: PromptTable) -> list[str]:
    """The columns that at least one domain has, in order."""
    ordered = [OWN, DEFAULT, *map(other_column, table), PARAPHRASE, UNRELATED, NONE]
    there = {column for prompts in table.values() for column in prompts}
    return [column for column in ordered if column in there]


def other_column(domain: str) -> str:
    """The name of the column in which the other domains get this domain's prompt."""
    return f"as {domain}"


def make_prompt_table(
    domains: Mapping[str, str | None],
    default: str | None,
    tokenizer: Tokenizer,
    paraphrases: Mapping[str, str],
) -> PromptTable:
    """The prompts of each domain by column. A domain can lack columns.

    A domain whose own prompt is the default one adds no column to the other domains, because
    they have the column DEFAULT.

    Args:
      domains: domain -> its own prompt, None for no system block.
      paraphrases: domain -> paraphrase; it replaces one from PARAPHRASES.

    Raises:
      UserError: a paraphrase names no domain, equals the prompt, or has a control token.
    """
    for name, text in paraphrases.items():
        _check_paraphrase(name, text, domains)
    table: PromptTable = {}
    for name, own in domains.items():
        others = {
            other_column(other): prompt
            for other, prompt in domains.items()
            if other != name and prompt != default
        }
        prompts = {OWN: own, DEFAULT: default, **others}
        if own is not None:
            paraphrase = paraphrases.get(name, PARAPHRASES.get(own))
            if paraphrase is not None:
                prompts[PARAPHRASE] = paraphrase
            prompts[UNRELATED] = _unrelated(own, tokenizer)
        table[name] = {**prompts, NONE: None}
    return table


def distinct_prompts(item: Mapping[str, Any], tokenizer: Tokenizer) -> dict[str, str | None]:
    """The prompts that a benchmark runs under, each once, the default prompt first.

    Args:
      item: the prompts item of the checkpoint, see text/prompts.py.
    """
    default = item["default_system_prompt"]
    prompts = {DEFAULT: default}
    prompts |= {other_column(name): prompt for name, prompt in item["domains"].items()}
    if default is not None:
        prompts[UNRELATED] = _unrelated(default, tokenizer)
    prompts[NONE] = None
    first = {prompt: name for name, prompt in reversed(prompts.items())}
    return {name: prompt for name, prompt in prompts.items() if first[prompt] == name}


def token_count(prompt: str | None, tokenizer: Tokenizer) -> int:
    """The number of tokens of a prompt's text, without the system block around it."""
    return 0 if prompt is None else len(tokenizer.encode(tokenizer.template.text(prompt)))


def _unrelated(own: str, tokenizer: Tokenizer) -> str:
    """The unrelated prompt nearest in number of tokens; the first where several are equal."""
    length = token_count(own, tokenizer)
    candidates = [text for text in UNRELATED_PROMPTS if text != own]
    return min(candidates, key=lambda text: abs(token_count(text, tokenizer) - length))


def _check_paraphrase(name: str, text: str, domains: Mapping[str, str | None]) -> None:
    if name not in domains:
        raise UserError(
            f"--paraphrase names the domain {name!r}, which is not among {', '.join(domains)}"
        )
    if text == domains[name]:
        raise UserError(f"--paraphrase of {name} equals its prompt; use other words")
    if control := CONTROL_TOKEN.search(text):
        raise UserError(
            f"--paraphrase of {name} has the control token {control.group()}; remove it"
        )
