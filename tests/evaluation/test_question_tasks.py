"""GSM8K, MATH and MMLU on a few rows written by hand in the layout of the public files."""

import gzip
import json
import os
import re
from pathlib import Path
from statistics import fmean

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Response, Score, Task
from moi_jax.evaluation.tasks import TASKS, make_task, math_equivalence
from moi_jax.evaluation.tasks.competition_math import final_answer, last_boxed
from moi_jax.evaluation.tasks.data_files import csv_rows, json_rows
from moi_jax.evaluation.tasks.gsm8k import EXAMPLES, last_number
from moi_jax.evaluation.tasks.letters import find_letter
from moi_jax.evaluation.tasks.math_equivalence import Equivalence

GSM8K = [
    ("Ann has 3 pens and buys 2. How many has she?", "3 + 2 = <<3+2=5>>5 pens.\n#### 5"),
    ("A house costs $1,250,000. Half of it?", "That is $625,000.\n#### 625,000"),
]
MATH = [
    {"problem": "What is half?", "solution": "So \\boxed{\\frac{1}{2}}.", "level": "Level 1"}
    | {"subject": "Algebra", "unique_id": "test/algebra/9.json", "answer": "\\frac{1}{2}"},
    {"problem": "A root?", "solution": "", "level": "Level 5", "subject": "Geometry"}
    | {"unique_id": "test/geometry/1.json", "answer": "2\\sqrt{3}"},
]


def task(name: str, data: Path, **options) -> Task:
    return make_task(name, BenchmarkOptions(data, data / "out", **options))


def write_lines(path: Path, rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_gsm8k(path: Path, rows=GSM8K) -> None:
    write_lines(path, [{"question": question, "answer": answer} for question, answer in rows])


def score(task: Task, item: Item, *texts: str) -> Score:
    [scored] = task.score([(item, Response(texts, ("stop",) * len(texts)))])
    return scored


def accuracy(task: Task, items: list[Item], texts: list[str]) -> float:
    answered = [
        (item, Response((text,), ("stop",))) for item, text in zip(items, texts, strict=True)
    ]
    return fmean(scored.metrics["accuracy"] for scored in task.score(answered))


def test_rows_of_json_say_where_they_stand(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes('{"q": "a\u2028b"}\r\n\n{"q": "c"}\n'.encode())
    assert list(json_rows(path, q=str)) == [
        (f"{path}, line 1", {"q": "a\u2028b"}),
        (f"{path}, line 3", {"q": "c"}),
    ]
    path.write_bytes(gzip.compress(path.read_bytes()))
    assert [row["q"] for _, row in json_rows(path, q=str)] == ["a\u2028b", "c"]


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[1]", '{"r": "a"}', '{"q": 1}', '{"q": " "}', "\udcff"),
        *(r'{"q": "\ud83d"}', r'{"q": "a", "r": [{"\ude00": 1}]}'),
    ],
)
def test_malformed_row_of_json_is_named(tmp_path: Path, line: str):
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"q": "a"}}\n{line}\n', errors="surrogateescape")
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2: .*correct the row"):
        list(json_rows(path, q=str))


def test_rows_of_csv_keep_newlines_and_separators_in_cells(tmp_path: Path):
    path = tmp_path / "rows.csv"
    path.write_bytes('\ufeff"a\r\nb",None\r\n\r\n" ""c""\u2028", d\r\n'.encode())
    assert list(csv_rows(path)) == [
        (f"{path}, line 1", ["a\nb", "None"]),
        (f"{path}, line 4", [' "c"\u2028', " d"]),
    ]


@pytest.mark.parametrize("row", [b'"a', b'"a"b,c\n', b"\xff\n"])
def test_malformed_row_of_csv_is_named(tmp_path: Path, row: bytes):
    path = tmp_path / "rows.csv"
    path.write_bytes(b"x,y\n" + row)
    with pytest.raises(UserError, match=r"rows\.csv.*correct the row"):
        list(csv_rows(path))


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("gsm8k", r"gsm8k/test\.jsonl from github\.com/openai/grade-school-math"),
        ("math", r"math/test500\.jsonl .* or math/test/SUBJECT/N\.json"),
        ("mmlu", r"mmlu/test/SUBJECT_test\.csv.*github\.com/hendrycks/test"),
    ],
)
def test_missing_data_says_what_to_put_where(tmp_path: Path, name: str, told: str):
    with pytest.raises(UserError, match=told) as error:
        task(name, tmp_path).load()
    assert str(tmp_path) in str(error.value)


