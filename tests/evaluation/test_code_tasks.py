"""HumanEval and MBPP: questions, code from answers, and scores. Rows are written by hand."""

import gzip
import io
import json
from importlib.metadata import version
from itertools import combinations
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Response, Score
from moi_jax.evaluation.sandbox.sandbox import WEAK
from moi_jax.evaluation.tasks.code_extraction import complete, extract
from moi_jax.evaluation.tasks.code_task import CodeTask, pass_at
from moi_jax.evaluation.tasks.humaneval import HumanEval
from moi_jax.evaluation.tasks.mbpp import MBPP
from moi_jax.text.conversations import Message

DOUBLE = '''from typing import List


def shift(x: int) -> int:
    """
    A helper's own words.
    """
    return x + 1


def double_all(numbers: List[int]) -> List[int]:
    """ Double each number.
    >>> double_all([1, 2])
    [2, 4]
    """
'''
DOUBLE_ROW = {
    "task_id": "HumanEval/0",
    "prompt": DOUBLE,
    "entry_point": "double_all",
    "canonical_solution": "    return [2 * x for x in numbers]\n",
    "test": "\n\nMETADATA = {}\n\n\ndef check(candidate):\n"
    "    assert candidate([1, 2]) == [2, 4]\n    assert candidate([shift(1)]) == [4], 'shifted'\n",
}
HALVE_ROW = {
    "task_id": "HumanEval/1",
    "prompt": "def halve(x):\n    import math\n    '''Halve x,\n       rounded down.\n    '''\n",
    "entry_point": "halve",
    "canonical_solution": "    return math.floor(x / 2)\n",
    "test": "def check(candidate):\n    assert candidate(5) == 2\n",
}
JOIN_ROW = {
    "task_id": "HumanEval/2",
    "prompt": 'FIX = """\njoin(\'a\\n\')\n"""\n\ndef join(x):\n    """Joins."""\n',
    "entry_point": "join",
    "canonical_solution": "    return x\n",
    "test": "def check(candidate):\n    assert candidate(5) == 5\n",
}
SQUARE_ROW = {
    "task_id": 11,
    "text": "Write a function to square a number.",
    "code": "import math\r\ndef helper(x):\r\n\treturn x\r\n"
    "def square(x): \r\n\treturn helper(x) * x",
    "test_setup_code": "",
    "test_list": ["assert square(3) == 9", "assert square(math.floor(2.5)) == 4"],
    "challenge_test_list": ["assert square(0) == 1"],
}
NODE_ROW = {
    "task_id": 510,
    "text": "Write a function to find the depth of a chain.",
    "code": "class Node:\r\n    def __init__(self): self.next = None\r\n"
    "def depth(n):\r\n    return 1 + depth(n.next) if n else 0",
    "test_setup_code": "root = Node() \r\nroot.next = Node()",
    "test_list": ["assert depth(root) == 2", "assert depth(root.next) == 1"],
    "challenge_test_list": [],
}
SETTINGS = {
    "sandbox": "weak",
    "code_timeout_s": 60.0,
    "code_memory_mib": 512,
    "code_packages": [],
}
SHOWN_ROW = {**SQUARE_ROW, "task_id": 2, "text": "Write a function to cube."}


def options(tmp_path: Path, **given) -> BenchmarkOptions:
    """The weak sandbox runs on every machine, and these programs mean no harm.

    They have more time than a busy machine needs, where a test does not choose another time.
    """
    given = {"code_timeout": 60.0, **given}
    return BenchmarkOptions(tmp_path, tmp_path, allow_code_execution=True, sandbox="weak", **given)


def humaneval(tmp_path: Path, *rows: dict, **given) -> HumanEval:
    directory = tmp_path / "humaneval"
    directory.mkdir(exist_ok=True)
    with gzip.open(directory / "HumanEval.jsonl.gz", "wt") as file:
        file.writelines(json.dumps(row) + "\n" for row in rows)
    return HumanEval(options(tmp_path, **given))


