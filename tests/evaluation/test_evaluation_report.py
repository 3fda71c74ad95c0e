"""The comparing report of small made-up directories of results, against figures by hand."""

import json
import re
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from moi_jax.common.errors import UserError
from moi_jax.evaluation import bootstrap
from moi_jax.evaluation.reports.charts import bars, radar
from moi_jax.evaluation.reports.comparison import PUBLISHED, compare, read_evaluations
from moi_jax.evaluation.reports.items import Value, values
from moi_jax.evaluation.reports.report import write_report
from moi_jax.evaluation.tasks import TASKS
from moi_jax.reports.page import PALETTE

PROMPT = "You are a helpful assistant."
RIGHT = {"gsm8k": [1, 0, 0, 1], "mmlu": [1, 0, 1, 0], "math": [0, 0, 0, 1]}
BETTER = {"gsm8k": [1, 1, 0, 1], "mmlu": [0, 0, 1, 1], "math": [1, 1, 1, 1]}


def made_by(name: str, **changes) -> dict:
    return {
        **{"name": name, "parameters": name, "chat_template": "chatml", "template_hash": "ab"},
        **{"system_prompt": PROMPT, "dtype": "float32", **changes},
    }


def sample(task: str, n: int, right: float) -> dict:
    return {
        **{"id": f"{task}/{n}", "group": "even" if n % 2 else "odd", "follow_ups": []},
        "messages": [{"role": "user", "content": f"Is {n} < 3 & why?"}],
        **{
            "answers": [f"<script>{task} {n} is {right}"],
            "finishes": ["stop"],
            "gold": f"gold {n}",
        },
        **{"log_likelihoods": [], "metrics": {"accuracy": right}, "failure": None},
        "details": {"extracted": [str(right)]},
    }


def result(task: str, values: list[float], **changes) -> dict:
    rows = np.array(values, float)[:, None]
    score = 100 * float(rows.mean())
    interval = list(bootstrap.interval(rows, np.array([100.0])))
    mean = {"mean": score / 100, "items": len(values), "interval": [low / 100 for low in interval]}
    groups = {
        name: {"items": 2, "accuracy": float(rows[start::2].mean())}
        for name, start in (("even", 1), ("odd", 0))
    }
    settings = {"system_prompt": PROMPT, "temperature": None, "shots": 0, "limit": None}
    settings |= {"samples": 1, "max_new_tokens": 512, "context": 2048}
    return {
        **{"score": score, "interval": interval, "items": len(values), "complete": True},
        **{"weights": {"accuracy": 1.0}, "metrics": {"accuracy": mean}, "groups": groups},
        **{"failures": {"no answer": 2}, "skipped": 0, "notes": [f"a note on {task}"]},
        "settings": {**settings, **({"method": "generate"} if task == "mmlu" else {})},
        **changes,
    }


def write(directory: Path, results: dict, samples: dict[str, list[dict]]) -> Path:
    (directory / "samples").mkdir(parents=True)
    (directory / "results.json").write_text(json.dumps(results))
    for task, lines in samples.items():
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        (directory / "samples" / f"{task}.jsonl").write_text(text)
    return directory


def evaluation(directory: Path, right: dict[str, list[int]], **changes) -> Path:
    results = {
        "checkpoint": made_by(directory.name, **changes),
        "tasks": {task: result(task, values) for task, values in right.items()},
        "overall": None,
    }
    samples = {
        task: [sample(task, n, value) for n, value in enumerate(values)]
        for task, values in right.items()
    }
    return write(directory, results, samples)


def edit(directory: Path, task: str, **changes) -> None:
    """Changes a task's results; `settings` is merged into what is there."""
    path = directory / "results.json"
    results = json.loads(path.read_text())
    settings = {**results["tasks"][task]["settings"], **changes.pop("settings", {})}
    results["tasks"][task].update(changes, settings=settings)
    path.write_text(json.dumps(results))


class Page(HTMLParser):
    """Texts of cells, by row; elements that load something; whether all elements are closed."""

    VOID = ("meta", "br", "link", "img", "input")  # never closed

    def __init__(self, path: Path):
        super().__init__()
        self.rows: list[list[str]] = []
        self.loads: list[str] = []
        self.open: list[str] = []
        self.text = ""
        self.feed(path.read_text())
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        names = dict(attrs)
        if tag in {"script", "link", "img", "iframe"} or "src" in names:
            self.loads.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in {"td", "th"}:
            self.rows[-1].append("")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if {"td", "th"} & set(self.open):
            self.rows[-1][-1] += data

    def row(self, name: str) -> list[str]:
        rows = [[" ".join(cell.split()) for cell in row] for row in self.rows]
        return next(row for row in rows if row[0].split()[:1] == [name])


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    return evaluation(tmp_path / "base", RIGHT), evaluation(tmp_path / "tuned", BETTER)