@pytest.mark.parametrize("name", TASKS)
def test_shots_are_refused_where_a_task_has_none(tmp_path: Path, name: str):
    asked = {"shots": 1, "allow_code_execution": True, "sandbox": "weak"}
    if name in ("gsm8k", "mbpp", "mmlu"):
        assert task(name, tmp_path, **asked).options.shots == 1
    else:
        with pytest.raises(UserError, match=f"{name} has no worked examples; .* gsm8k, mbpp and"):
            task(name, tmp_path, **asked)
        assert task(name, tmp_path, **{**asked, "shots": 0}).options.shots == 0


def test_whole_characters_in_escapes_are_taken(tmp_path: Path):
    path = tmp_path / "rows.jsonl"
    path.write_text(r'{"q": "\ud83d\ude00"}')
    assert [row for _, row in json_rows(path)] == [{"q": "\U0001f600"}]


# GSM8K


def test_gsm8k_asks_the_raw_question(tmp_path: Path):
    write_gsm8k(tmp_path / "gsm8k/test.jsonl")
    gsm8k = task("gsm8k", tmp_path)
    first, second = gsm8k.load()
    assert [(message.role, message.content) for message in first.messages] == [
        ("user", GSM8K[0][0])
    ]
    assert (first.id, first.gold, second.id, second.gold) == ("gsm8k/1", "5", "gsm8k/2", "625000")
    assert gsm8k.settings() == {"shots": 0}


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3 + 2 = 5", "5"),
        ("It is $1,234.50.", "1234.50"),
        ("Minus -7 degrees", "-7"),
        ("**18**\n", "18"),
        ("no number", None),
        ("", None),
        ("1, 2, 3", "3"),
        ("7 of 10 %.", "10"),
    ],
)
def test_last_number(text: str, number: str | None):
    assert last_number(text) == number


@settings(deadline=None)
@given(st.text(st.characters(exclude_categories=["Nd", "Cs"])), st.integers(-(10**9), 10**9))
def test_last_number_is_found_behind_any_text(text: str, number: int):
    assert last_number(f"12 {text} = {number:,}.") == str(number)


def test_gsm8k_gold_scores_and_perturbed_gold_does_not(tmp_path: Path):
    write_gsm8k(tmp_path / "gsm8k/test.jsonl")
    gsm8k = task("gsm8k", tmp_path)
    items = gsm8k.load()
    assert accuracy(gsm8k, items, [answer for _, answer in GSM8K]) == 1
    assert accuracy(gsm8k, items, ["It is 5.00", "625000.00009 dollars"]) == 1
    assert accuracy(gsm8k, items, ["#### 6", "It is 625000.1"]) == 0
    assert accuracy(gsm8k, items, ["5, and not 4", "625"]) == 0
    assert score(gsm8k, items[0], "five").failure == "no answer"
    assert score(gsm8k, items[0], "6") == Score({"accuracy": 0.0}, None, {"extracted": ["6"]})
    assert score(gsm8k, items[0], "5", "6", "none", "5.0").metrics == {"accuracy": 0.5}


def test_gsm8k_shots_are_worked_examples_of_one_text(tmp_path: Path):
    write_gsm8k(tmp_path / "gsm8k/test.jsonl")
    gsm8k = task("gsm8k", tmp_path, shots=4)
    [message] = gsm8k.load()[0].messages
    parts = message.content.split("\n\n")
    for part, (question, steps, number) in zip(parts, EXAMPLES, strict=False):
        assert part == (
            f"Question: {question}\nLet's think step by step\n{steps}\nThe answer is {number}"
        )
    assert parts[4:] == [f"Question: {GSM8K[0][0]}\nLet's think step by step"]
    assert gsm8k.settings() == {"shots": 4, "examples": "moi_jax's own"}
    with pytest.raises(UserError, match="--shots 5, but there are 4"):
        task("gsm8k", tmp_path, shots=5).load()


def test_gsm8k_shots_come_from_the_training_file(tmp_path: Path):
    write_gsm8k(tmp_path / "gsm8k/test.jsonl")
    write_gsm8k(tmp_path / "gsm8k/train.jsonl", [("1 + 1?", "1 + 1 = <<1+1=2>>2\n#### 2")] * 3)
    gsm8k = task("gsm8k", tmp_path, shots=2)
    text = gsm8k.load()[0].messages[0].content
    shot = "Question: 1 + 1?\nLet's think step by step\n1 + 1 = 2\nThe answer is 2\n\n"
    assert text == 2 * shot + f"Question: {GSM8K[0][0]}\nLet's think step by step"
    assert gsm8k.settings() == {"shots": 2, "examples": "gsm8k/train.jsonl"}