def mbpp(tmp_path: Path, *rows: dict, **given) -> MBPP:
    directory = tmp_path / "mbpp"
    directory.mkdir(exist_ok=True)
    (directory / "mbpp.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return MBPP(options(tmp_path, **given))


def scores(task: CodeTask, *answers: tuple[Item, str]) -> list[Score]:
    return list(task.score([(item, Response((text,), ("stop",))) for item, text in answers]))


def test_programs_are_not_run_unasked(tmp_path: Path):
    for kind in (HumanEval, MBPP):
        with pytest.raises(UserError, match=r"runs the programs.*--allow-code-execution"):
            kind(BenchmarkOptions(tmp_path, tmp_path))


def test_the_weak_sandbox_is_said_loudly(tmp_path: Path, log_text: io.StringIO):
    task = humaneval(tmp_path, DOUBLE_ROW)
    assert WEAK in log_text.getvalue()
    assert task.notes([], []) == [WEAK]
    assert task.settings() == SETTINGS


# data/example_problem.jsonl and the completions of data/example_samples.jsonl of openai/human-eval,
# for which its evaluate_functional_correctness gives pass@1 = 0.5.
EXAMPLE_PROBLEM = {
    "task_id": "test/0",
    "prompt": "def return1():\n",
    "canonical_solution": "    return 1",
    "test": "def check(candidate):\n    assert candidate() == 1",
    "entry_point": "return1",
}
EXAMPLE_SAMPLES = (
    "    import subprocess\n    subprocess.check_output('rm -rf tmp')",
    "    import time\n    time.sleep(10)\n    return 1",
    "    return input('enter a number')",
    "    return 1",
    "  return 1",
    "\treturn 1",
)


def test_the_example_of_human_eval_has_its_official_score(tmp_path: Path):
    seconds = BenchmarkOptions(tmp_path, tmp_path).code_timeout  # when none is chosen
    task = humaneval(tmp_path, EXAMPLE_PROBLEM, samples=6, temperature=0.8, code_timeout=seconds)
    assert task.settings()["code_timeout_s"] == 3.0
    (item,) = task.load()
    assert item.messages[0].content == (
        "Write a Python function `return1()` to solve the following problem:\n\ndef return1():\n"
    )
    (score,) = task.score([(item, Response(EXAMPLE_SAMPLES, ("stop",) * 6))])
    assert score.metrics == {"pass@1": 0.5}
    failures = [sample["failure"] for sample in score.details["samples"]]
    assert failures == ["error", "timeout", "error", None, None, None]
    assert score.details["samples"][1]["error"] == "not done after 3 seconds"


def test_the_time_of_a_program_can_be_chosen(tmp_path: Path):
    waits = "import time\n    time.sleep({})\n    return x // 2"
    task = humaneval(tmp_path, HALVE_ROW, code_timeout=0.5)
    (item,) = task.load()
    (score,) = scores(task, (item, waits.format(60)))
    assert (score.failure, score.details["error"]) == ("timeout", "not done after 0.5 seconds")
    assert task.settings()["code_timeout_s"] == 0.5
    # The time is that of the program with its tests, and of no other program or process.
    task = humaneval(tmp_path, HALVE_ROW)
    assert [score.failure for score in scores(task, (item, waits.format(0.6)))] == [None]


def test_programs_may_use_the_packages_that_are_allowed(tmp_path: Path):
    body = "import numpy as np\n    return np.floor(x / 2)"
    task = humaneval(tmp_path, HALVE_ROW, code_packages=("numpy",))
    (item,) = task.load()
    assert [score.failure for score in scores(task, (item, body))] == [None]
    assert task.settings()["code_packages"] == [f"numpy {version('numpy')}"]
    (score,) = scores(humaneval(tmp_path, HALVE_ROW), (item, body))
    assert score.details["error"] == "ModuleNotFoundError: No module named 'numpy'"


def test_humaneval_asks_for_the_entry_point_and_not_its_helper(tmp_path: Path):
    double, halve, join = humaneval(tmp_path, DOUBLE_ROW, HALVE_ROW, JOIN_ROW).load()
    assert double.id == "HumanEval/0"
    asked = (
        "Write a Python function `double_all(numbers: List[int]) -> List[int]` to solve the "
        "following problem:\nDouble each number.\n>>> double_all([1, 2])\n[2, 4]\n\n"
    )
    assert double.messages == (Message("user", asked + DOUBLE),)
    assert halve.messages[0].content.startswith(
        "Write a Python function `halve(x)` to solve the following problem:\nHalve x,\nrounded "
        "down.\n\ndef halve(x):\n"
    )
    # As upstream's: edge newlines are kept, escapes are not resolved, and a text before is taken.
    assert join.messages[0].content == (
        "Write a Python function `join(x)` to solve the following problem:\n"
        "\njoin('a\\n')\n\n" + JOIN_ROW["prompt"]
    )


@pytest.mark.parametrize(
    "answer",
    [
        "    return [2 * x for x in numbers]",
        "return [2 * x for x in numbers]",
        "Here it is:\n\n```python\ndef double_all(numbers: List[int]):\n"
        "    return [shift(x) * 2 - 2 for x in numbers]\n```\nIt doubles.",
        "```\r\n    return [2 * x for x in numbers]\r\n```",
        "def double_all(numbers):\n    return [2 * x for x in numbers]\n\nThis doubles them.",
        "```python\nfrom __future__ import annotations\n"
        "double_all = lambda numbers: [2 * x for x in numbers]",
    ],
)
def test_humaneval_takes_bodies_and_definitions(answer: str, tmp_path: Path):
    task = humaneval(tmp_path, DOUBLE_ROW)
    (score,) = scores(task, (task.load()[0], answer))
    assert (score.metrics, score.failure) == ({"pass@1": 1.0}, None), score.details


def test_humaneval_tests_use_the_helper_of_the_prompt(tmp_path: Path):
    task = humaneval(tmp_path, DOUBLE_ROW)
    cheat = (
        "def shift(x):\n    return 2\n\ndef double_all(numbers):\n    return [2, 4][-len(numbers):]"
    )
    honest = "def shift(x):\n    return 7\n\ndef double_all(x):\n    return [2 * y for y in x]"
    item = task.load()[0]
    assert [score.failure for score in scores(task, (item, cheat), (item, honest))] == [None, None]
    wrong = "def shift(x):\n    return 1\n\ndef double_all(x):\n    return [2, 4][: 2 * len(x) - 2]"
    (score,) = scores(task, (item, wrong))
    assert score.failure == "wrong"
    assert score.details["error"].startswith("AssertionError: shifted in: assert candidate([shift")
    assert score.details["code"] == wrong


def test_references_pass_and_mended_ones_fail(tmp_path: Path):
    code, maths = humaneval(tmp_path, DOUBLE_ROW, HALVE_ROW), mbpp(tmp_path, SQUARE_ROW, NODE_ROW)
    for task in (code, maths):
        items = task.load()
        right = [(item, f"```python\n{item.gold['reference']}\n```") for item in items]
        assert [score.failure for score in scores(task, *right)] == [None, None]
        wrong = [(item, answer.replace("return ", "return 7 or ")) for item, answer in right]
        assert {score.failure for score in scores(task, *wrong)} == {"wrong"}


def test_mbpp_takes_the_evaluated_rows(tmp_path: Path):
    rows = [{**SQUARE_ROW, "task_id": number} for number in (1, 10, 11, 510, 511, 974)]
    items = mbpp(tmp_path, *rows).load()
    assert [item.id for item in items] == ["mbpp/11", "mbpp/510"]
    assert items[0].messages == (
        Message(
            "user",
            "You are an expert Python programmer, and here is your task: Write a function to "
            "square a number. Your code should pass these tests:\n\nassert square(3) == 9\n"
            "assert square(math.floor(2.5)) == 4",
        ),
    )
    assert items[0].gold["names"] == ["square"]
    assert items[0].gold["imports"] == "import math"


def test_mbpp_set_up_runs_after_the_code(tmp_path: Path):
    task = mbpp(tmp_path, NODE_ROW)
    item = task.load()[0]
    assert item.gold["names"] == ["Node", "depth"]
    assert item.gold["tests"][0] == NODE_ROW["test_setup_code"]
    (score,) = scores(task, (item, "def depth(n): return 2"))
    assert score.failure == "error"
    assert "NameError: name 'Node' is not defined" in score.details["error"]


def test_mbpp_reads_the_sanitized_file_where_it_is_alone(tmp_path: Path):
    (tmp_path / "mbpp").mkdir()
    row = {
        "task_id": 20,
        "prompt": "Write a root.",
        "code": "def root(x):\n    return x ** 0.5",
        "test_imports": ["import math"],
        "test_list": ["assert math.isclose(root(4), 2)"],
    }
    file = tmp_path / "mbpp" / "sanitized-mbpp.json"
    file.write_text(json.dumps([row, {**row, "task_id": 900}], indent=1))
    task = MBPP(options(tmp_path))
    (item,) = task.load()
    assert task.settings() == {**SETTINGS, "file": file.name, "shots": 0}
    answers = ["def root(x): return math.sqrt(x)", "def root(x): return x"]
    got = [score.metrics["pass@1"] for score in scores(task, *((item, a) for a in answers))]
    assert got == [1.0, 0.0]
    assert mbpp(tmp_path, SQUARE_ROW).settings()["file"] == "mbpp.jsonl"


def test_mbpp_shots_are_turns_of_their_own(tmp_path: Path):
    task = mbpp(tmp_path, SQUARE_ROW, SHOWN_ROW, shots=1)
    (item,) = task.load()
    assert [message.role for message in item.messages] == ["user", "assistant", "user"]
    assert "cube" in item.messages[0].content
    assert item.messages[1].content.startswith("```python\nimport math\ndef helper(x):\n\treturn x")
    with pytest.raises(UserError, match="lacks task_id 3"):
        mbpp(tmp_path, SQUARE_ROW, SHOWN_ROW, shots=2).load()
    with pytest.raises(UserError, match="3 worked examples"):
        mbpp(tmp_path, SQUARE_ROW, shots=4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**DOUBLE_ROW, "test": 1}, r"HumanEval.jsonl.gz, line 2: 'test' must be a str"),
        ({**DOUBLE_ROW, "prompt": "def other():\n    ''"}, "line 2.*a definition of 'double_all'"),
        ({**DOUBLE_ROW, "prompt": "def ("}, "line 2.*a definition of 'double_all'"),
    ],
)
def test_malformed_humaneval_rows_are_named(row: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        humaneval(tmp_path, DOUBLE_ROW, row).load()


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({**SQUARE_ROW, "text": " "}, r"mbpp.jsonl, line 2: 'text' \(or 'prompt'\) must be"),
        ({**SQUARE_ROW, "code": "def ("}, "line 2: code or tests do not parse"),
        ({**SQUARE_ROW, "test_list": ["f("]}, "line 2: code or tests do not parse"),
        ({**SQUARE_ROW, "test_list": [3]}, "line 2: 'test_list' must hold texts"),
        ({**SQUARE_ROW, "test_list": []}, "line 2: 'test_list' must hold texts"),
        ({**SQUARE_ROW, "test_list": "assert"}, "line 2: 'test_list' must be a list"),
        ({**SQUARE_ROW, "test_imports": None}, "line 2: 'test_imports' must hold texts"),
        ({**SQUARE_ROW, "test_imports": "import"}, "line 2: 'test_imports' must hold texts"),
        ({**SQUARE_ROW, "test_imports": [1]}, "line 2: 'test_imports' must hold texts"),
    ],
)
def test_malformed_mbpp_rows_are_named(row: dict, message: str, tmp_path: Path):
    with pytest.raises(UserError, match=message):
        mbpp(tmp_path, SQUARE_ROW, row).load()


