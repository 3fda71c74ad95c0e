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
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.preview.parts import Kind, Part, find_parts
from moi_jax.text.instructions import Instruction
from moi_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Member:
    """An instruction in a row: tokens [start, end); number `index` of its domain's training set.

    It is sample number `sample`, from 1 on, of the `samples` of its conversation.
    """

    domain: str
    index: int
    start: int
    end: int
    sample: int
    samples: int
    parts: list[Part]  # in tokens of the row


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


def view_row(reader: BatchReader, number: int, tokenizer: Tokenizer) -> RowView:
    """Reads a row by its global number, which is below `reader.plan.total_rows`."""
    epoch, row = reader.plan.locate(number)
    plan = reader.plan.epoch_plan(epoch)
    corpus, planned = plan.corpus, plan.row(row)
    instructions = reader.instructions(np.unique(np.concatenate(planned)))
    groups, start = [], 0
    for group in planned:
        members = []
        for of_corpus in group.tolist():
            instruction, domain = instructions[of_corpus]
            member = _member(corpus, of_corpus, domain, start, instruction, tokenizer)
            members.append(member)
            start = member.end
        groups.append(members)
    batch = Batch(*(array[0] for array in reader.read([number])))
    return RowView(number, epoch, row, plan.rows, reader.plan.data, corpus.names, batch, groups)


def _member(
    corpus: Corpus,
    number: int,
    domain: int,
    start: int,
    instruction: Instruction,
    tokenizer: Tokenizer,
) -> Member:
    starts = corpus.conversation_starts
    conversation = int(np.searchsorted(starts, number, side="right")) - 1
    first, after = starts[conversation : conversation + 2].tolist()
    parts = find_parts(instruction.tokens.tolist(), instruction.conversation, tokenizer)
    return Member(
        corpus.names[domain],
        number - int(corpus.offsets[domain]),
        start,
        start + len(instruction.tokens),
        number - first + 1,
        after - first,
        [Part(start + part.start, start + part.end, part.kind) for part in parts],
    )


# Without colour, text that carries loss is between these.
OPEN, CLOSE = "⟦", "⟧"
TRAINED, UNTRAINED = "bold green", "dim"
SPECIAL = "magenta"
# The colours of the parts; what carries loss is bold, the rest dim.
PART_COLOURS: dict[Kind, str] = {"thinking": "cyan", "call": "yellow", "result": "blue"}
# Unprintable characters, and those that move the cursor or change the direction of text.
CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def print_legend(console: Console) -> None:
    """Prints how text that carries loss looks."""
    if _coloured(console):
        trained = Text("text that carries loss", TRAINED)
        parts = [(f" {kind}", colour) for kind, colour in PART_COLOURS.items()]
        untrained = ("text that does not", UNTRAINED)
        console.print(Text.assemble(trained, ", ", untrained, "; bold or dim:", *parts))
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
    # The labels of an instruction have one weight, unless its messages have weights of their own.
    different = sorted({f"{weight:.4g}" for weight in weights[weights > 0].tolist()}, key=float)
    weight = f"weight{'s' * (len(different) > 1)} {', '.join(different) or '0'}"
    loss = f"{view.trained[inside].sum():,} with loss of {weight}"
    segment = view.batch.segment_ids[member.start]
    places = f"tokens {member.start} to {member.end - 1}"
    sample = f", sample {member.sample} of {member.samples}" if member.samples > 1 else ""
    return Text.assemble(
        (member.domain, "bold"), f" {member.index}{sample}, {places}, {loss}, segment {segment}"
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
        for _, colour, content in runs:
            style = f"{'bold' if trained else 'dim'} {colour}"
            if not colour:
                style = TRAINED if trained else UNTRAINED
            text.append(content, style if coloured else "")
    if not text.plain.endswith("\n"):
        text.append("\n")
    return text


def _runs(view: RowView, member: Member, tokenizer: Tokenizer) -> Iterator[tuple[bool, str, str]]:
    """(carries loss, colour, text) of each run of tokens that agree in the first two.

    Single tokens are not decoded, because the bytes of a character may be split among several.
    """
    inside = slice(member.start, member.end)
    tokens = view.batch.tokens[inside]
    colours = np.where(np.isin(tokens, tokenizer.template.controls), SPECIAL, "").astype(object)
    for start, end, kind in member.parts:
        colours[start - member.start : end - member.start] = PART_COLOURS[kind]
    marked = zip(view.trained[inside].tolist(), colours.tolist(), tokens.tolist(), strict=True)
    for (trained, colour), run in groupby(marked, key=lambda token: token[:2]):
        content = tokenizer.decode([token for _, _, token in run])
        yield trained, colour, CONTROL.sub(lambda c: f"\\u{ord(c.group()):04x}", content)
