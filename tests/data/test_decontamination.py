"""Decontamination: what counts as a hit, which files are read, and a slow plain version."""

import gzip
import json
import pickle
import re
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.data.decontamination import Benchmarks

STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
QUESTION = (
    "Janet's ducks lay 16 eggs per day. She eats three for breakfast every morning and bakes "
    "muffins for her friends every day with four."
)
SHORT = "Write a function to find the longest common subsequence."  # nine words


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def read(directory: Path, **files: str) -> Benchmarks:
    """Benchmarks of files whose names have __ for a slash and _ before the suffix."""
    for name, content in files.items():
        stem, _, suffix = name.replace("__", "/").rpartition("_")
        path = directory / f"{stem}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8", newline="")
    return Benchmarks.read(directory)


def of(directory: Path, *questions: str) -> Benchmarks:
    return read(directory, set_jsonl=lines(*({"question": question} for question in questions)))


def words(count: int, start: int = 0) -> str:
    """So many words, no two alike."""
    letters = "abcdefghijklmnopqrstuvwxyz"
    numbers = range(start, start + count)
    return " ".join(f"w{letters[n // 26]}{letters[n % 26]}" for n in numbers)


def test_a_question_in_the_text_is_a_hit_that_names_its_place(tmp_path):
    benchmarks = of(tmp_path, words(20), QUESTION)
    assert benchmarks.hit(f"Solve: {QUESTION} Thanks.") == "set.jsonl:2"
    assert benchmarks.hit("Something else altogether, " + words(40, 100)) is None
    assert benchmarks.hit("") is None


@pytest.mark.parametrize("before", range(15))
def test_thirteen_words_are_a_hit_and_twelve_are_none_wherever_they_stand(before, tmp_path):
    benchmarks = of(tmp_path, words(30))
    around = words(before, 200), words(9, 300)
    assert benchmarks.hit(f"{around[0]} {words(13, 8)} {around[1]}") == "set.jsonl:1"
    assert benchmarks.hit(f"{around[0]} {words(12, 8)} {around[1]}") is None
    assert benchmarks.hit(f"{around[0]} {words(13, 8)}") == "set.jsonl:1"


@pytest.mark.parametrize(
    "text",
    [
        QUESTION.upper(),
        QUESTION.replace(" ", "\n -- "),
        QUESTION.replace("'", "\u2019"),
        QUESTION.replace("fo", "\uff46\uff4f"),  # full-width letters are letters
        QUESTION.replace("day. She", "day _ She"),
    ],
)
def test_case_punctuation_and_width_do_not_matter(text, tmp_path):
    assert of(tmp_path, QUESTION).hit(text) == "set.jsonl:1"


def test_letters_with_marks_are_the_same_in_either_normal_form(tmp_path):
    question = "Où est né l'écrivain français " + words(10)
    benchmarks = of(tmp_path, unicodedata.normalize("NFC", question))
    assert benchmarks.hit(unicodedata.normalize("NFD", question)) == "set.jsonl:1"
    assert benchmarks.hit(question.replace("é", "e")) is None


@pytest.mark.parametrize("before", range(6))
def test_a_short_question_is_a_hit_only_whole(before, tmp_path):
    benchmarks = of(tmp_path, SHORT)
    assert benchmarks.hit(f"{words(before)} {SHORT} {words(3, 50)}") == "set.jsonl:1"
    assert benchmarks.hit(f"{words(before)} {SHORT.replace('longest', 'shortest')}") is None
    assert benchmarks.hit(SHORT.removesuffix("subsequence.")) is None


def test_a_question_under_eight_words_is_not_looked_for(tmp_path):
    benchmarks = of(tmp_path, "What is the capital of France?", QUESTION)
    assert benchmarks.hit("What is the capital of France?") is None


@pytest.mark.parametrize(("times", "evidence"), [(5, True), (6, False)])
def test_what_many_questions_share_is_no_evidence(times, evidence, tmp_path):
    template = words(20)
    rows = [f"{template} {words(15, 100 + 20 * n)}" for n in range(times)]
    benchmarks = of(tmp_path, *rows, *(words(15, 300 + 20 * n) for n in range(10)))
    assert (benchmarks.hit(template) is not None) == evidence
    assert benchmarks.hit(words(15, 160)) == "set.jsonl:4"


def test_a_question_that_repeats_itself_is_no_template(tmp_path):
    benchmarks = of(tmp_path, " ".join([words(14)] * 7), words(15, 100))
    assert benchmarks.hit(words(14)) == "set.jsonl:1"


