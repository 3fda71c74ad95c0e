"""Which chat template a tokenizer renders conversations in."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.text.jinja.comparison import difference, is_equal
from moi_jax.text.jinja.environment import own_sources
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.templates import (
    CHOICES,
    FROM_CHECKPOINT,
    TEMPLATES,
    FixedTemplate,
    Template,
)
from moi_jax.text.vocabulary_files import read_object

if TYPE_CHECKING:
    from moi_jax.text.tokenizer import Tokenizer

SUFFIX = ".jinja"


def with_chat_template(files: Mapping[str, str], asked: str) -> tuple[Mapping[str, str], str]:
    """A tokenizer's files and the name of its template, as `tokenizer.chat_template` asks for it.

    Args:
      files: name -> text, as in `Tokenizer.files`.
      asked: one of `CHOICES`, or the path of a .jinja file. Its text takes the place of the
        tokenizer's own template.

    Raises:
      UserError: it is neither of them, or the file cannot be read.
    """
    if asked in CHOICES:
        return files, asked
    path = expand_home(Path(asked))
    if path.suffix != SUFFIX:
        raise UserError(
            f"there is no chat template {asked!r}; choose {', '.join(CHOICES)}, or name a "
            f"{SUFFIX} file"
        )
    try:
        own = {"chat_template.jinja": path.read_text(encoding="utf-8")}
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"cannot read the chat template {asked}: {error}; choose {', '.join(CHOICES)}, or "
            f"name another {SUFFIX} file"
        ) from None
    settings = read_object(files, "tokenizer_config.json")
    if "chat_template" in settings:  # some programs would read the old one
        kept = {key: value for key, value in settings.items() if key != "chat_template"}
        own["tokenizer_config.json"] = json.dumps(kept, ensure_ascii=False, indent=2) + "\n"
    return {**files, **own}, FROM_CHECKPOINT


def choose_template(tokenizer: Tokenizer, name: str | None) -> Template:
    """The chat template of that name, for the tokenizer.

    Args:
      name: one of `CHOICES`. None is the tokenizer's own; ours, if it is known to write the same
        tokens, and also if the tokenizer has none but has the special tokens of ours.

    Raises:
      UserError: the tokenizer lacks a special token that the template needs, or its own template
        is missing or cannot be used.
    """
    if name in TEMPLATES:
        return TEMPLATES[name](tokenizer)
    ours = _known(tokenizer)
    if name is None and not has_own_template(tokenizer):
        if ours:
            return ours[0]
        raise UserError(
            f"the tokenizer has no chat template, and the special tokens of none of ours "
            f"({', '.join(TEMPLATES)}), so it cannot render conversations; choose another one"
        )
    own = JinjaTemplate(tokenizer)
    if name is None:
        for template in ours:
            if is_equal(own, template, tokenizer):
                return template
    if not own.marks:  # it decides itself what is trained
        same = (template for template in ours if difference(own, template, tokenizer) is None)
        own.equal = next(same, None)
    return own


def _known(tokenizer: Tokenizer) -> list[FixedTemplate]:
    """The templates of ours whose special tokens the tokenizer has."""
    known: list[FixedTemplate] = []
    for kind in TEMPLATES.values():
        try:
            known.append(kind(tokenizer))
        except UserError:
            continue
    return known


def has_own_template(tokenizer: Tokenizer) -> bool:
    """Whether a chat template is among the tokenizer's files."""
    return bool(own_sources(tokenizer.files))


def default_system_prompt(tokenizer: Tokenizer) -> str | None:
    """The system text that the tokenizer's own template adds to a chat that has none.

    Raises:
      UserError: its own template cannot be used.
    """
    return JinjaTemplate(tokenizer).default_prompt