@pytest.mark.parametrize("steps", ["5", "#### five", "####"])
def test_gsm8k_row_without_a_number_is_named(tmp_path: Path, steps: str):
    write_gsm8k(tmp_path / "gsm8k/test.jsonl", [*GSM8K, ("q", steps)])
    with pytest.raises(UserError, match=r"gsm8k/test\.jsonl, line 3: 'answer'"):
        task("gsm8k", tmp_path).load()


def test_our_worked_examples_are_right():
    for _, steps, number in EXAMPLES:
        sums = re.findall(r"([\d.]+(?: [-+*/] [\d.]+)+) = \$?([\d.]+)", steps)
        assert len(sums) >= 2
        assert all(eval(sum) == float(result) for sum, result in sums)
        assert sums[-1][1].rstrip(".") == number


# MATH


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{\frac{1}{\sqrt{2}}}.", r"\frac{1}{\sqrt{2}}"),
        (r"\boxed{1} or rather \boxed{ 2 }", "2"),
        (r"\boxed{3} and, cut, \boxed{\frac{1}{", "3"),
        (r"\boxed{4} in \boxed{}", "4"),
        (r"\fbox{5}", None),
        (r"\fboxed{5}", "5"),
        (r"\boxed 6.", "6."),
        (r"\boxed{\left\{ x \right.}", r"\left\{ x \right."),
        (
            r"\boxed{\begin{pmatrix} 1 \\ 2 \end{pmatrix}} \}",
            r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}",
        ),
        (r"\boxed{x = \boxed{7}}", "7"),
        ("none", None),
    ],
)
def test_last_boxed(text: str, answer: str | None):
    assert last_boxed(text) == answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("The final answer is $\\frac12$. I hope so.", "\\frac12"),
        ("**Final Answer:** 5.5 apples. Good.", "5.5 apples"),
        ("The answer is 3.\nNo, the answer is: 4", "4"),
        ("The answer is 3, boxed \\boxed{5}.", "5"),
        ("We found it.", None),
        ("The answer is.", None),
    ],
)
def test_final_answer(text: str, answer: str | None):
    assert final_answer(text) == answer


nested = st.recursive(
    st.text("ab1 \\\\^_", max_size=4).map(lambda text: text.replace("\\", "\\alpha ")),
    lambda inner: st.tuples(inner, inner).map(lambda pair: f"{pair[0]}{{{pair[1]}}}"),
)


@settings(deadline=None)
@given(nested, st.text(st.characters(exclude_characters="\\", exclude_categories=["Cs"])))
def test_last_boxed_finds_any_nesting(inside: str, after: str):
    assert (last_boxed(rf"x \boxed{{{inside}}} {after}") or "") == inside.strip()


def test_math_items_of_lines_and_of_single_files(tmp_path: Path):
    write_lines(tmp_path / "lines/math/test500.jsonl", MATH)
    half, root = task("math", tmp_path / "lines").load()
    assert half.messages[0].content.startswith("What is half?\n\n")
    assert "\\boxed{}" in half.messages[0].content
    assert (half.id, half.group) == ("test/algebra/9.json", "Algebra")
    assert root.gold == {"answer": "2\\sqrt{3}", "level": "Level 5"}
    for number in (2, 10):
        row = {"problem": "?", "level": "Level 1", "type": "Algebra", "solution": "\\boxed{3}"}
        write_lines(tmp_path / f"files/math/test/algebra/{number}.json", [row])
    items = task("math", tmp_path / "files").load()
    assert [item.id for item in items] == ["test/algebra/2.json", "test/algebra/10.json"]
    assert items[0].gold == {"answer": "3", "level": "Level 1"}
    assert items[0].group == "Algebra"


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"problem": "?", "solution": "none"}, "line 3: there must be an 'answer'"),
        ({"problem": "", "answer": "1"}, "line 3: 'problem'"),
    ],
)
def test_math_row_that_is_malformed_is_named(tmp_path: Path, row: dict, told: str):
    write_lines(tmp_path / "math/test500.jsonl", [*MATH, row])
    with pytest.raises(UserError, match=rf"test500\.jsonl.*{told}"):
        task("math", tmp_path).load()


