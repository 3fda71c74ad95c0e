"""Reads the text of a compiled program (HLO): its computations, instructions and loops.

Only what the accounting needs: the shapes of results, operands by name, the computations that an
instruction calls, and how often a loop runs. The format is that of `jax.stages.Compiled.as_text`.
"""

import dataclasses
import math
import re

BITS = re.compile(r"[a-z]+(\d+)")
ARRAY = re.compile(r"\b(pred|token|[a-z]+\d+[a-z0-9]*)\[([\d,]*)\]")
NAME = re.compile(r"%([\w.\-]+)")
HEADER = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) \(.*\{$")
CALLED = re.compile(r"\b(?:calls|to_apply|called_computations?|branch_computations)=")
KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One instruction: `%name = shape opcode(operands), attributes`."""

    name: str
    shape: str
    opcode: str
    operands: tuple[str, ...]
    inside: str  # what stands between the parentheses: operands, or the value of a constant
    attributes: str

    @property
    def bytes(self) -> int:
        """Size of the result in bytes, without padding; of a tuple, the sum of its elements."""
        return shape_bytes(self.shape)

    def computation(self, attribute: str) -> str:
        """Returns the name of the computation in an attribute, such as body=%name."""
        found = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.attributes)
        assert found, f"{self.opcode} without {attribute}"
        return found[1]

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls once, such as the one of a fusion."""
        found = CALLED.search(self.attributes)
        if not found:
            return ()
        rest = self.attributes[found.end() :]
        names = rest[: rest.index("}")] if rest.startswith("{") else rest.split(",")[0]
        return tuple(NAME.findall(names))


@dataclasses.dataclass(frozen=True)
class Module:
    """The computations of a program by name: instruction name -> instruction, in their order."""

    computations: dict[str, dict[str, Instruction]]
    entry: str

    def trip_count(self, loop: Instruction, caller: str) -> int | None:
        """Returns how often the body of a while instruction runs; None if that cannot be read.

        The compiler states it for some loops. Of others it is read from the condition, a
        comparison of a counter with a constant, from the counter's first value and its step.
        """
        if known := KNOWN_TRIPS.search(loop.attributes):
            return int(known[1])
        condition = self.computations[loop.computation("condition")]
        compared = self._comparison(condition)
        if compared is None:
            return None
        index, limit, inclusive = compared
        first = self._initial(loop, caller, index)
        step = self._step(loop.computation("body"), index)
        return max(0, math.ceil((limit + inclusive - first) / step))

    def _comparison(self, condition: dict[str, Instruction]) -> tuple[int, int, int] | None:
        """Returns (place of the counter in the loop's tuple, limit, 1 if the limit is included)."""
        for compare in condition.values():
            direction = re.search(r"direction=(LT|LE)", compare.attributes)
            if compare.opcode != "compare" or not direction:
                continue
            counter, limit = (_source(condition, name) for name in compare.operands)
            if counter.opcode == "get-tuple-element" and limit.opcode == "constant":
                return _index(counter), int(limit.inside), int(direction[1] == "LE")
        return None

    def _initial(self, loop: Instruction, caller: str, index: int) -> int:
        """Returns the counter's value before the loop; 0 if it is not a constant."""
        around = self.computations[caller]
        values = _source(around, loop.operands[0])
        if values.opcode != "tuple":
            return 0
        value = _source(around, values.operands[index])
        return int(value.inside) if value.opcode == "constant" else 0

    def _step(self, body: str, index: int) -> int:
        """Returns what one iteration adds to the counter; 1 if it is not a sum of constants."""
        instructions = self.computations[body]
        root = list(instructions.values())[-1]
        if root.opcode != "tuple":
            return 1
        total, value = 0, _source(instructions, root.operands[index])
        while value.opcode == "add":
            parts = [_source(instructions, name) for name in value.operands]
            constants = [part for part in parts if part.opcode == "constant"]
            if len(constants) != 1:
                return 1
            total += int(constants[0].inside)
            value = parts[0] if parts[1] is constants[0] else parts[1]
        return total or 1


def shape_bytes(shape: str) -> int:
    """Returns the size of a shape such as `bf16[2,64]{1,0}` or of a tuple of them."""
    return sum(_array_sizes(shape))


def largest_array(shape: str) -> int:
    """Returns the size of the largest array of a shape; asynchronous ones name theirs twice."""
    return max(_array_sizes(shape), default=0)


def _array_sizes(shape: str) -> list[int]:
    sizes = []
    for dtype, dimensions in ARRAY.findall(shape):
        bits = BITS.match(dtype)
        width = int(bits[1]) if bits else 8 * (dtype == "pred")
        elements = math.prod(int(size) for size in dimensions.split(",") if size)
        sizes.append(elements * width // 8)
    return sizes


def parse_module(text: str) -> Module:
    """Reads the text of a compiled program."""
    computations: dict[str, dict[str, Instruction]] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.startswith("  "):
            if instruction := _instruction(line.strip().removeprefix("ROOT ")):
                current[instruction.name] = instruction
        elif header := HEADER.match(line):
            current = computations[header[1]] = {}
            entry = header[1] if line.startswith("ENTRY") else entry
    return Module(computations, entry)


def _instruction(line: str) -> Instruction | None:
    name, equals, rest = line.partition(" = ")
    if not equals or not name.startswith("%"):
        return None
    end = _closing(rest) + 1 if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].strip()
    opening = rest.index("(")
    closing = opening + _closing(rest[opening:])
    inside = rest[opening + 1 : closing]
    return Instruction(
        name[1:], shape, rest[:opening], tuple(NAME.findall(inside)), inside, rest[closing + 1 :]
    )


def _closing(text: str) -> int:
    """Returns the place of the parenthesis that closes the one at the beginning of the text."""
    depth = 0
    for place, character in enumerate(text):
        depth += (character == "(") - (character == ")")
        if depth == 0:
            return place
    return len(text)


def _source(instructions: dict[str, Instruction], name: str) -> Instruction:
    """Returns the instruction of this name, or what it only copies."""
    instruction = instructions[name]
    while instruction.opcode in ("copy", "bitcast", "convert", "reshape"):
        instruction = instructions[instruction.operands[0]]
    return instruction


def _index(instruction: Instruction) -> int:
    found = re.search(r"index=(\d+)", instruction.attributes)
    assert found, instruction
    return int(found[1])
