"""HumanEval: 164 functions to write from their signature and docstring (Chen et al. 2021)."""

import ast
import re

from moi_jax.evaluation.protocol import Item
from moi_jax.evaluation.sandbox.execution import Program
from moi_jax.evaluation.tasks.code_extraction import complete, defines, extract
from moi_jax.evaluation.tasks.code_task import CodeTask
from moi_jax.evaluation.tasks.data_files import json_rows, malformed, missing
from moi_jax.text.conversations import Message

QUOTED = re.compile(r"(\"\"\"|''')(.*?)\1", re.DOTALL)


class HumanEval(CodeTask):
    """The prompt is the one of Qwen's official chat evaluation, with one difference.

    Upstream describes the function by the first text in triple quotes. In four prompts (10, 32, 38
    and 50) this is the docstring of a helper function; we leave helpers out.

    The code before the entry point (imports, and sometimes a helper) runs before every program.
    The tests use this code, and not what the program makes of it.
    """

    name = "humaneval"
    files = "humaneval/HumanEval.jsonl.gz (or HumanEval.jsonl) from github.com/openai/human-eval"
    scoring = "An answer is right if its program passes all tests in the sandbox (pass@1)"
    published_sizes = (164,)

    def load(self) -> list[Item]:
        directory = self.options.data / "humaneval"
        path = directory / "HumanEval.jsonl.gz"
        if not path.is_file():
            path = directory / "HumanEval.jsonl"
        if not path.is_file():
            raise missing(self, directory)
        fields = {name: str for name in ("task_id", "prompt", "entry_point", "test")}
        items = []
        for where, row in json_rows(path, **fields):
            prompt, entry_point = row["prompt"], row["entry_point"]
            parts = _parts(prompt, entry_point)
            if parts is None:
                raise malformed(where, f"'prompt' must end in a definition of {entry_point!r}")
            before, signature, description = parts
            question = (
                f"Write a Python function `{signature}` to solve the following problem:\n"
                f"{description}\n{prompt}"
            )
            gold = {
                "entry_point": entry_point,
                "before": before,
                "stub": prompt.removeprefix(before),
                "test": row["test"],
                "reference": row.get("canonical_solution", ""),
            }
            items.append(Item(row["task_id"], (Message("user", question),), gold))
        if not items:
            raise missing(self, path)
        return items

    def program(self, item: Item, answer: str) -> Program:
        gold = item.gold
        entry_point = gold["entry_point"]
        code = extract(answer, [entry_point])
        if code.strip() and not defines(code, [entry_point]):
            code = complete(gold["stub"], code)
        tests = (gold["test"], f"check({entry_point})")
        return Program(code, (entry_point,), tests, gold["before"])


def _parts(prompt: str, entry_point: str) -> tuple[str, str, str] | None:
    """The code before the entry point, the signature of the entry point, and its description.

    The description is the first text in triple quotes that is not the docstring of a helper. It is
    taken from the source as it is (backslashes are kept), with each line stripped.
    """
    try:
        *before, last = _parse(prompt).body
    except (SyntaxError, ValueError):
        return None
    if not isinstance(last, ast.FunctionDef) or last.name != entry_point:
        return None
    lines = prompt.splitlines(keepends=True)
    head = "".join(lines[last.lineno - 1 : last.body[0].lineno - 1]).strip()
    signature = head.removeprefix("def ").removesuffix(":").rstrip()
    helpers = {
        line
        for node in before
        if isinstance(node, ast.FunctionDef)
        for line in range(node.lineno - 1, node.end_lineno or node.lineno)
    }
    quoted = QUOTED.search("".join(line for n, line in enumerate(lines) if n not in helpers))
    description = "\n".join(line.strip() for line in quoted[2].split("\n")) if quoted else ""
    return "".join(lines[: last.lineno - 1]), signature, description


def _parse(prompt: str) -> ast.Module:
    """The prompt as a tree; a definition without a docstring gets a body."""
    try:
        return ast.parse(prompt)
    except SyntaxError:
        return ast.parse(f"{prompt.rstrip()}\n    pass\n")