def test_scores_stand_beside_differences_with_intervals(two, tmp_path: Path):
    page = Page(write_report(two, tmp_path / "report.html"))
    _, base, tuned, published = page.row("gsm8k")
    low, high = bootstrap.interval(np.array([[1.0], [0], [0], [1]]), np.array([100.0]))
    assert base == f"50.0{low:.1f} to {high:.1f}"
    assert tuned.startswith("75.0")
    assert tuned.endswith("+25.0 (+0.0 to +75.0)")
    assert published == "50.3"
    assert page.row("mmlu")[2].endswith("+0.0 (−75.0 to +75.0)")
    assert page.row("mmlu")[3] == "55.8"
    assert page.row("math")[3] == "–"
    assert page.row("mean") == ["mean of the seven", "–", "–", ""]
    assert "⚠ tuned" not in page.text


def test_page_stands_alone_and_shows_texts_as_they_are(two, tmp_path: Path):
    path = write_report(two, tmp_path / "deep" / "report.html")
    page = Page(path)
    assert page.loads == []
    assert not re.search(r"https?://|url\(|@import", path.read_text())
    assert "<script>gsm8k 1 is 0" in page.text
    assert "Is 1 < 3 & why?" in page.text
    assert "a note on math" in page.text
    assert page.row("failure:") == ["failure: no answer", "2", "2"]
    assert page.row("even") == ["even", "0.5002 items", "1.0002 items"]
    assert write_report(two, tmp_path / "again.html").read_bytes() == path.read_bytes()


def test_differences_pair_the_items_both_have(two):
    _, tuned = two
    lines = [sample("gsm8k", n, value) for n, value in ((3, 1), (1, 1), (9, 0))]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tuned / "samples" / "gsm8k.jsonl").write_text(text)
    gsm8k = compare(read_evaluations(two))[0]
    assert gsm8k.name == "gsm8k"
    gap = gsm8k.gaps[1]
    assert gap is not None
    assert gap[0] == 50  # of items 1 and 3: 0 and 1 before, 1 and 1 now
    assert gsm8k.warnings[1] == [
        "the items differ, 3 and 4; the difference is over the 2 that both have"
    ]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"shots": 4}, "shots is 4, not 0"),
        ({"system_prompt": None}, f'system prompt is null, not "{PROMPT}"'),
        ({"judge": "gpt-4"}, "ratings by different judges cannot be compared"),
        ({"judge_url": "http://localhost"}, None),
    ],
)
def test_other_settings_are_warned_of(two, tmp_path: Path, settings: dict, told: str | None):
    edit(two[1], "math", settings=settings)
    tasks = {task.name: task for task in compare(read_evaluations(two))}
    assert tasks["gsm8k"].warnings == [[], []]
    text = Page(write_report(two, tmp_path / "report.html")).text
    if told is None:
        assert tasks["math"].warnings == [[], []]
        assert "⚠ tuned" not in text
    else:
        assert [told in warning for warning in tasks["math"].warnings[1]] == [True]
        assert f"⚠ tuned against base: {tasks['math'].warnings[1][0]}" in text


def test_other_prompts_and_templates_of_the_model_are_warned_of(tmp_path: Path):
    directories = [
        evaluation(tmp_path / "a", RIGHT),
        evaluation(tmp_path / "b", BETTER, template_hash="cd", dtype="bfloat16"),
    ]
    for task in compare(read_evaluations(directories)):
        assert task.warnings[1] == [
            'template hash is "cd", not "ab"',
            'dtype is "bfloat16", not "float32"',
        ]


def test_other_data_is_warned_of(two):
    lines = [sample("math", n, value) for n, value in enumerate(BETTER["math"])]
    lines[2]["gold"] = "another"
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (two[1] / "samples" / "math.jsonl").write_text(text)
    [math] = [task for task in compare(read_evaluations(two)) if task.name == "math"]
    [warning] = math.warnings[1]
    assert "question or gold answer differ in 1 of" in warning


@pytest.mark.parametrize(
    "changes",
    [
        {"complete": False},
        *(
            {"settings": {key: value}}
            for key, value in [
                ("shots", 4),
                ("temperature", 0.7),
                ("samples", 10),
                ("max_new_tokens", 16),
                ("context", 64),
            ]
        ),
    ],
)
def test_published_figures_are_for_the_same_protocol_only(two, tmp_path: Path, changes: dict):
    for directory in two:
        edit(directory, "gsm8k", **{key: value for key, value in changes.items()})
    page = Page(write_report(two, tmp_path / "report.html"))
    assert page.row("gsm8k")[3] == "–"
    assert page.row("mmlu")[3] == "55.8"
    assert "README of github.com/QwenLM/Qwen" in page.text


