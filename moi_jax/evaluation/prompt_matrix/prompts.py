"""The system prompts that the conversations of each domain are put under."""

from collections.abc import Mapping
from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.config import CONTROL_TOKEN
from moi_jax.text.tokenizer import Tokenizer

OWN, DEFAULT, PARAPHRASE, UNRELATED, NONE = "own", "default", "paraphrase", "unrelated", "none"

# domain -> column -> prompt, None for no system block.
PromptTable = dict[str, dict[str, str | None]]

# Of the prompts in the shipped configs.
PARAPHRASES = {
    "You are a helpful assistant.": "You are an assistant who helps.",
    "You are a programmer.": "You are a software developer.",
    "You are a mathematician.": "You are an expert in mathematics.",
    "You are an assistant that solves tasks with tools.": (
        "You are an agent that gets things done by calling tools."
    ),
}

# Of several lengths: the one whose tokens are nearest in number to a prompt's stands beside it.
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
    """The columns that some domain has, in order."""
    ordered = [OWN, DEFAULT, *map(other_column, table), PARAPHRASE, UNRELATED, NONE]
    there = {column for prompts in table.values() for column in prompts}
    return [column for column in ordered if column in there]


def other_column(domain: str) -> str:
    """The column of a domain's prompt under the other domains."""
    return f"as {domain}"


def make_prompt_table(
    domains: Mapping[str, str | None],
    default: str | None,
    tokenizer: Tokenizer,
    paraphrases: Mapping[str, str],
) -> PromptTable:
    """The prompt of each column for each domain; a column that has none there is left out.

    A domain whose prompt is the default one is no column of the others: they have DEFAULT.

    Args:
      domains: the domains' own prompts, None for no system block.
      paraphrases: by domain, before those known here.

    Raises:
      UserError: a paraphrase is of no domain, equal to the prompt, or holds a control token.
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
    """The prompts that one benchmark runs under, each once: the default one comes first.

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
    """The tokens of a prompt's text alone, without the block around it."""
    return 0 if prompt is None else len(tokenizer.encode(tokenizer.template.text(prompt)))


def _unrelated(own: str, tokenizer: Tokenizer) -> str:
    """The stranger whose number of tokens is nearest; the first of equals."""
    length = token_count(own, tokenizer)
    candidates = [text for text in UNRELATED_PROMPTS if text != own]
    return min(candidates, key=lambda text: abs(token_count(text, tokenizer) - length))


def _check_paraphrase(name: str, text: str, domains: Mapping[str, str | None]) -> None:
    if name not in domains:
        raise UserError(
            f"--paraphrase names the domain {name!r}, which is not among {', '.join(domains)}"
        )
    if text == domains[name]:
        raise UserError(f"--paraphrase of {name} is its prompt itself; word it otherwise")
    if control := CONTROL_TOKEN.search(text):
        raise UserError(f"--paraphrase of {name} holds the control token {control.group()}")
