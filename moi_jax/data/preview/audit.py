"""The audit: derives rows from the raw files in a second, simple way, and compares the loader's.

It shares with the loader only the reading of files (`sources`), the tokenizer, the plan (which
instruction is where) and the selection (which conversations are trained on). Rendering, labels,
truncation and all arrays are written here a second time, token by token, after docs/method.md. It
is meant to be simple, not fast.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache, lru_cache
from typing import Any

import numpy as np

from moi_jax.common.home import expand_home
from moi_jax.config import Data, Domain
from moi_jax.data.decontamination import Benchmarks
from moi_jax.data.loader import Batch, BatchReader
from moi_jax.data.planning.epoch import EpochPlan
from moi_jax.data.sources.rows import detect_format, expand, source_rows
from moi_jax.text.conversations import BadRow, Conversation, Message
from moi_jax.text.tokenizer import Tokenizer

# Weights are quotients, which may be rounded in a different order.
WEIGHT_TOLERANCE = 1e-6


@dataclass
class PlainInstruction:
    """A conversation as tokens, which of them are labels, and its place in the sources."""

    place: str
    tokens: list[int]
    labels: list[bool]


@dataclass
class PlainDomain:
    """The contents of a domain's sources.

    Attributes:
      labels: the number of labels of every usable conversation, in order; the index of a
        conversation is the number of its record in the cache.
      wanted: record number -> instruction, for those that are wanted.
    """

    labels: list[int] = field(default_factory=list)
    wanted: dict[int, PlainInstruction] = field(default_factory=dict)


def audit(
    reader: BatchReader,
    train: Sequence[np.ndarray],
    records: Sequence[int],
    tokenizer: Tokenizer,
    rows: Sequence[int],
) -> str | None:
    """Compares rows of the loader with rows derived from the raw files.

    Args:
      reader: the loader's rows; its plan has the config.
      train: int64[n_d] of each domain, in config order: the records in the cache of its training
        instructions.
      records: the number of instructions in the cache of each domain.
      rows: numbers below reader.plan.total_rows.

    Returns:
      The first difference as a message; None if all six arrays are equal at every token.
    """
    plan, targets = reader.plan, reader.loss.targets
    of_training = [selected.tolist() for selected in train]
    planned = {}
    for row in rows:
        epoch, row_of_epoch = plan.locate(row)
        planned[row] = epoch, [group.tolist() for group in plan.epoch_plan(epoch).row(row_of_epoch)]
    wanted: list[set[int]] = [set() for _ in of_training]
    for _, groups in planned.values():
        for number in (number for group in groups for number in group):
            domain, index = _find(number, of_training)
            wanted[domain].add(of_training[domain][index])
    domains = []
    for domain, config in enumerate(plan.data.domains):
        found = read_domain(plan.data, config, tokenizer, targets, wanted[domain])
        if len(found.labels) != records[domain]:
            return (
                f"domain {config.name}: {records[domain]} instructions in the cache, "
                f"{len(found.labels)} usable rows in the sources"
            )
        domains.append(found)
    weigh = _Weights(reader, of_training, domains)
    for row, (epoch, groups) in planned.items():
        laid = _lay_out(groups, of_training, domains, weigh.of_epoch(epoch), reader)
        ours = Batch(*(array[0].tolist() for array in reader.read([row])))
        if difference := _compare(row, ours, laid):
            return difference
    return None


def _find(number: int, train: list[list[int]]) -> tuple[int, int]:
    """(domain, index among its training instructions) of a global instruction number."""
    for domain, records in enumerate(train):
        if number < len(records):
            return domain, number
        number -= len(records)
    raise ValueError("the plan names an instruction that no domain has")


def read_domain(
    data: Data, domain: Domain, tokenizer: Tokenizer, targets: str, wanted: set[int]
) -> PlainDomain:
    """Reads the files of a domain row by row; keeps the instructions with a wanted number."""
    found = PlainDomain()
    render = _renderer(tokenizer, targets)
    benchmarks = None
    if data.decontaminate.path and data.decontaminate.on_hit == "drop":
        benchmarks = Benchmarks.read(expand_home(data.decontaminate.path))
    files = expand(data.root, domain.sources, data.cache_dir)
    for source, part in zip(domain.sources, files, strict=True):
        kept = 0
        for file in part:
            form = detect_format(file) if source.format == "auto" else source.format
            for row in source_rows(file, form):
                if kept == source.max_rows:
                    break
                rendered = _usable(row.conversation, data, domain, render, benchmarks)
                if rendered is None:
                    continue
                tokens, labels = rendered
                if len(found.labels) in wanted:
                    place = f"{file.name}:{row.line}"
                    instruction = PlainInstruction(place, tokens, labels)
                    found.wanted[len(found.labels)] = instruction
                found.labels.append(sum(labels))
                kept += 1
    return found


Rendered = tuple[list[int], list[bool]]
Render = Callable[[Sequence[Message], str | None], Rendered]


def _usable(
    conversation: Conversation | BadRow,
    data: Data,
    domain: Domain,
    render: Render,
    benchmarks: Benchmarks | None,
) -> Rendered | None:
    """The row as the config keeps it; None if the row is dropped."""
    if isinstance(conversation, BadRow):
        return None
    own = conversation.system
    if own and data.row_system == "drop_row":
        return None
    system = _system(data, domain, own)
    turns = list(conversation.turns)
    limit = data.max_instruction_tokens or data.sequence_length
    rendered = render(turns, system)
    while len(rendered[0]) > limit:
        if data.too_long != "truncate_turns" or len(turns) <= 2:
            return None
        turns = turns[:-2]
        rendered = render(turns, system)
    if benchmarks and any(benchmarks.hit(turn.content) for turn in turns):
        return None
    return rendered


def _system(data: Data, domain: Domain, own: str | None) -> str | None:
    """The text of the system block; None means no block."""
    prompt = data.default_system_prompt
    if data.system_prompts == "none":
        prompt = None
    elif data.system_prompts == "per_domain" and domain.prompt is not None:
        prompt = domain.prompt
    if not own:
        return prompt
    if not prompt or data.row_system == "keep":
        return own
    if data.row_system == "replace":
        return prompt
    return prompt + "\n\n" + own


# The text before the first turn, before a role, between role and content, and after a content.
_LLAMA3 = ("<|begin_of_text|>",), "<|start_header_id|>", ("<|end_header_id|>", "\n\n")
LAYOUTS: dict[str, tuple[tuple[str, ...], str, tuple[str, ...], tuple[str, ...]]] = {
    "chatml": ((), "<|im_start|>", ("\n",), ("<|im_end|>", "\n")),
    "llama3": (*_LLAMA3, ("<|eot_id|>",)),
}


def _renderer(tokenizer: Tokenizer, targets: str) -> Render:
    """A function that renders turns as ids, and tells which are labels under loss.targets."""
    official = targets == "qwen_official"
    opening, begin, middle, ends = LAYOUTS[tokenizer.template.name]
    strip = str.strip if tokenizer.template.name == "llama3" else str

    @cache  # roles and fixed texts are repeated often
    def fixed(*texts: str) -> list[int]:
        ids: list[int] = []
        for text in texts:
            special = tokenizer.special(text)
            ids += tokenizer.encode(text) if special is None else [special]
        return ids

    def render(turns: Sequence[Message], system: str | None) -> Rendered:
        tokens: list[int] = []
        labels: list[bool] = []

        def add(ids: Sequence[int], label: bool) -> None:
            for token in ids:
                tokens.append(token)
                labels.append(label)

        add(fixed(*opening), False)
        if system is not None:
            add(fixed(begin, "system", *middle), False)
            add(tokenizer.encode(strip(system)), False)
            add(fixed(*ends), official)
        for number, message in enumerate(turns):
            answer = message.role == "assistant" and message.train
            trained = official and (message.role == "user" or message.train)
            add(fixed(begin), trained and (number > 0 or system is not None))
            add(fixed(message.role, *middle), False)
            if answer and not official:
                for token, observed in _answer(message, strip(message.content), tokenizer):
                    add([token], not observed)
            else:
                add(tokenizer.encode(strip(message.content)), answer)
            add(fixed(ends[0]), answer or trained)
            add(fixed(*ends[1:]), trained)
        return tokens, labels

    return render


def _answer(message: Message, content: str, tokenizer: Tokenizer) -> Iterator[tuple[int, bool]]:
    """The ids of an answer, and whether each begins inside an observation written by a tool."""
    ids, offsets = tokenizer.encode_with_offsets(content)
    observations = []
    if message.trajectory:
        text, position = tokenizer.normalize(content), 0
        answer = text.find("\nFinal Answer:")
        last = answer if answer >= 0 else len(text)
        while 0 <= (at := text.find("\nObservation:", position)) < last:
            begin = at + len("\nObservation:")
            ends = [text.find(mark, begin) for mark in ("\nThought:", "\nAction:")]
            position = min([end for end in ends if end >= 0], default=last)
            observations.append(range(begin, min(position, last)))
    for token, (first, _) in zip(ids, offsets, strict=True):
        yield token, any(first in observation for observation in observations)


class _Weights:
    """The weight of an instruction's labels under loss.normalization, epoch by epoch."""

    def __init__(self, reader: BatchReader, train: list[list[int]], domains: list[PlainDomain]):
        self._reader, self._train, self._domains = reader, train, domains
        self.of_epoch = lru_cache(maxsize=None)(self._of_epoch)

    def _of_epoch(self, epoch: int) -> Callable[[int, int], float]:
        """A function of (domain, labels of the instruction)."""
        normalization = self._reader.loss.normalization
        if normalization == "token":
            return lambda domain, labels: 1.0
        if normalization == "instruction":
            return lambda domain, labels: 1.0 / labels
        sums = self._sums(self._reader.plan.epoch_plan(epoch))
        total, present = sum(sums), sum(1 for tokens in sums if tokens)
        return lambda domain, labels: total / (present * sums[domain])

    def _sums(self, plan: EpochPlan) -> list[int]:
        """T_d: the number of labels of each domain in the epoch, counting every occurrence."""
        sums = [0] * len(self._train)
        for number in plan.instructions.tolist():
            domain, index = _find(number, self._train)
            sums[domain] += self._domains[domain].labels[self._train[domain][index]]
        return sums


