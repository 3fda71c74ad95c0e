"""A planned row with the borders of its groups and instructions, and its text for a terminal."""

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import groupby

import numpy as np
from rich.console import Console
from rich.text import Text

from moi_jax.config import Data
from moi_jax.data.loader import Batch, BatchReader
from moi_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Member:
    """An instruction in a row: tokens [start, end); number `index` of its domain's training set."""

    domain: str
    index: int
    start: int
    end: int


@dataclass(frozen=True)
class RowView:
    """A row of a run, for people to look at.

    Attributes:
      number: the global number of the row; it is row `row` of `rows` in its `epoch`.
      domains: in config order, as `batch.domain_ids` counts them.
      batch: the row's arrays, each [S].
      groups: the instructions, as the plan grouped them.
    """

    number: int
    epoch: int
    row: int
    rows: int
    data: Data
    domains: tuple[str, ...]
    batch: Batch
    groups: list[list[Member]]

    @property
    def members(self) -> list[Member]:
        return [member for group in self.groups for member in group]

    @property
    def tokens(self) -> int:
        """The number of tokens without padding."""
        return self.members[-1].end

    @property
    def trained(self) -> np.ndarray:
        """bool[S]: the tokens that carry loss; the weight of a target is at the token before it."""
        return np.append(False, self.batch.loss_weights[:-1] > 0)

    @property
    def group_name(self) -> str:
        if self.data.sampling == "balanced":
            return "chunk"
        return "instruction" if self.data.chunk_size == 1 else "group"

    @property
    def segment_name(self) -> str:
        """The name of what attention stays inside, with its article."""
        name = self.group_name if self.data.mask == "chunk" else self.data.mask
        return f"{'an' if name == 'instruction' else 'a'} {name}"


def view_row(reader: BatchReader, number: int) -> RowView:
    """Reads a row by its global number, which is below `reader.plan.total_rows`."""
    epoch, row = reader.plan.locate(number)
    plan = reader.plan.epoch_plan(epoch)
    corpus = plan.corpus
    groups, start = [], 0
    for group in plan.row(row):
        members = []
        for instruction, domain in zip(group, corpus.domain_of(group), strict=True):
            end = start + int(corpus.lengths[instruction])
            index = int(instruction - corpus.offsets[domain])
            members.append(Member(corpus.names[domain], index, start, end))
            start = end
        groups.append(members)
    batch = Batch(*(array[0] for array in reader.read([number])))
    return RowView(number, epoch, row, plan.rows, reader.plan.data, corpus.names, batch, groups)


# Without colour, text that carries loss is between these.
OPEN, CLOSE = "⟦", "⟧"
TRAINED, UNTRAINED = "bold green", "dim"
TRAINED_SPECIAL, UNTRAINED_SPECIAL = "bold magenta", "dim magenta"
# Unprintable characters, and those that move the cursor or change the direction of text.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def print_legend(console: Console) -> None:
    """Prints how text that carries loss looks."""
    if _coloured(console):
        trained = Text("text that carries loss", TRAINED)
        console.print(Text.assemble(trained, ", ", ("text that does not", UNTRAINED)))
    else:
        console.print(f"{OPEN}text that carries loss{CLOSE}, text that does not", markup=False)


def print_row(view: RowView, tokenizer: Tokenizer, console: Console) -> None:
    """Prints the text of a row, with the borders of groups and instructions, and its padding."""
    length = len(view.batch.tokens)
    groups = f"{len(view.groups)} {view.group_name}{'s' * (len(view.groups) > 1)}"
    title = (
        f"row {view.number} (epoch {view.epoch}, row {view.row} of {view.rows:,}): "
        f"{view.tokens:,} of {length:,} tokens, {view.trained.sum():,} with loss, {groups}; "
        f"attention stays inside {view.segment_name}"
    )
    console.print(title, markup=False, highlight=False, soft_wrap=True)
    for number, group in enumerate(view.groups, 1):
        places = f"tokens {group[0].start} to {group[-1].end - 1}"
        title = f"{view.group_name} {number} of {len(view.groups)}, {places}"
        if view.group_name != "instruction":
            _print_border("━", Text(title, "bold"), console)
        for member in group:
            _print_border("─", _title(view, member), console)
            text = render_tokens(view, member, tokenizer, _coloured(console))
            console.print(text, soft_wrap=True, end="")
    padding = f"padding, {length - view.tokens:,} tokens"
    _print_border("━", Text(padding, "bold"), console)


def _print_border(line: str, title: Text, console: Console) -> None:
    rest = max(0, console.width - title.cell_len - 4)
    console.print(Text.assemble(line * 2, " ", title, " ", line * rest), soft_wrap=True)


def _title(view: RowView, member: Member) -> Text:
    inside = slice(member.start, member.end)
    weights = view.batch.loss_weights[inside]
    # All labels of an instruction have the same weight.
    loss = f"{view.trained[inside].sum():,} with loss of weight {weights.max():.4g}"
    segment = view.batch.segment_ids[member.start]
    places = f"tokens {member.start} to {member.end - 1}"
    return Text.assemble(
        (member.domain, "bold"), f" {member.index}, {places}, {loss}, segment {segment}"
    )


def _coloured(console: Console) -> bool:
    return console.color_system is not None and not console.no_color


def render_tokens(view: RowView, member: Member, tokenizer: Tokenizer, coloured: bool) -> Text:
    """The text of an instruction; text that carries loss has another style, or brackets."""
    text = Text()
    for trained, runs in groupby(_runs(view, member, tokenizer), key=lambda run: run[0]):
        if trained and not coloured:
            piece = "".join(content for _, _, content in runs)
            # The bracket closes before the line's end, or it would be on the next line.
            lines = piece.rstrip("\n")
            rest = piece[len(lines) :]
            text.append(f"{OPEN}{lines}{'↵' * len(rest)}{CLOSE}{rest}")
            continue
        for _, special, content in runs:
            styles = (UNTRAINED_SPECIAL, TRAINED_SPECIAL) if special else (UNTRAINED, TRAINED)
            text.append(content, styles[trained] if coloured else "")
    if not text.plain.endswith("\n"):
        text.append("\n")
    return text


def _runs(view: RowView, member: Member, tokenizer: Tokenizer) -> Iterator[tuple[bool, bool, str]]:
    """(carries loss, is special, text) of each run of tokens that agree in the first two.

    Single tokens are not decoded, because the bytes of a character may be split among several.
    """
    inside = slice(member.start, member.end)
    tokens = view.batch.tokens[inside]
    special = np.isin(tokens, tokenizer.template.controls)
    marked = zip(view.trained[inside].tolist(), special.tolist(), tokens.tolist(), strict=True)
    for (trained, is_special), run in groupby(marked, key=lambda token: token[:2]):
        content = tokenizer.decode([token for _, _, token in run])
        yield trained, is_special, CONTROL.sub(lambda c: f"\\u{ord(c.group()):04x}", content)