def test_math_gold_scores_and_perturbed_gold_does_not(tmp_path: Path):
    write_lines(tmp_path / "math/test500.jsonl", MATH)
    maths = task("math", tmp_path)
    items = maths.load()
    right = ["So \\boxed{0.5}", "The final answer is $\\sqrt{12}$."]
    wrong = ["So \\boxed{\\frac{1}{3}}", "So \\boxed{3\\sqrt{3}}"]
    half, root, *others = maths.score(
        [
            *((item, Response((text,))) for item, text in zip(items, right, strict=True)),
            *((item, Response((text,))) for item, text in zip(items, wrong, strict=True)),
            (items[0], Response(("I do not know",))),
            (items[0], Response(("\\boxed{1/2}", "\\boxed{2}"))),
        ]
    )
    assert half == Score({"accuracy": 1.0}, None, {"extracted": ["0.5"], "level": "Level 1"})
    assert root.metrics == {"accuracy": 1.0}
    assert [other.metrics["accuracy"] for other in others] == [0, 0, 0, 0.5]
    assert [other.failure for other in others] == [None, None, "no answer", None]
    assert maths.notes(items, [half, others[0]]) == ["by level: Level 1 100.0, Level 5 0.0"]


def test_comparison_that_hangs_counts_as_wrong_and_the_next_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    write_lines(tmp_path / "math/test500.jsonl", MATH[:1])
    maths = task("math", tmp_path)
    [item] = maths.load()
    monkeypatch.setattr(math_equivalence, "SECONDS", 1.0)
    hangs, right = maths.score(
        [(item, Response((f"\\boxed{{{text}}}",))) for text in ("9^{9^{9^9}}", "0.50")]
    )
    assert (hangs.metrics, hangs.failure) == ({"accuracy": 0.0}, "timeout")
    assert right.metrics == {"accuracy": 1.0}


@pytest.mark.parametrize("answer", ["$}{\\", "\\frac{1}{", "\u2028\n", "}" * 50, "x" * 1000])
def test_comparison_with_nonsense_is_no(answer: str, equivalence: Equivalence):
    assert equivalence.equal("3", answer) is False
    assert equivalence.equal("3", "6/2") is True


@pytest.fixture(scope="module")
def equivalence():
    with Equivalence() as equivalence:
        yield equivalence


def test_ctrl_c_does_not_reach_the_process_that_compares(equivalence: Equivalence):
    """A terminal sends it to all processes of a session; this one would print a traceback."""
    assert equivalence.equal("3", "6/2") is True
    assert equivalence._worker is not None
    assert os.getsid(equivalence._worker.pid) == equivalence._worker.pid


# MMLU

QUESTION = '"Which, of these\r\nis best?",None, two ,"x,\u2028y",4,'


def write_mmlu(data: Path, subject: str, text: str, part: str = "test") -> None:
    path = data / "mmlu" / part / f"{subject}_{part}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text.encode())


def test_mmlu_asks_the_question_with_its_choices(tmp_path: Path):
    write_mmlu(tmp_path, "anatomy", f"{QUESTION}B\r\n{QUESTION} d\r\n")
    mmlu = task("mmlu", tmp_path)
    first, second = mmlu.load()
    [message] = first.messages
    assert message.content == (
        "The following is a multiple-choice question. Please choose the most suitable one among "
        "A, B, C and D as the answer to this question.\n\n"
        "Which, of these\nis best?\nA. None\nB. two\nC. x,\u2028y\nD. 4\n"
    )
    assert (first.id, first.group, first.gold["letter"]) == ("anatomy/1", "anatomy", "B")
    assert (second.id, second.gold["letter"], second.choices) == ("anatomy/2", "D", ())
    assert mmlu.notes([first, second], []) == ["1 of 57 subjects"]
    assert not mmlu.is_complete([first, second])


def test_mmlu_header_and_numbered_answers(tmp_path: Path):
    write_mmlu(tmp_path, "law", f"question,A,B,C,D,answer\n{QUESTION}0\n{QUESTION}3\n")
    assert [item.gold["letter"] for item in task("mmlu", tmp_path).load()] == ["A", "D"]


@pytest.mark.parametrize(
    ("header", "row"),
    [
        (",question,A,B,C,D,answer", "0,Why?,w,x,y,z,2"),
        ("question,subject,choices,answer", "Why?,law,\"['w' 'x'\n 'y' 'z']\",2"),
        ("question,choices,answer,error_type", "Why?,\"['w', \"\"x\"\", 'y', 'z']\",2,ok"),
        ("answer,D,C,B,A,question", "C,z,y,x,w,Why?"),
    ],
)
def test_mmlu_columns_are_found_by_the_header(tmp_path: Path, header: str, row: str):
    write_mmlu(tmp_path, "law", f"{header}\n{row}\n")
    [item] = task("mmlu", tmp_path).load()
    assert item.messages[0].content.endswith("\n\nWhy?\nA. w\nB. x\nC. y\nD. z\n")
    assert item.gold["letter"] == "C"