@pytest.mark.parametrize("changes", [{"chat_template": "llama3"}, {"system_prompt": None}])
def test_published_figures_are_for_the_same_template_and_prompt_only(tmp_path: Path, changes: dict):
    evaluations = read_evaluations([evaluation(tmp_path / "a", RIGHT, **changes)])
    assert [task.published for task in compare(evaluations)] == [None, None, None]


def test_published_figures_are_for_the_length_that_the_tasks_have():
    for name, (_, protocol) in PUBLISHED.items():
        module, kind = TASKS[name]
        task = getattr(import_module(f"moi_jax.evaluation.tasks.{module}"), kind)
        assert protocol["max_new_tokens"] == task.max_new_tokens


def test_examples_are_items_on_which_checkpoints_disagree(two):
    tasks = {task.name: task for task in compare(read_evaluations(two))}
    assert [samples[0]["id"] for samples in tasks["mmlu"].examples] == ["mmlu/3", "mmlu/0"]
    assert [samples[1]["metrics"]["accuracy"] for samples in tasks["mmlu"].examples] == [1, 0]
    [alone] = [t for t in compare(read_evaluations(two[:1])) if t.name == "math"]
    assert [samples[0]["id"] for samples in alone.examples] == ["math/0", "math/1", "math/2"]


def test_tasks_that_only_one_ran_and_that_have_no_score_are_shown(two, tmp_path: Path):
    third = evaluation(tmp_path / "third", {"mt_bench": [4, 8, 5, 6], "gsm8k": [0, 0, 0, 0]})
    edit(third, "mt_bench", score=None, interval=None, weights=None, complete=False)
    (third / "samples" / "gsm8k.jsonl").unlink()
    path = write_report([*two, third], tmp_path / "report.html")
    page = Page(path)
    assert page.row("mt_bench")[:4] == ["mt_bench", "–", "–", "–partial, 4 items"]
    assert page.row("math")[3] == "–"
    assert page.row("gsm8k")[3] == "0.00.0 to 0.0⚠"
    assert "third against base: there are no samples to compare item by item" in page.text
    assert page.text.count("Items on which they disagree") == 3
    assert page.text.count("Items that did worst") == 1
    assert [task.name for task in compare(read_evaluations([*two, third]))] == [
        *("gsm8k", "math", "mmlu", "mt_bench")
    ]
    assert path.read_text().count("<svg") == 1  # no radar: one task alone was run by all


def test_directories_of_one_name_are_told_apart(tmp_path: Path):
    paths = [evaluation(tmp_path / run / "out", RIGHT) for run in ("a", "b")]
    evaluations = read_evaluations([*paths, paths[0]])
    assert [one.name for one in evaluations] == ["a/out", "b/out"]


def test_charts_have_bars_to_scale_whiskers_and_a_radar_of_three_tasks(two, tmp_path: Path):
    svg = str(bars(["x < y"], [[(50.0, (40.0, 60.0)), None, (100.0, None)]]))
    widths = [float(width) for width in re.findall(r'<rect [^>]*width="([\d.]+)"', svg)]
    assert widths[1] == pytest.approx(2 * widths[0])
    assert "x &lt; y" in svg
    assert svg.count('stroke="currentColor"') == 3
    assert [shade in svg for shade in PALETTE[:3]] == [True, False, True]
    web = str(radar(["a", "b", "c"], [[100, 0, 100]]))
    drawn = re.findall(r'points="([^"]*)" stroke="#', web)
    rings = re.findall(r'points="([^"]*)" fill="none"', web)
    assert drawn[0].split()[0] == rings[-1].split()[0]
    assert drawn[0].split()[1] == "260.0,160.0"
    assert write_report(two, tmp_path / "report.html").read_text().count("<svg") == 2


