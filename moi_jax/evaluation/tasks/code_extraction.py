"""Extracts code from an answer: a fenced block, else definitions, else the whole text."""

import re
from collections.abc import Sequence

# A block without an end was cut at the length of the answer.
FENCE = re.compile(r"^([ \t]*)```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
# Lines of code, and not of prose, that may start at the margin between definitions.
AT_MARGIN = re.compile(r"(?:(?:async )?def |class |from \w|import \w|[@#)\]}]|\w+ *=[^=])")
DEFINITION = re.compile(r"^(?:async )?(?:def|class) ", re.MULTILINE)


def extract(answer: str, names: Sequence[str]) -> str:
    """The code of an answer.

    Args:
      names: names that the code should define. Of several blocks, the first that defines one of
        them is taken, else the first block.
    """
    answer = answer.replace("\r\n", "\n")
    blocks = [_without_indent(code, indent) for indent, code in FENCE.findall(answer)]
    if blocks:
        return next((block for block in blocks if defines(block, names)), blocks[0])
    if DEFINITION.search(answer):
        return _definitions(answer)
    return answer


def defines(code: str, names: Sequence[str]) -> bool:
    """Whether the code defines one of the names at its margin."""
    either = "|".join(map(re.escape, names))
    return bool(
        re.search(rf"^(?:(?:async )?(?:def|class) +(?:{either})\b|(?:{either}) *=)", code, re.M)
    )


def complete(prompt: str, code: str) -> str:
    """The prompt, which ends in an open definition, followed by `code` as its body.

    The body may lack its indentation, or only that of its first line if the answer was stripped.
    Code at the margin after the body is dropped.
    """
    first, *rest = code.strip("\n").split("\n")
    if not first[:1].isspace():
        widths = [_width(line) for line in rest if line.strip()]
        least = 8 if first.rstrip().endswith(":") else 4
        if not widths or widths[0] < least:
            return prompt + "".join(f"    {line}\n" for line in (first, *rest))
        first = "    " + first
    body = [first]
    for line in rest:
        if line.strip() and not line[0].isspace():
            break
        body.append(line)
    return prompt + "\n".join(body) + "\n"


def _width(line: str) -> int:
    line = line.expandtabs(4)
    return len(line) - len(line.lstrip())


def _without_indent(code: str, indent: str) -> str:
    return "".join(line.removeprefix(indent) for line in code.splitlines(keepends=True))


def _definitions(text: str) -> str:
    """The lines from the first line of code to the first line of prose after a definition."""
    kept: list[str] = []
    defined = False
    for line in text.split("\n"):
        if AT_MARGIN.match(line):
            defined |= bool(DEFINITION.match(line))
            kept.append(line)
        elif kept and (not line.strip() or line[0].isspace()):
            kept.append(line)
        elif defined:
            break
        else:
            kept.clear()
    return "\n".join(kept)