def test_mmlu_redux_errors_are_kept_or_left_out_and_told(tmp_path: Path):
    rows = "Why?,\"['w', 'x', 'y', 'z']\",2,{}\n"
    kinds = ("ok", "wrong_groundtruth", "ok", "bad_question_clarity")
    header = "question,choices,answer,error_type\n"
    write_mmlu(tmp_path, "law", header + "".join(map(rows.format, kinds)))
    mmlu = task("mmlu", tmp_path)
    assert [item.id for item in mmlu.load()] == ["law/1", "law/2", "law/3", "law/4"]
    assert mmlu.notes([], [])[1:] == [
        "MMLU-Redux: 2 questions with an error_type count as their file says"
    ]
    mmlu = task("mmlu", tmp_path, mmlu_errors="skip")
    assert [item.id for item in mmlu.load()] == ["law/1", "law/3"]
    assert mmlu.notes([], [])[1:] == ["MMLU-Redux: 2 questions with an error_type are left out"]
    assert mmlu.settings()["faulty_questions"] == "skip"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("question,answer\n", "line 1: the header names question, answer; there must be"),
        ("question,choices,answer\nWhy?,none,A\n", "line 2: there must be a row of the header"),
        ("question,choices,answer\nWhy?,\"['w']\"\n", "line 2: there must be 3 cells"),
        ('question,choices,answer\nWhy?,"[\'",A\n', "line 2: there must be a row of the"),
    ],
)
def test_mmlu_header_or_row_that_cannot_be_read_is_named(tmp_path: Path, text: str, told: str):
    write_mmlu(tmp_path, "law", text)
    with pytest.raises(UserError, match=rf"law_test\.csv, {told}"):
        task("mmlu", tmp_path).load()


def test_mmlu_in_another_format_is_named_with_what_to_do(tmp_path: Path):
    arrow = tmp_path / "mmlu/test/law/data-00000-of-00001.arrow"
    arrow.parent.mkdir(parents=True)
    arrow.touch()
    with pytest.raises(UserError, match=r"\.arrow is not a CSV file; write each subject.*to_csv"):
        task("mmlu", tmp_path).load()


@pytest.mark.parametrize(
    "row", [QUESTION + "E", QUESTION + "4", "a,b,A", QUESTION + "A,", "x,,,,,"]
)
def test_mmlu_row_that_is_malformed_is_named(tmp_path: Path, row: str):
    write_mmlu(tmp_path, "law", f"{QUESTION}A\n{row}\n")
    with pytest.raises(UserError, match=r"law_test\.csv, line 3: there must be six cells"):
        task("mmlu", tmp_path).load()


def test_mmlu_shots_are_turns_answered_by_letters(tmp_path: Path):
    write_mmlu(tmp_path, "law", QUESTION + "A\n")
    write_mmlu(tmp_path, "law", "q1,1,2,3,4,C\nq2,5,6,7,8,D\nq3,,,,,A\n", "dev")
    mmlu = task("mmlu", tmp_path, shots=2)
    [item] = mmlu.load()
    assert [message.role for message in item.messages] == ["user", "assistant"] * 2 + ["user"]
    assert item.messages[0].content.endswith("\n\nq1\nA. 1\nB. 2\nC. 3\nD. 4\n")
    assert [message.content for message in item.messages[1::2]] == ["C", "D"]
    assert mmlu.settings() == {"shots": 2, "method": "generate"}
    with pytest.raises(UserError, match=r"--shots 4, but .*law_dev\.csv has 3"):
        task("mmlu", tmp_path, shots=4).load()
    with pytest.raises(UserError, match="use 0 to 5"):
        task("mmlu", tmp_path, shots=6)


