"""Chat templates of ours: the fixed tokens around the turns of a conversation."""

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from moi_jax.common.errors import UserError

if TYPE_CHECKING:
    from moi_jax.text.tokenizer import Tokenizer

ROLES = ("system", "user", "assistant")
ROLE = "ROLE"  # stands for the turn's role among the pieces of a header


class Template(ABC):
    """What is around the contents of a conversation, for one tokenizer.

    Attributes:
      name: of the template, as tokenizer.chat_template has it.
      end: id of the special token that ends a turn.
      pad: id of the padding. Padding is recognised by its segment id, never by its token id.
      stops: ids that end an answer.
      controls: ids of all special tokens of the template that the tokenizer has.
      renders_tools: whether it has a form for tools, calls and results.
      chooses_thinking: whether a prompt can be written with thinking or without.
      typed: whether it wants the thinking of an answer apart from its content.
      takes_system: whether it has a place for a system text.
      omits_system: whether a chat can be written without any system text.
    """

    name: ClassVar[str]
    end: int
    pad: int
    stops: tuple[int, ...]
    controls: tuple[int, ...]
    renders_tools: bool = False
    chooses_thinking: bool = False
    typed: ClassVar[bool] = False
    takes_system: bool = True
    omits_system: bool = True

    @abstractmethod
    def fingerprint(self) -> str:
        """sha256 hex that changes when the rendered tokens change."""

    def recipe(self) -> dict[str, str | int]:
        """What decides the rendered tokens, as part of the key of a cache."""
        return {"template": self.name, "renderer": self.fingerprint()}

    def text(self, content: str) -> str:
        """The part of a message's content that is rendered."""
        return content


class FixedTemplate(Template):
    """A template of ours: fixed text as pieces (class), and as ids of one tokenizer (instance).

    A conversation is `opening`, then `header` CONTENT `footer` for every turn. Each piece is
    encoded separately: <|special|> pieces as special tokens, all others as plain text.

    Attributes:
      opening, headers (by role), footer: the ids.
      turn: id of the special token that begins every turn.
    """

    # Raise it when the rendered tokens change, or which of them are labels.
    version: ClassVar[int]
    OPENING: ClassVar[tuple[str, ...]] = ()
    HEADER: ClassVar[tuple[str, ...]]
    FOOTER: ClassVar[tuple[str, ...]]
    # The first of these that the tokenizer has is the padding, or else the token that ends a turn.
    PADS: ClassVar[tuple[str, ...]]
    STOPS: ClassVar[tuple[str, ...]]
    STRIPS: ClassVar[bool] = False  # whether white space around content is removed

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

    def recipe(self) -> dict[str, str | int]:
        return {"template": self.name, "renderer": self.version}

    def fingerprint(self) -> str:
        return fixed_fingerprint(type(self))

    def text(self, content: str) -> str:
        return content.strip() if self.STRIPS else content

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


def fixed_fingerprint(kind: type[FixedTemplate]) -> str:
    """The fingerprint of a template of ours, which is the same for all tokenizers."""
    return hashlib.sha256(f"{kind.name}:{kind.version}".encode()).hexdigest()


def is_special(piece: str) -> bool:
    """Whether a piece of a template is a special token, not plain text."""
    return piece.startswith("<|")


def _known(pieces: Sequence[str], tokenizer: "Tokenizer") -> list[int]:
    """The ids of the special tokens among `pieces` that the tokenizer has."""
    numbers = [tokenizer.special(piece) for piece in pieces if is_special(piece)]
    return [number for number in numbers if number is not None]


class ChatML(FixedTemplate):
    """ChatML, as Qwen's official fine-tuning code, Qwen2, SmolLM2 and many others use it."""

    name, version = "chatml", 2
    HEADER = ("<|im_start|>", ROLE, "\n")
    FOOTER = ("<|im_end|>", "\n")
    PADS = ("<|endoftext|>",)
    STOPS = ("<|im_end|>", "<|im_start|>", "<|endoftext|>")


class Llama3(FixedTemplate):
    """The template of Llama 3: a role stands between two special tokens, contents are stripped."""

    name, version = "llama3", 1
    OPENING = ("<|begin_of_text|>",)
    HEADER = ("<|start_header_id|>", ROLE, "<|end_header_id|>", "\n\n")
    FOOTER = ("<|eot_id|>",)
    PADS = ("<|finetune_right_pad_id|>", "<|end_of_text|>")
    STOPS = ("<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_of_text|>")
    STRIPS = True


TEMPLATES: dict[str, type[FixedTemplate]] = {kind.name: kind for kind in (ChatML, Llama3)}
FROM_CHECKPOINT = "from_checkpoint"  # the name of the tokenizer's own template
CHOICES = (FROM_CHECKPOINT, *TEMPLATES)