def test_a_template_of_one_file_is_evidence_from_another(tmp_path):
    rows = [{"question": f"{words(20)} {words(15, 100 + 20 * n)}"} for n in range(6)]
    benchmarks = read(tmp_path, a_jsonl=lines(*rows), b_jsonl=lines({"question": words(20)}))
    assert benchmarks.hit(words(20)) == "b.jsonl:1"


def test_what_most_of_a_few_questions_share_is_no_evidence(tmp_path):
    template = words(14)
    rows = [f"{template} {words(15, 100 + 20 * n)}" for n in range(3)]
    assert of(tmp_path, *rows).hit(template) is None
    assert of(tmp_path, *rows, *(words(15, 400 + 20 * n) for n in range(3))).hit(template)


def test_formulas_and_rows_of_numbers_are_no_evidence_beside_prose(tmp_path):
    numbers = " ".join(map(str, range(100, 120)))
    formula = "dp[i][j] = max(dp[i-1][j], dp[i][j-1]) if a[i] else dp[j]"
    benchmarks = of(tmp_path, f"{QUESTION} {numbers} {formula}")
    assert benchmarks.hit(numbers) is None
    assert benchmarks.hit(f"x = 1; {formula}") is None
    assert benchmarks.hit(QUESTION) == "set.jsonl:1"


def test_a_question_of_formulas_alone_is_still_found(tmp_path):
    formula = "x^2 + y^2 + 3x - 4y + 5 = 0, x = 1, y = 2, z = 3, t = 7"
    assert of(tmp_path, formula).hit(f"Let {formula}.") == "set.jsonl:1"


MMLU = (
    f'"{QUESTION}\r\nWhich?","None",None,"1, 2",4,A\r\n{SHORT},a,b,c,d,D\r\n'  # cells with newlines
)
TEVAL = {
    "query_0_1": {
        "meta": {"API_list": ["a"]},
        "origin_prompt": [
            {"role": "system", "content": "You have access to the following API: " + words(30)},
            {"role": "user", "content": QUESTION},
        ],
    }
}
FILES = [
    ("gsm8k__test_jsonl", lines({"question": QUESTION, "answer": "18"}), "gsm8k/test.jsonl:1"),
    ("math__test_jsonl", lines({"problem": QUESTION, "solution": ""}), "math/test.jsonl:1"),
    ("math__algebra__7_json", json.dumps({"problem": QUESTION}, indent=4), "math/algebra/7.json"),
    ("mbpp_jsonl", "\n" + lines({"text": QUESTION, "code": "x"}), "mbpp.jsonl:2"),
    ("mbpp_json", json.dumps([{"prompt": "x"}, {"prompt": QUESTION}]), "mbpp.json:2"),
    ("mmlu__test_csv", MMLU, "mmlu/test.csv:1"),
    ("set_csv", f'id,question\r\n7,"{QUESTION}"\r\n', "set.csv:2"),
    ("mt__question_jsonl", lines({"question_id": 81, "turns": ["Hi", QUESTION]}), None),
    ("teval__plan_json", json.dumps(TEVAL), "teval/plan.json:query_0_1"),
    ("plain_txt", f"\n{QUESTION}\n", "plain.txt:2"),
    ("bom_jsonl", "\ufeff" + lines({"question": QUESTION}), "bom.jsonl:1"),
]


@pytest.mark.parametrize(("name", "content", "where"), FILES, ids=[name for name, _, _ in FILES])
def test_every_layout_is_read(name, content, where, tmp_path):
    assert read(tmp_path, **{name: content}).hit(QUESTION) == (where or "mt/question.jsonl:1")


def test_gzipped_files_are_read(tmp_path):
    with gzip.open(tmp_path / "HumanEval.jsonl.gz", "wt") as file:
        file.write(lines({"task_id": "HumanEval/0", "prompt": QUESTION, "test": "x"}))
    assert Benchmarks.read(tmp_path).hit(QUESTION) == "HumanEval.jsonl.gz:1"


def test_the_system_text_of_a_prompt_and_choices_are_no_questions(tmp_path):
    benchmarks = read(tmp_path, teval_json=json.dumps(TEVAL), mmlu_csv=MMLU)
    assert benchmarks.hit("You have access to the following API: " + words(30)) is None
    assert benchmarks.hit(SHORT) == "mmlu.csv:2"


def test_of_mbpp_the_rows_to_train_on_are_no_questions(tmp_path):
    rows = [
        {"task_id": task, "text": words(15, 20 * n), "test_list": []}
        for n, task in enumerate((10, 11, 510, 511))
    ]
    benchmarks = read(tmp_path, mbpp_jsonl=lines(*rows))
    found = [benchmarks.hit(row["text"]) for row in rows]
    assert found == [None, "mbpp.jsonl:2", "mbpp.jsonl:3", None]