def test_missing_files_say_what_to_put_where(tmp_path: Path):
    for kind, name in ((HumanEval, "HumanEval.jsonl.gz"), (MBPP, "mbpp.jsonl")):
        with pytest.raises(UserError, match=rf"put into the data directory .*{name}"):
            kind(options(tmp_path)).load()


def test_several_answers_give_pass_at_k(tmp_path: Path):
    task = humaneval(tmp_path, HALVE_ROW, samples=10)
    (item,) = task.load()
    right, wrong, broken = "return x // 2", "return x", "return ("
    mixed = Response((right, wrong, right, *[broken] * 7))
    hopeless = Response((wrong, broken, broken, *[""] * 7))
    first, second = task.score([(item, mixed), (item, hopeless)])
    assert first.metrics == {"pass@1": pytest.approx(0.2), "pass@10": 1.0}
    assert first.failure is None
    assert [sample["failure"] for sample in first.details["samples"][:4]] == [
        None,
        "wrong",
        None,
        "syntax error",
    ]
    assert second.metrics == {"pass@1": 0.0, "pass@10": 0.0}
    assert second.failure == "no code"


@pytest.mark.parametrize(("samples", "passed"), [(1, 0), (1, 1), (6, 0), (6, 2), (6, 5), (6, 6)])
def test_pass_at_k_is_the_share_of_draws_with_a_pass(samples: int, passed: int):
    for k in range(1, samples + 1):
        draws = list(combinations([True] * passed + [False] * (samples - passed), k))
        assert pass_at(k, samples, passed) == pytest.approx(sum(map(any, draws)) / len(draws))


