"""Counts the collectives of a compiled program, and the bytes that a chip sends in them.

A collective in a loop counts as often as the loop runs. An asynchronous one counts once, where it
starts. What the compiler made of windows (a matrix product that passes its operand around in a
loop of collective-permutes) counts as these permutes.

The TPU compiler may spread one collective over several fusions: its start, parts that overlap with
other work, and its end. They share a channel, and count once.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

from moi_jax.accounting.hlo import Instruction, Module, parse_module

# What a chip sends of its operand among n chips, in an algorithm that sends no more than needed
# (a ring, or its equivalent on a torus): Chan et al. 2007, "Collective communication: theory,
# practice, and experience", section 4.
SENT = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
    "collective-broadcast": lambda n: 1,
}
# The TPU compiler writes a reduce-scatter as a fusion of an all-reduce and a slice.
REDUCE_SCATTER_FUSION = "all-reduce-scatter"
CHANNEL = re.compile(r"channel_id=(\d+)")


@dataclasses.dataclass
class Collective:
    """All collectives of one kind in one run of the program.

    Attributes:
      count: how often one runs.
      bytes: what a chip sends, see `SENT`.
      operand_bytes: the sum of the operands' sizes on a chip.
    """

    count: int = 0
    bytes: float = 0
    operand_bytes: int = 0


@dataclasses.dataclass(frozen=True)
class Traffic:
    """The collectives of a program by kind.

    Attributes:
      unknown_loops: loops with collectives whose length cannot be read; they count once.
    """

    kinds: dict[str, Collective]
    unknown_loops: int

    @property
    def bytes(self) -> float:
        """What a chip sends in all of them."""
        return sum(kind.bytes for kind in self.kinds.values())


def count_collectives(text: str) -> Traffic:
    """Counts the collectives in the text of a compiled program."""
    module = parse_module(text)
    kinds: dict[str, Collective] = {}
    unknown: set[str] = set()
    for kind, instruction, operand_bytes, times in _walk(module, module.entry, 1, unknown):
        group = _group_size(instruction)
        if group == 1:
            continue
        total = kinds.setdefault(kind, Collective())
        total.count += times
        total.operand_bytes += times * operand_bytes
        total.bytes += times * operand_bytes * SENT[kind](group)
    return Traffic(kinds, len(unknown))


def _walk(
    module: Module,
    computation: str,
    times: int,
    unknown: set[str],
    channels: set[str] | None = None,
) -> Iterator[tuple[str, Instruction, int, int]]:
    """Yields (kind, instruction, bytes of its operands, how often it runs) of all collectives.

    Args:
      channels: those that were seen in the loop body, or the entry, that this is a part of.
    """
    channels = set() if channels is None else channels
    instructions = module.computations[computation]
    for instruction in instructions.values():
        opcode = instruction.opcode.removesuffix("-start")
        if opcode in SENT:
            channel = CHANNEL.search(instruction.attributes)
            if channel and channel[1] in channels:
                continue
            channels |= {channel[1]} if channel else set()
            operands = sum(instructions[name].bytes for name in instruction.operands)
            fused = computation.startswith(REDUCE_SCATTER_FUSION)
            yield ("reduce-scatter" if fused else opcode), instruction, operands, times
        elif opcode == "while":
            body = instruction.computation("body")
            trips = module.trip_count(instruction, computation)
            inner = list(_walk(module, body, times * (trips or 1), unknown))
            if inner and trips is None:
                unknown.add(instruction.name)
            yield from inner
        elif not opcode.endswith(("-done", "-update")):
            for called in instruction.called:
                yield from _walk(module, called, times, unknown, channels)


def _group_size(instruction: Instruction) -> int:
    """Returns among how many chips it runs, from any of the ways in which that is written."""
    text = instruction.attributes
    if "source_target_pairs=" in text:
        pairs = re.findall(r"\{(\d+),(\d+)\}", text)
        return 2 if any(source != target for source, target in pairs) else 1
    if iota := re.search(r"replica_groups=\[(\d+),(\d+)\]", text):
        return int(iota[2])
    if mesh := re.search(r"replica_groups=mesh\[([^\]]*)\][^{]*\{([^}]*)\}", text):
        sizes = {axis: int(size) for axis, size in re.findall(r"('\w+')=(\d+)", mesh[1])}
        # An axis, or a part of one as 'axis':(before)size.
        parts = re.findall(r"('\w+')(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(size) if size else sizes[axis] for axis, size in parts)
    listed = re.search(r"replica_groups=\{\{([\d,]*)\}", text)
    assert listed, text
    return len(listed[1].split(","))