def test_files_without_a_question_are_named(tmp_path):
    benchmarks = read(
        tmp_path,
        answers_jsonl=lines({"answer_id": 1, "choices": [QUESTION]}),
        judge_jsonl=lines({"prompt_template": QUESTION}),
        scores_csv="Model,Score\na,1\n",
        README_md=QUESTION,
        set_jsonl=lines({"question": QUESTION}),
    )
    assert benchmarks.skipped == ("README.md", "answers.jsonl", "judge.jsonl", "scores.csv")
    assert benchmarks.questions == 1


@pytest.mark.parametrize(
    ("files", "match"),
    [
        ({"notes_md": "x"}, "no question in"),
        ({"set_jsonl": '{"question": "q"}\n{"question": '}, r"set\.jsonl"),
        ({"set_json": "[1, "}, r"set\.json"),
        ({"set_gz": "x", "set.jsonl_gz": "no gzip"}, r"set\.jsonl\.gz"),
    ],
)
def test_what_cannot_be_used_is_refused_in_one_line(files, match, tmp_path):
    with pytest.raises(UserError, match=match) as caught:
        read(tmp_path, **files)
    assert "\n" not in str(caught.value)


def test_a_directory_that_is_not_there_is_refused(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        Benchmarks.read(tmp_path / "nowhere")


def test_the_fingerprint_tells_the_questions(tmp_path):
    one, same, other = (
        of(tmp_path / name, question)
        for name, question in (("a", QUESTION), ("b", QUESTION), ("c", QUESTION + " Why?"))
    )
    for name in "abc":
        (tmp_path / name).mkdir(exist_ok=True)
    assert one.fingerprint == same.fingerprint != other.fingerprint


def test_benchmarks_can_be_sent_to_another_process(tmp_path):
    benchmarks = pickle.loads(pickle.dumps(of(tmp_path, QUESTION, SHORT)))
    assert benchmarks.hit(QUESTION) == "set.jsonl:1"
    assert benchmarks.hit(SHORT) == "set.jsonl:2"


def plain_words(text: str) -> tuple[str, ...]:
    text = unicodedata.normalize("NFKC", text).lower()
    return tuple(re.findall(r"[^\W_]+", text))


def plain_runs(words: tuple[str, ...]) -> set[tuple[str, ...]]:
    if len(words) < 13:
        return {words} if len(words) >= 8 else set()
    return {words[start : start + 13] for start in range(len(words) - 12)}


def plain_evidence(questions: list[str]) -> set[tuple[str, ...]]:
    """The runs of words of one file that count, from the rule as docs/decontamination.md has it."""
    runs = []
    for question in map(plain_words, questions):
        every = plain_runs(question)
        telling = {
            run for run in every if len({w for w in run if len(w) > 2 and not w.isdigit()}) >= 6
        }
        runs.append(telling or every)
    counts = {run: sum(run in others for others in runs) for own in runs for run in own}
    return {run for run, n in counts.items() if n <= 5 and not (n > 2 and 2 * n > len(questions))}


VOCABULARY = ["the", "Egg", "how", "many", "x", "1", "ducks", "l\u00e9a", "22", "are,", "LAY", "-"]
TEXT_WORD = st.sampled_from(VOCABULARY)
TEXT = st.lists(TEXT_WORD, max_size=15)


@STEADY
@given(st.lists(st.lists(TEXT_WORD, min_size=8, max_size=30), min_size=1, max_size=8), st.data())
def test_hits_are_those_of_a_slow_plain_version(tmp_path_factory, drawn, data):
    questions = [" ".join(question) for question in drawn]
    # A text that holds part of a question, so that hits are not rare.
    source = data.draw(st.sampled_from(drawn))
    first = data.draw(st.integers(0, max(0, len(source) - 12)))
    part = source[first : first + data.draw(st.integers(8, 20))]
    text = " ".join([*data.draw(TEXT), *part, *data.draw(TEXT)])
    found = plain_words(text)
    in_text = {found[start : start + size] for size in range(8, 14) for start in range(len(found))}
    hit = of(tmp_path_factory.mktemp("benchmarks"), *questions).hit(text)
    assert (hit is not None) == bool(plain_evidence(questions) & in_text)
    if hit:
        number = int(hit.removeprefix("set.jsonl:"))
        assert plain_runs(plain_words(questions[number - 1])) & in_text