@dataclass
class _Laid:
    """A row as lists, and the place in the sources of each token that is not padding."""

    arrays: dict[str, list[Any]]
    places: list[str]


def _lay_out(
    groups: list[list[int]],
    train: list[list[int]],
    domains: list[PlainDomain],
    weigh: Callable[[int, int], float],
    reader: BatchReader,
) -> _Laid:
    """The six arrays of a row, token by token, by their definitions."""
    data, pad = reader.plan.data, reader.pad_id
    arrays: dict[str, list[Any]] = {name: [] for name in Batch._fields}
    places: list[str] = []
    segment = position = 0
    for group_number, group in enumerate(groups):
        for place_in_group, number in enumerate(group):
            domain, index = _find(number, train)
            instruction = domains[domain].wanted[train[domain][index]]
            begins = {
                "row": group_number == 0 and place_in_group == 0,
                "chunk": place_in_group == 0,
                "instruction": True,
            }
            if begins[data.mask or ""]:
                segment, position = segment + 1, 0
            weight = weigh(domain, sum(instruction.labels))
            length = len(instruction.tokens)
            for at, token in enumerate(instruction.tokens):
                last = at == length - 1
                arrays["tokens"].append(token)
                arrays["targets"].append(pad if last else instruction.tokens[at + 1])
                arrays["segment_ids"].append(segment)
                arrays["positions"].append(position)
                arrays["domain_ids"].append(domain)
                label = not last and instruction.labels[at + 1]
                arrays["loss_weights"].append(weight if label else 0.0)
                places.append(f"domain {data.domains[domain].name}, {instruction.place}")
                position += 1
    padding = dict(zip(Batch._fields, (pad, pad, 0, 0, -1, 0.0), strict=True))
    for name, values in arrays.items():
        values += [padding[name]] * (data.sequence_length - len(values))
    return _Laid(arrays, places)


def _compare(row: int, ours: Batch, laid: _Laid) -> str | None:
    for name, theirs in laid.arrays.items():
        mine = getattr(ours, name)
        if len(mine) != len(theirs):
            return f"row {row}: {name} has {len(mine)} tokens, from the sources {len(theirs)}"
    for token in range(len(ours.tokens)):
        for name, theirs in laid.arrays.items():
            mine, derived = getattr(ours, name)[token], theirs[token]
            # Zeros must be equal exactly; only quotients may differ by rounding.
            exact = name != "loss_weights" or not (mine and derived)
            equal = (
                mine == derived if exact else math.isclose(mine, derived, rel_tol=WEIGHT_TOLERANCE)
            )
            if not equal:
                place = laid.places[token] if token < len(laid.places) else "padding"
                return (
                    f"row {row}, token {token} ({place}): {name} is {mine} in the batch, "
                    f"{derived} from the sources"
                )
    return None
