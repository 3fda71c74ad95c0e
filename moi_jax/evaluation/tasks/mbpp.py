"""MBPP: small functions to write from a sentence and three asserts (Austin et al. 2021)."""

import ast
from collections.abc import Sequence

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Json
from moi_jax.evaluation.sandbox.execution import Program
from moi_jax.evaluation.tasks.code_extraction import extract
from moi_jax.evaluation.tasks.code_task import CodeTask
from moi_jax.evaluation.tasks.data_files import json_rows, malformed, missing
from moi_jax.text.conversations import Message

EVALUATED = range(11, 511)
SHOTS = (2, 3, 4)


class MBPP(CodeTask):
    """The rows with task_id 11 to 510 of mbpp.jsonl, else of sanitized-mbpp.json.

    With shots, tasks 2, 3 and 4 come first, each as a turn, as in the paper.
    """

    name = "mbpp"
    files = (
        "mbpp/mbpp.jsonl from github.com/google-research/google-research, mbpp/ (or "
        "mbpp/sanitized-mbpp.json, which is used where the first is missing)"
    )
    scoring = "An answer is right if its program passes all tests in the sandbox (pass@1)"
    takes_shots = True
    published_sizes = (500, 257)

    def __init__(self, options: BenchmarkOptions):
        super().__init__(options)
        self.shots = options.shots or 0
        if self.shots > len(SHOTS):
            raise UserError(f"mbpp has {len(SHOTS)} worked examples; lower --shots {self.shots}")
        self._path = options.data / "mbpp" / "mbpp.jsonl"
        if not self._path.is_file():
            self._path = self._path.with_name("sanitized-mbpp.json")

    def load(self) -> list[Item]:
        if not self._path.is_file():
            raise missing(self, self._path.parent)
        items, shown = [], {}
        for where, row in json_rows(self._path, task_id=int, code=str, test_list=list):
            text = row.get("text", row.get("prompt"))
            if not isinstance(text, str) or not text.strip():
                raise malformed(where, "'text' (or 'prompt') must be a str that is not empty")
            if not row["test_list"] or not all(isinstance(test, str) for test in row["test_list"]):
                raise malformed(where, "'test_list' must hold texts, at least one")
            imports = row.get("test_imports", [])
            if not isinstance(imports, list) or not all(isinstance(line, str) for line in imports):
                raise malformed(where, "'test_imports' must hold texts")
            question = Message("user", _question(text, row["test_list"]))
            code = row["code"].replace("\r\n", "\n")
            if row["task_id"] in SHOTS:
                answer = Message("assistant", f"```python\n{code.strip()}\n```")
                shown[row["task_id"]] = (question, answer)
            if row["task_id"] in EVALUATED:
                gold = _gold(row, code, where)
                items.append(Item(f"mbpp/{row['task_id']}", (question,), gold))
        if not items:
            raise missing(self, self._path)
        absent = [number for number in SHOTS[: self.shots] if number not in shown]
        if absent:
            raise UserError(f"{self._path} lacks task_id {absent[0]}, a worked example of --shots")
        examples = [message for number in SHOTS[: self.shots] for message in shown[number]]
        return [Item(item.id, (*examples, *item.messages), item.gold) for item in items]

    def program(self, item: Item, answer: str) -> Program:
        gold = item.gold
        names = tuple(gold["names"])
        return Program(extract(answer, names), names, tuple(gold["tests"]), gold["imports"])

    def settings(self) -> Json:
        return {**super().settings(), "file": self._path.name, "shots": self.shots}


def _question(text: str, asserts: Sequence[str]) -> str:
    tests = "\n".join(line.strip() for line in asserts)
    return (
        f"You are an expert Python programmer, and here is your task: {text.strip()} "
        f"Your code should pass these tests:\n\n{tests}"
    )


def _gold(row: Json, code: str, where: str) -> Json:
    """The tests, with the set-up code first, and the names and imports that they use.

    A name in the tests comes from the program if the reference solution defines it. A module in the
    tests is imported for them if the reference solution imports it.
    """
    setup = [row["test_setup_code"]] if row.get("test_setup_code") else []
    tests = [*setup, *row["test_list"]]
    try:
        reference = ast.parse(code).body
        nodes = [node for test in tests for node in ast.walk(ast.parse(test))]
    except (SyntaxError, TypeError, ValueError) as error:
        raise malformed(where, f"code or tests do not parse: {error}") from None
    used = {node.id for node in nodes if isinstance(node, ast.Name)}
    definitions = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    names = [node.name for node in reference if isinstance(node, definitions)]
    imports = [
        ast.unparse(node)
        for node in reference
        if isinstance(node, ast.Import | ast.ImportFrom)
        and used & {alias.asname or alias.name for alias in node.names}
    ]
    return {
        "names": [name for name in dict.fromkeys(names) if name in used],
        "imports": "\n".join([*row.get("test_imports", []), *imports]),
        "tests": tests,
        "reference": code,
    }