def test_missing_answers_are_no_code_and_keep_their_place(tmp_path: Path):
    task = humaneval(tmp_path, HALVE_ROW)
    (item,) = task.load()
    answered = [(item, Response((), ("too_long",))), (item, Response(("return x // 2",)))]
    assert [score.failure for score in task.score(iter(answered))] == ["no code", None]


@pytest.mark.parametrize(
    ("answer", "code"),
    [
        ("```python\na = 1\n```\n```python\ndef f(): pass\n```", "def f(): pass\n"),
        ("```python\na = 1\n```\n```python\nb = 2\n```", "a = 1\n"),
        ("```py\r\ndef f():\r\n    pass", "def f():\n    pass"),
        ("1. So:\n   ```python\n   def f():\n       pass\n   ```", "def f():\n    pass\n"),
        (
            "Sure! We import first.\nimport re\n\n@cache\ndef f():\n    return 1\n\nX = 2\n"
            "# used below\ndef g(\n    x,\n):\n    return f()\nNote that f is cached.\nX = 3",
            "import re\n\n@cache\ndef f():\n    return 1\n\nX = 2\n"
            "# used below\ndef g(\n    x,\n):\n    return f()",
        ),
        ("    return 1", "    return 1"),
        ("I cannot help with that.", "I cannot help with that."),
        ("", ""),
    ],
)
def test_code_is_found_in_answers(answer: str, code: str):
    assert extract(answer, ["f"]) == code


@pytest.mark.parametrize(
    "body",
    [
        "    if x:\n        return 1\n    return 2",
        "if x:\n    return 1\nreturn 2",
        "if x:\n        return 1\n    return 2",
        "y = x\n    if y:\n        return 1\n    return 2",
        "\n    if x:\n        return 1\n    return 2\n\nThat is all.\n    return 3",
    ],
)
def test_bodies_are_put_after_the_prompt(body: str):
    namespace: dict = {}
    exec(complete('def f(x):\n    """Doc."""\n', body), namespace)
    assert [namespace["f"](True), namespace["f"](False)] == [1, 2]


@settings(deadline=None)
@given(st.text(), st.text(alphabet="abc =()\n\t:#'\"def"), st.sampled_from(["", "python", "py"]))
def test_a_lone_block_is_taken_as_it_stands(before: str, code: str, language: str):
    before = before.replace("`", "").replace("\r", "")
    answer = f"{before}\n```{language}\n{code}\n```\nAfter it."
    assert extract(answer, ["f"]) == code + "\n"
