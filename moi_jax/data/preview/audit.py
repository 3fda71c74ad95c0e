"""The audit: derives rows from the raw files in a second, simple way, and compares the loader's.

It shares with the loader only the reading of files (`sources`), the tokenizer, the plan (which
instruction is where) and the selection (which conversations are trained on). Rendering (see
audit_rendering.py), labels, truncation and all arrays are written here a second time, token by
token, after docs/method.md. It is meant to be simple, not fast.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import numpy as np

from moi_jax.common.home import expand_home
from moi_jax.config import Data, Domain
from moi_jax.data.decontamination import Benchmarks
from moi_jax.data.loader import Batch, BatchReader
from moi_jax.data.planning.epoch import EpochPlan
from moi_jax.data.preview.audit_rendering import Render, Rendered, renderer
from moi_jax.data.sources.formats import Typing
from moi_jax.data.sources.rows import detect_format, expand, source_rows
from moi_jax.text.conversations import BadRow, Conversation
from moi_jax.text.tokenizer import Tokenizer

# Weights are quotients, which may be rounded in a different order.
WEIGHT_TOLERANCE = 1e-6


@dataclass
class PlainInstruction:
    """A sample as tokens, their weights as labels (0: none), and its place in the sources."""

    place: str
    tokens: list[int]
    labels: list[float]


@dataclass
class PlainDomain:
    """The contents of a domain's sources.

    Attributes:
      labels: the number of labels of every sample of the usable conversations, in order; the index
        of a sample is the number of its record in the cache.
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
    render, typing = renderer(tokenizer, data, targets), Typing.of(data, tokenizer.template)
    benchmarks = None
    if data.decontaminate.path and data.decontaminate.on_hit == "drop":
        benchmarks = Benchmarks.read(expand_home(data.decontaminate.path))
    files = expand(data.root, domain.sources, data.cache_dir)
    for source, part in zip(domain.sources, files, strict=True):
        kept = 0
        for file in part:
            form = detect_format(file) if source.format == "auto" else source.format
            for row in source_rows(file, form, typing=typing):
                if kept == source.max_rows:
                    break
                samples = _usable(row.conversation, data, domain, render, benchmarks)
                for tokens, labels in samples:
                    if len(found.labels) in wanted:
                        place = f"{file.name}:{row.line}"
                        instruction = PlainInstruction(place, tokens, labels)
                        found.wanted[len(found.labels)] = instruction
                    found.labels.append(_count(labels))
                kept += bool(samples)
    return found


def _count(labels: Sequence[float]) -> int:
    """The number of tokens that are labels."""
    return sum(1 for weight in labels if weight)


def _usable(
    conversation: Conversation | BadRow,
    data: Data,
    domain: Domain,
    render: Render,
    benchmarks: Benchmarks | None,
) -> list[Rendered]:
    """The samples of the row as the config keeps it; [] if the row is dropped."""
    if isinstance(conversation, BadRow):
        return []
    own = conversation.system
    if own and data.row_system == "drop_row":
        return []
    system = _system(data, domain, own)
    turns = list(conversation.turns)
    limit = data.max_instruction_tokens or data.sequence_length
    samples = render(turns, conversation.tools, system)
    split = len(samples) > 1
    kept = [sample for sample in samples if len(sample[0]) <= limit]
    while samples and not kept and not split and data.too_long == "truncate_turns":
        users = [number for number, turn in enumerate(turns) if turn.role == "user"]
        if len(users) == 1:
            return []
        turns = turns[: users[-1]]
        shorter = render(turns, conversation.tools, system)
        kept = shorter if len(shorter) == 1 and len(shorter[0][0]) <= limit else []
    texts = [text for turn in turns for text in (turn.thinking, turn.content)]
    if benchmarks and any(benchmarks.hit(text) for text in texts):
        return []
    return kept


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
            weight = weigh(domain, _count(instruction.labels))
            length = len(instruction.tokens)
            for at, token in enumerate(instruction.tokens):
                last = at == length - 1
                arrays["tokens"].append(token)
                arrays["targets"].append(pad if last else instruction.tokens[at + 1])
                arrays["segment_ids"].append(segment)
                arrays["positions"].append(position)
                arrays["domain_ids"].append(domain)
                label = 0.0 if last else instruction.labels[at + 1]
                arrays["loss_weights"].append(weight * label)
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