@pytest.mark.parametrize("damage", ["missing", "torn", "samples"])
def test_damaged_directories_are_named(two, tmp_path: Path, damage: str):
    path = two[1] / "results.json"
    if damage == "missing":
        path.unlink()
    elif damage == "torn":
        path.write_text('{"checkpoint"')
    else:
        path = two[1] / "samples" / "math.jsonl"
        path.write_text('{"id": 1}\n{"i')
    with pytest.raises(UserError, match=re.escape(str(path))):
        write_report(two, tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


PROGRAM = "def f(x):\n    return x < 2\n"


def code_sample(n: int, failure: str | None, **details) -> dict:
    return {
        **sample("humaneval", n, float(failure is None)),
        "gold": {"entry_point": "f", "test": "def check(f):\n    assert f(1)\n"},
        "outcome": failure or "right",
        "failure": failure,
        "details": {"code": PROGRAM, "failure": failure, "error": "", **details},
    }


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Four programs: one right, two wrong, one cut; the results are as `summarize` gives them."""
    samples = [
        code_sample(0, None),
        code_sample(1, "wrong", error="AssertionError in: assert f(3) == 1"),
        code_sample(2, "wrong", error="f(4) is False, not True"),
        code_sample(3, "error", error="NameError: name 'g' is not defined"),
    ]
    outcomes = {"wrong": 2, "right": 1, "error": 1}
    found = result("humaneval", [1, 0, 0, 0], outcomes=outcomes)
    found["failures"] = {"wrong": 2, "error": 1, "cut at its length": 1}
    results = {"checkpoint": made_by("coder"), "tasks": {"humaneval": found}, "overall": None}
    return write(tmp_path / "coder", results, {"humaneval": samples})


def test_a_page_has_every_item_with_why_before_program_before_prompt(programs, tmp_path: Path):
    write_report([programs], tmp_path / "report.html")
    page = Page(tmp_path / "items" / "humaneval.html")
    assert page.loads == []
    texts = page.text.split("humaneval/")[1:]
    assert len(texts) == 4
    for text, why in zip(
        texts,
        ("right", "assert f(3) == 1", "f(4) is False, not True", "name 'g' is not defined"),
        strict=True,
    ):
        places = [text.index(part) for part in (why, PROGRAM.strip(), "< 3 & why?")]
        assert places == sorted(places)
    assert "entry_point: f" in page.text
    assert "def check(f):\n    assert f(1)\n" in page.text


def test_items_are_filtered_by_outcomes_that_add_up(programs, tmp_path: Path):
    report = write_report([programs], tmp_path / "report.html")
    text = (tmp_path / "items" / "humaneval.html").read_text()
    labels = re.findall(r'id="(f0-\d)"> (\w+) (\d+)</label>', text)
    assert labels == [("f0-0", "wrong", "2"), ("f0-1", "right", "1"), ("f0-2", "error", "1")]
    classes = re.findall(r'<article class="sample (f0-\d)">', text)
    assert classes == ["f0-1", "f0-0", "f0-0", "f0-2"]
    for name, _, _ in labels:
        assert f"body:has(#{name}:checked) .sample:not(.{name}) {{ display: none; }}" in text
    page = Page(report)
    rows = {row[0]: row[1] for row in page.rows if row and row[0].startswith(("outcome", "among"))}
    assert rows == {
        "outcome: wrong": "2",
        "outcome: right": "1",
        "outcome: error": "1",
        "among them: cut at its length": "1",
    }
    assert text.count('href="../report.html#humaneval"') == 1
    assert report.read_text().count('href="items/humaneval.html"') == 2  # summary and section


def test_gold_and_what_was_found_are_readable():
    assert values({"letter": "B", "choices": ["2 x", "x^2"]}) == [
        Value("letter", "B", False),
        Value("choices", "2 x, x^2", False),
    ]
    assert values(["18", None]) == [Value("", "18, none", False)]
    assert values({"test": "a\nb"}) == [Value("test", "a\nb", True)]
    long = ["x" * 60, "y" * 60]
    assert values(long) == [Value("", "\n".join(long), True)]


def test_the_table_names_all_seven(two, tmp_path: Path):
    page = Page(write_report(two, tmp_path / "report.html"))
    names = [row[0] for row in page.rows if row][1:8]
    assert sorted(names) == sorted(TASKS)
    assert page.row("humaneval") == ["humaneval", "not run", "not run", ""]


def test_methods_and_provenance_are_shown_where_results_have_them(two, tmp_path: Path):
    run = {
        **{"date": "2026-01-02T03:04:05+00:00", "seconds": 61.5, "command": "python -m x"},
        **{"versions": {"moi_jax": "1.2", "jax": "0.10", "code": "cc"}, "commit": "c0ffee"},
        **{"device": "2 x TPU v5p (tpu)", "base": "Qwen/Qwen2.5-7B@77", "values": "f00d"},
        "data": {"test.jsonl": "aa", "dev/ (57 files)": "bb"},
    }
    edit(two[0], "gsm8k", run=run, protocol="gsm8k: 4 items.")
    page = Page(write_report(two, tmp_path / "report.html"))
    assert "on 2 x TPU v5p (tpu) with moi_jax 1.2 (commit c0ffee) and jax 0.10." in page.text
    assert "which began from Qwen/Qwen2.5-7B@77, is f00d." in page.text
    assert "gsm8k: 4 items." in page.text
    assert page.row("data")[1] == "test.jsonl aadev/ (57 files) bb"
    assert page.row("command")[1:] == ["python -m x", "–"]
