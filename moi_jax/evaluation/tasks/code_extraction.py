"""From an answer to code: the fenced block, else the definitions, else the text as it stands."""

import re
from collections.abc import Sequence

# A block that was cut off at the answer's length has no end.
FENCE = re.compile(r"^([ \t]*)```[^\n`]*\n(.*?)(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)
# What may stand at the margin between definitions, and is no prose.
AT_MARGIN = re.compile(r"(?:(?:async )?def |class |from \w|import \w|[@#)\]}]|\w+ *=[^=])")
DEFINITION = re.compile(r"^(?:async )?(?:def|class) ", re.MULTILINE)


def extract(answer: str, names: Sequence[str]) -> str:
    """The code of an answer.

    Args:
      names: what the code should define: of several blocks the first that defines one of them
        is taken, else the first.
    """
    answer = answer.replace("\r\n", "\n")
    blocks = [_without_indent(code, indent) for indent, code in FENCE.findall(answer)]
    if blocks:
        return next((block for block in blocks if defines(block, names)), blocks[0])
    if DEFINITION.search(answer):
        return _definitions(answer)
    return answer


def defines(code: str, names: Sequence[str]) -> bool:
    """Whether code defines one of the names at its margin."""
    either = "|".join(map(re.escape, names))
    return bool(
        re.search(rf"^(?:(?:async )?(?:def|class) +(?:{either})\b|(?:{either}) *=)", code, re.M)
    )


def complete(prompt: str, code: str) -> str:
    """The prompt, which ends in an open definition, and then `code` as its body.

    A body may have lost its indentation, or, when an answer was stripped, that of its first line.
    What follows at the margin is no part of it.
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
    """From the first line of code to the first line of prose after a definition."""
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