def test_mmlu_likelihood_takes_the_likeliest_letter(tmp_path: Path):
    write_mmlu(tmp_path, "law", QUESTION + "C\n")
    mmlu = task("mmlu", tmp_path, mmlu_method="likelihood")
    [item] = mmlu.load()
    assert item.choices == ("A", "B", "C", "D")
    answers = [(-2.0, -3.0, -1.5, -9.0), (-1.0, -3.0, -1.5, -9.0), (-1.0, float("nan"), -0.5, -9.0)]
    right, wrong, broken = mmlu.score([(item, Response((), (), found)) for found in answers])
    assert right == Score({"accuracy": 1.0}, None, {"extracted": ["C"]})
    assert wrong == Score({"accuracy": 0.0}, None, {"extracted": ["A"]})
    assert (broken.metrics, broken.failure) == ({"accuracy": 0.0}, "no answer")


def test_mmlu_generation_is_read(tmp_path: Path):
    write_mmlu(tmp_path, "law", QUESTION + "B\n")
    mmlu = task("mmlu", tmp_path)
    [item] = mmlu.load()
    assert score(mmlu, item, "The answer is B.").metrics == {"accuracy": 1.0}
    assert score(mmlu, item, "B", "C").metrics == {"accuracy": 0.5}
    assert score(mmlu, item, "It is two!").metrics == {"accuracy": 1.0}
    assert score(mmlu, item, "Who knows").failure == "no answer"
    assert mmlu.weights({"accuracy": 1}) == {"accuracy": 1.0}


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("So $\\boxed{\\text{(B)}}$, not A", "B"),
        ("The answer is A. On reflection, the correct answer would be option (D): x.", "D"),
        ("**Answer:**\n\n**C**. four", "C"),
        ("I would choose B over C", "B"),
        ("The answer is A because C is wrong.", "A"),
        ("The answer is not A; the answer: C", "C"),
        ("A is wrong, but B is correct.", "B"),
        ("Option A isn't right. (C) four, would be the best answer", "C"),
        ("B. London, unlike C", "B"),
        ("(D) as A and B are false", "D"),
        ("d", "D"),
        ("(b).", "B"),
        ("A common mistake. Here C fits", "C"),
        ("The answer isn't B", None),
        ("A, B or C", None),
        ("greater  LONDON", "D"),
        ("It is London.", "B"),
        ("Paris or London", None),
        ("In C++, D = 7", None),
        ("It is 4", "C"),
        ("-4 or 4.5 or 14 or 0.4", None),
        ("", None),
    ],
)
def test_letter_is_read_from_free_text(text: str, letter: str | None):
    assert find_letter(text, ["Paris.", "London", "4", "Greater London"]) == letter


LOGIC = ["(E ⊃ F) ∨ (~S ≡ C)", "A • B", "(~C ≡ S)", "(E ⊃ F) ∨ (~C ≡ S)"]
HEPATITIS = ["Hepatitis B", "Hepatitis C", "Both A and B are right.", "$3k (A) * B"]


@pytest.mark.parametrize(
    ("text", "choices", "letter"),
    [
        ("The answer is: (E ⊃ F) ∨ (~C ≡ S)", LOGIC, "D"),
        ("(E ⊃ F) ∨ (~S ≡ C).", LOGIC, "A"),
        ("I think that A • B follows.", LOGIC, "B"),
        ("The answer is: A", LOGIC, "A"),
        ("This is hepatitis  C.", HEPATITIS, "B"),
        ("The answer is Hepatitis B, not Hepatitis C.", HEPATITIS, "A"),
        ("Hepatitis B causes it.", HEPATITIS, "A"),
        ("Both A and B are right", HEPATITIS, "C"),
        ("The answer is **$3k (A) * B**", HEPATITIS, "D"),
        ("The answer is London. Option A is smaller.", ["Paris", "London", "Rome", "Bonn"], "B"),
        ("The answer is B", ["B", "A", "O", "AB"], "B"),
        ("The answer is C, as 4 is too few", ["4", "5", "6", "7"], "C"),
        ("The answer is 10, although D has more", ["10", "11", "12", "13"], "A"),
    ],
)
def test_a_choice_quoted_in_full_wins_over_a_letter_inside_it(
    text: str, choices: list[str], letter: str
):
    assert find_letter(text, choices) == letter


def test_letter_of_choices_that_are_the_same_is_none():
    assert find_letter("It is 4", ["4", "4", "", "6"]) is None


@settings(deadline=None)
@given(st.text(), st.lists(st.text(), min_size=4, max_size=4), st.sampled_from("ABCD"))
def test_stated_letter_is_found_behind_any_text(text: str, choices: list[str], letter: str):
    assert find_letter(text, choices) in (None, *"ABCD")
    if "boxed" not in text:
        assert find_letter(f"{text}\nThe answer is ({letter}).", choices) == letter
