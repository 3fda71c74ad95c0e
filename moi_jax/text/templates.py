"""Chat templates: the fixed tokens around the turns of a conversation, one class a template."""

import hashlib
from abc import ABC
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from moi_jax.common.errors import UserError

if TYPE_CHECKING:
    from moi_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
ROLE = "ROLE"  # stands for the turn's role among the pieces of a header


class Template(ABC):
    """The fixed text around contents: as pieces (class), and as ids of one tokenizer (instance).

    A conversation is `opening`, then `header` CONTENT `footer` for every turn. Each piece is
    encoded separately: <|special|> pieces as special tokens, all others as plain text.

    Attributes:
      opening, headers (by role), footer: the ids.
      turn, end: ids of the special tokens that begin every turn and end its content.
      pad: id of the padding.
      stops: ids that end an answer.
      controls: ids of all special tokens of the template that the tokenizer has.
    """

    name: ClassVar[str]
    # Raise it when the rendered tokens change, or which of them are labels.
    version: ClassVar[int]
    OPENING: ClassVar[tuple[str, ...]] = ()
    HEADER: ClassVar[tuple[str, ...]]
    FOOTER: ClassVar[tuple[str, ...]]
    # The first of these that the tokenizer has is the padding, or else the token that ends a turn:
    # padding is recognised by its segment id, never by its token id.
    PADS: ClassVar[tuple[str, ...]]
    STOPS: ClassVar[tuple[str, ...]]
    STRIPS: ClassVar[bool] = False  # whether white space around content is removed
    # Whether tools and thinking have a form of their own in the template.
    renders_tools: bool = False
    typed: bool = False

    def __init__(self, tokenizer: "Tokenizer"):
        """Raises UserError: the tokenizer lacks a special token that the turns need."""
        self.opening = self._encode(self.OPENING, tokenizer)
        self.headers = {
            role: self._encode([role if p == ROLE else p for p in self.HEADER], tokenizer)
            for role in ROLES
        }
        self.footer = self._encode(self.FOOTER, tokenizer)
        self.turn, self.end = self.headers["user"][0], self.footer[0]
        self.pad = (_known(self.PADS, tokenizer) or [self.end])[0]
        self.stops = tuple(_known(self.STOPS, tokenizer))
        pieces = [*self.OPENING, *self.HEADER, *self.FOOTER, *self.PADS, *self.STOPS]
        self.controls = tuple(sorted(set(_known(pieces, tokenizer))))

    @classmethod
    def fingerprint(cls) -> str:
        """sha256 hex that changes when the rendered tokens change."""
        return hashlib.sha256(f"{cls.name}:{cls.version}".encode()).hexdigest()

    @classmethod
    def text(cls, content: str) -> str:
        """The part of a message's content that is rendered."""
        return content.strip() if cls.STRIPS else content

    def _encode(self, pieces: Sequence[str], tokenizer: "Tokenizer") -> list[int]:
        ids: list[int] = []
        for piece in pieces:
            if not is_special(piece):
                ids += tokenizer.encode(piece)
                continue
            number = tokenizer.special(piece)
            if number is None:
                raise UserError(
                    f"the tokenizer has no special token {piece}, which the chat template "
                    f"{self.name} needs; choose another tokenizer or tokenizer.chat_template"
                )
            ids.append(number)
        return ids


def is_special(piece: str) -> bool:
    """Whether a piece of a template is a special token, not plain text."""
    return piece.startswith("<|")


def _known(pieces: Sequence[str], tokenizer: "Tokenizer") -> list[int]:
    """The ids of the special tokens among `pieces` that the tokenizer has."""
    numbers = [tokenizer.special(piece) for piece in pieces if is_special(piece)]
    return [number for number in numbers if number is not None]


class ChatML(Template):
    """ChatML, as Qwen's official fine-tuning code, Qwen2, SmolLM2 and many others use it."""

    name, version = "chatml", 2
    HEADER = ("<|im_start|>", ROLE, "\n")
    FOOTER = ("<|im_end|>", "\n")
    PADS = ("<|endoftext|>",)
    STOPS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")


class Llama3(Template):
    """The template of Llama 3: a role stands between two special tokens, contents are stripped."""

    name, version = "llama3", 1
    OPENING = ("<|begin_of_text|>",)
    HEADER = ("<|start_header_id|>", ROLE, "<|end_header_id|>", "\n\n")
    FOOTER = ("<|eot_id|>",)
    PADS = ("<|finetune_right_pad_id|>", "<|end_of_text|>")
    STOPS = ("<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_of_text|>")
    STRIPS = True


TEMPLATES: dict[str, type[Template]] = {kind.name: kind for kind in (ChatML, Llama3)}


def find_template(tokenizer: "Tokenizer") -> Template | None:
    """The first template whose special tokens the tokenizer has; None if there is none."""
    for kind in TEMPLATES.values():
        try:
            return kind(tokenizer)
        except UserError:
            continue
    return None
