"""Finds out how a template writes calls of tools, by rendering a few."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import takewhile

from moi_jax.text.conversations import BadRow, Message, ToolCall
from moi_jax.text.jinja.call_syntax import (
    Body,
    CallForm,
    CallId,
    ListedBody,
    NamedBody,
    ObjectBody,
    Types,
    json_object,
    one_line,
)
from moi_jax.text.jinja.template import ANSWER, ANSWERED, CALLED, QUESTION, TOOL, JinjaTemplate

# No template writes such words.
KEY, SECOND, VALUE, OTHER = "qkeyz", "qsecondz", "Qvaluez", "Qotherz"
NUMBER = 73_737
IDS = ("abcdefghi", "bcdefghij")  # of nine characters, as Mistral's template wants them
# Calls that a form must give back as they were.
CHECKED: tuple[tuple[dict[str, object], ...], ...] = (
    ({"city": 'Oslo, or "Zürich"', "days": 3, "near": [1.5, True]},),
    ({"code": "if x < 1:\n    y = {'a': [2]}\n"},),
    ({},),
    ({"city": "世界"}, {"city": "Bern", "days": -1}),
)
KINDS: Types = {(CALLED, "days"): "integer", (CALLED, "near"): "array"}


@lru_cache(maxsize=8)
def call_form(template: JinjaTemplate) -> CallForm | None:
    """The form of a template's calls; None if it has none, or none that can be read back."""
    if not template.renders_tools:
        return None
    one, pair = (_written(template, calls) for calls in (_calls(VALUE), _calls(VALUE, OTHER)))
    if one is None:
        return None
    for form in (
        _object_form(template, one, pair),
        _named_form(template, one, pair),
        _listed_form(template, one, pair),
    ):
        if form and _is_inverse(form, template):
            return form
    return None


def _calls(*values: str) -> list[ToolCall]:
    return [
        ToolCall(CALLED, one_line({KEY: value}), call_id)
        for value, call_id in zip(values, IDS, strict=False)
    ]


def _written(template: JinjaTemplate, calls: Sequence[ToolCall]) -> str | None:
    """What the model writes to make the calls; None if the template does not take them."""
    try:
        answered = template.chat_text((QUESTION, ANSWER), (TOOL,))
        text = template.chat_text((QUESTION, Message("assistant", "", calls=tuple(calls))), (TOOL,))
    except BadRow:
        return None
    before = answered[: answered.rindex(ANSWERED)]
    return text[len(_common_start(text, before)) :]


def _common_start(one: str, other: str) -> str:
    pairs = takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return "".join(pair[0] for pair in pairs)


def _is_inverse(form: CallForm, template: JinjaTemplate) -> bool:
    """Whether the form reads what the template writes, as far as it writes it."""
    for arguments in CHECKED:
        calls = [
            ToolCall(CALLED, one_line(each), number)
            for each, number in zip(arguments, IDS, strict=False)
        ]
        text = _written(template, calls)
        if text is None or (len(calls) > 1 and form.between is None):
            continue
        _, found = form.read(text, KINDS, (CALLED,))
        read = [(call.name, json.loads(call.arguments)) for call in found]
        if read != [(CALLED, each) for each in arguments]:
            return False
    return True


def _object_form(template: JinjaTemplate, one: str, pair: str | None) -> CallForm | None:
    found = list(_objects(one))
    if len(found) != 1:
        return None
    start, end, body = found[0]
    between = None
    pairs = [] if pair is None else list(_objects(pair))
    if pair is not None and len(pairs) == 2:
        between = pair[pairs[0][1] : pairs[1][0]]
    return _form(template, one, (start, end), between, body)


def _objects(text: str) -> Iterator[tuple[int, int, Body]]:
    """The JSON objects with a name and arguments: start, end, and their keys."""
    for start, character in enumerate(text):
        found = json_object(text, start) if character == "{" else None
        if not found:
            continue
        names = [key for key, value in found[0].items() if value == CALLED]
        arguments = [key for key, value in found[0].items() if _is_arguments(value)]
        if names and arguments:
            yield start, found[1], ObjectBody(names[0], arguments[0])


def _is_arguments(value: object) -> bool:
    if isinstance(value, str):
        found = json_object(value, 0)
        value = found[0] if found else None
    return isinstance(value, dict) and KEY in value


def _named_form(template: JinjaTemplate, one: str, pair: str | None) -> CallForm | None:
    found = list(_named(one))
    if len(found) != 1:
        return None
    name, arguments, end = found[0]
    between = None
    pairs = [] if pair is None else list(_named(pair))
    if pair is not None and len(pairs) == 2:
        between = pair[pairs[0][2] : pairs[1][0]]
    body = NamedBody(_without_ids(one[name + len(CALLED) : arguments]))
    return _form(template, one, (name, end), between, body)


def _named(text: str) -> Iterator[tuple[int, int, int]]:
    """The places of a name, of the JSON object with its arguments, and of that object's end."""
    for start, character in enumerate(text):
        found = json_object(text, start) if character == "{" else None
        name = text.rfind(CALLED, 0, start)
        if found and KEY in found[0] and name >= 0:
            yield name, start, found[1]


def _listed_form(template: JinjaTemplate, one: str, pair: str | None) -> CallForm | None:
    places = [one.find(word) for word in (CALLED, KEY, VALUE)]
    empty, number, two = (
        _written(template, [ToolCall(CALLED, one_line(arguments), IDS[0])])
        for arguments in ({}, {KEY: NUMBER}, {KEY: VALUE, SECOND: OTHER})
    )
    if not (empty and number and two) or -1 in places or places != sorted(places):
        return None
    name, key, value = places
    opening, equals = one[name + len(CALLED) : key], one[key + len(KEY) : value]
    separator = two[two.find(VALUE) + len(VALUE) : two.find(SECOND)]
    # A special token ends the answer, so no text of a call goes beyond one.
    rest, between = template.specials.split(one[value + len(VALUE) :], maxsplit=1)[0], None
    closing = rest
    if pair is not None and pair.count(CALLED) == 2:
        following = pair[pair.find(VALUE) + len(VALUE) : pair.rfind(CALLED)]
        closing = _common_start(rest, following)
        between = following[len(closing) :]
    without = template.specials.split(empty[empty.find(CALLED) + len(CALLED) :], maxsplit=1)[0]
    without = without.removesuffix(rest[len(closing) :])
    end = value + len(VALUE) + len(closing)
    bare = number[number.find(KEY) + len(KEY) : number.find(str(NUMBER))]
    quote = equals.removeprefix(bare)
    separator, closing = separator.removeprefix(quote), closing.removeprefix(quote)
    body = ListedBody(opening, bare, separator, closing, without, quote)
    return _form(template, one, (name, end), between, body)


def _form(
    template: JinjaTemplate, one: str, place: tuple[int, int], between: str | None, body: Body
) -> CallForm:
    """The form of the call in `one`, whose body stands at [place[0], place[1])."""
    start, end = place
    between = None if between is None else _without_ids(between)
    pieces = re.split(f"({template.specials.pattern})", _without_ids(one[end:]))
    ending = tuple(piece for piece in pieces if piece.strip())
    return CallForm(_without_ids(one[:start]), between, ending, body, one)


def _without_ids(fixed: str) -> str:
    """A fixed text in which `CallId` stands for the ids of the calls that were rendered."""
    for call_id in IDS:
        fixed = fixed.replace(call_id, CallId)
    return fixed
