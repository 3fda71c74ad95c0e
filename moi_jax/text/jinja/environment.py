"""Compiles chat templates as transformers does: sandboxed, with `{% generation %}` marked."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import date
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from moi_jax.common.errors import UserError
from moi_jax.text.vocabulary_files import read_object

# They stand around the text of {% generation %} until `split_marks` takes them out.
BEGIN, END = "\uf8e0", "\uf8e1"
# A template that writes the date writes this one, so that its text does not change from day to day.
# It is the day that Llama 3's templates write by themselves.
TODAY = date(2024, 7, 26)
OF_DICTS = frozenset(dir(dict))
MOST_ITERATIONS = 1_000_000  # of all loops of a rendering; one of a long chat has thousands


class TooManyIterations(Exception):
    """A template does not end in reasonable time."""


@dataclass(frozen=True)
class Program:
    """A compiled chat template.

    Attributes:
      render: variables by name -> text, with `BEGIN` and `END` around what {% generation %} holds.
      constants: the texts that the template may compare messages with.
      marks: whether it has {% generation %}.
      names: the names and attributes that it reads.
    """

    render: Callable[..., str]
    constants: tuple[str, ...]
    marks: bool
    names: frozenset[str]


class _Generation(Extension):
    """{% generation %} ... {% endgeneration %}: what the assistant writes."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        # A call block has a scope of its own, as it has in transformers.
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Callable[[], str]) -> str:
        return f"{BEGIN}{caller()}{END}"


def compile_program(source: str) -> Program:
    """Compiles a template.

    Raises:
      jinja2.TemplateError: it is not valid.
    """
    environment = _environment()
    tree = environment.parse(source)
    found = {node.value for node in tree.find_all(nodes.Const) if isinstance(node.value, str)}
    names = {node.name for node in tree.find_all(nodes.Name)}
    names |= {node.attr for node in tree.find_all(nodes.Getattr)}
    steps = [0]

    def step() -> str:
        steps[0] += 1
        if steps[0] > MOST_ITERATIONS:
            raise TooManyIterations(f"its loops run more than {MOST_ITERATIONS:,} times")
        return ""

    for loop in list(tree.find_all(nodes.For)):
        call = nodes.Call(nodes.Name("_moi_step", "load"), [], [], None, None)
        loop.body.insert(0, nodes.ExprStmt(call).set_lineno(loop.lineno))
    template = environment.from_string(tree, globals={"_moi_step": step})

    def render(**variables: Any) -> str:
        steps[0] = 0
        return template.render(**variables)

    constants = tuple(sorted(text for text in found if text.strip()))
    return Program(render, constants, "endgeneration" in source, frozenset(names | found))


class _Environment(ImmutableSandboxedEnvironment):
    """The sandbox, quicker where templates spend most of their time."""

    def getattr(self, obj: Any, attribute: str) -> Any:
        # An attribute that no dict has is a key, for which the sandbox has no rules.
        if type(obj) is dict and attribute not in OF_DICTS:
            if attribute in obj:
                return obj[attribute]
            return self.undefined(obj=obj, name=attribute)
        return super().getattr(obj, attribute)


def _environment() -> ImmutableSandboxedEnvironment:
    """The Jinja environment in which transformers renders chat templates."""

    def refuse(message: str) -> None:
        raise jinja2.TemplateError(message)

    def tojson(
        value: Any,
        ensure_ascii: bool = False,
        indent: int | None = None,
        separators: tuple[str, str] | None = None,
        sort_keys: bool = False,
    ) -> str:
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    environment = _Environment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
    )
    environment.filters["tojson"] = tojson
    environment.globals |= {"raise_exception": refuse, "strftime_now": TODAY.strftime}
    return environment


def split_marks(text: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and the half-open character range of each marked part."""
    pieces, ranges, length, begun = [], [], 0, 0
    for number, part in enumerate(text.split(BEGIN)):
        if number:
            begun = length
        before, mark, after = part.partition(END)
        pieces += [before, after]
        length += len(before)
        if mark:
            ranges.append((begun, length))
        length += len(after)
    return "".join(pieces), ranges


def own_sources(files: Mapping[str, str]) -> dict[str, str]:
    """The chat templates among a tokenizer's files: name -> source; empty if there is none.

    A tokenizer has one template, or several with the names `default`, `tool_use`, `rag`, ....

    Raises:
      UserError: tokenizer_config.json does not hold a template where it should.
    """
    if "chat_template.jinja" in files:
        return {"default": files["chat_template.jinja"]}
    found = read_object(files, "tokenizer_config.json").get("chat_template")
    if found is None:
        return {}
    if isinstance(found, str):
        return {"default": found}
    try:
        named = {each["name"]: each["template"] for each in found}
    except (KeyError, TypeError):
        named = {}
    if not (named and all(isinstance(text, str) for pair in named.items() for text in pair)):
        raise UserError(
            "the chat_template in tokenizer_config.json is neither a text nor a list of named "
            "templates; copy the file again, or name another template with tokenizer.chat_template"
        )
    if "default" not in named:
        raise UserError(
            f"tokenizer_config.json has the chat templates {', '.join(sorted(named))}, but none "
            f"that is named default; name one with tokenizer.chat_template"
        )
    return named
