"""T-Eval: files to conversations, the published rules, the score and what is said beside it."""

import ast
import json
import runpy
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Response, Score
from moi_jax.evaluation.tasks import make_task
from moi_jax.evaluation.tasks.teval import TEval
from moi_jax.text.conversations import Message

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "teval.py"

PROMPT = [{"role": "system", "content": "You have APIs."}, {"role": "user", "content": "Help."}]
PLAN = [
    {"id": 0, "prev": [], "name": "Bnb.search", "args": {"place": "Rome"}},
    {"id": 1, "prev": [0], "name": "Bnb.price", "args": {"id": 7}},
    {"id": 2, "prev": [1], "name": "FinishAction", "args": {}},
]
KEYS = {"thought": "goal", "action": "tool", "args": "input"}
MARKS = {
    "thought_start": "Goal (why): ", "thought_end": "\n", "action_start": "Tool: ",
    "action_end": "\n", "args_start": "Args: ", "args_end": "\n",
}  # fmt: skip
CALL = {"action": "Bnb.search", "args": {"place": "Rome", "guests": 2}}
STEP = {"thought": "I need the price.", "name": "Bnb.price", "args": {"id": 7, "day": "May 1"}}


def record(**fields: Any) -> dict[str, Any]:
    return {"origin_prompt": PROMPT, **fields}


def instruct(form: str) -> dict[str, Any]:
    template = KEYS if form == "json" else MARKS
    return record(template=template, meta_data={"response_format": form}, ground_truth=CALL)


def review(answer: str) -> dict[str, Any]:
    meta = {"response_format": "str"}
    return record(template="", meta_data=meta, ground_truth={"answer": answer, "thought": ""})


def plan(form: str, truth: Any = PLAN) -> dict[str, Any]:
    meta = {"prompt_type": form, "API_list": ["Bnb.price", "Bnb.search"]}
    return record(meta=meta, ground_truth=truth)


ALL = {
    "instruct_v2": {"a": instruct("json"), "b": instruct("string")},
    "plan_json_v2": {"a": plan("json")},
    "plan_str_v2": {"a": plan("str")},
    "reason_str_v2": {"a": record(ground_truth=STEP)},
    "retrieve_str_v2": {"a": record(ground_truth=STEP)},
    "understand_str_v2": {"a": record(ground_truth={**STEP, "args": "May 1"})},
    "reason_retrieve_understand_json_v2": {"a": record(ground_truth=STEP)},
    "review_str_v2": {"a": review("B")},
}
GOLD = {
    "instruct_v2/a": json.dumps({"goal": "", "tool": "Bnb.search", "input": CALL["args"]}),
    "instruct_v2/b": f"Goal (why): to see\nTool: Bnb.search\nArgs: {CALL['args']}",
    "plan_json_v2/a": json.dumps(PLAN),
    "plan_str_v2/a": "Use Bnb.search for {'place': 'Rome'}\nUse Bnb.price for {'id': 7}",
    "reason_str_v2/a": STEP["thought"],
    "retrieve_str_v2/a": "The tool is Bnb.price",
    "understand_str_v2/a": "'May 1'",
    "reason_retrieve_understand_json_v2/a": f"```json\n{json.dumps(STEP)}\n```",
    "review_str_v2/a": "Answer: B",
}


def by_letters(texts: list[str]) -> np.ndarray:
    """A tiny embedder: how often each byte occurs."""
    return np.array([np.bincount(list(text.encode()), minlength=256) for text in texts], float)


def write(root: Path, files: dict[str, Any]) -> Path:
    (root / "teval").mkdir(parents=True, exist_ok=True)
    for name, records in files.items():
        (root / "teval" / f"{name}.json").write_text(json.dumps(records))
    return root


def task(root: Path, embedder: Any = by_letters, **options: Any) -> TEval:
    return TEval(BenchmarkOptions(root, root, **options), embedder)


def answer(benchmark: TEval, texts: dict[str, str]) -> dict[str, Score]:
    """id -> score, of the items that have a text."""
    items = [item for item in benchmark.load() if item.id in texts]
    answered = [(item, Response((texts[item.id],), ("stop",))) for item in items]
    scores = benchmark.score(answered)
    return {item.id: score for item, score in zip(items, scores, strict=True)}


@pytest.fixture
def score(tmp_path: Path):
    """A record of a subtask, and a text -> the score of the text."""

    def of(name: str, fields: dict[str, Any], text: str, **options: Any) -> Score:
        root = write(tmp_path / str(len(list(tmp_path.iterdir()))), {f"{name}_v2": {"x": fields}})
        return answer(task(root, **options), {f"{name}_v2/x": text})[f"{name}_v2/x"]

    return of


# Files and conversations


def test_every_subtask_file_is_loaded_and_named_by_file_and_record(tmp_path: Path):
    write(tmp_path, {**ALL, "api_descrip": [], "notes": 3})
    items = {item.id: item for item in task(tmp_path).load()}
    assert items.keys() == GOLD.keys()
    assert items["instruct_v2/b"].group == "instruct_str"
    assert items["plan_json_v2/a"].group == "plan_json"
    group = items["reason_retrieve_understand_json_v2/a"].group
    assert group == "reason_retrieve_understand_json"


@pytest.mark.parametrize(
    ("stem", "group"),
    [
        ("plan_json_v1", "plan_json"),
        ("plan_json_zh_v1", "plan_json_zh"),
        ("plan_json_v2_zh", "plan_json_zh"),
        ("rru_json_v2", "reason_retrieve_understand_json"),
        ("reason_json_v1", "reason_json"),
    ],
)
def test_names_of_files_tell_subtask_form_language_and_version(
    tmp_path: Path, stem: str, group: str
):
    fields = plan("json") if group.startswith("plan") else record(ground_truth=STEP)
    benchmark = task(write(tmp_path, {stem: {"k": fields}}))
    assert [(item.id, item.group) for item in benchmark.load()] == [(f"{stem}/k", group)]
    assert benchmark.settings()["data_version"] == ("v1" if "v1" in stem else "v2")


TURNS = [
    ("system", "APIs"), ("user", "Q"), ("assistant", "A"), ("function", "F"), ("user", "U"),
    ("assistant", "B"), ("system", "S"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("system", "head", "block"),
    [
        ("default_then_user", [("user", "APIs\nQ")], True),
        ("as_user", [("user", "APIs\nQ")], False),
        ("as_system", [("system", "APIs"), ("user", "Q")], True),
    ],
)
def test_functions_are_users_neighbours_are_merged_and_the_system_text_goes_where_it_is_asked(
    tmp_path: Path, system: str, head: list[tuple[str, str]], block: bool
):
    turns = [{"role": role, "content": content} for role, content in TURNS]
    write(tmp_path, {"review_str_v1": {"r": {**review("A"), "origin_prompt": turns}}})
    (item,) = task(tmp_path, teval_system=system).load()
    rest = [("assistant", "A"), ("user", "F\nU"), ("assistant", "B"), ("user", "S")]
    assert item.messages == tuple(Message(*turn) for turn in head + rest)
    assert item.system_block is block


def test_stop_strings_are_the_published_ones():
    assert set(TEval.stop_strings) == {
        "<eoa>", "<|im_end|>", "\nuser", "\nassistant", "[INST]",
    }  # fmt: skip
    assert TEval.max_new_tokens == 512


def test_a_directory_without_files_says_what_to_put_where(tmp_path: Path):
    with pytest.raises(UserError, match=r"teval has no file of T-Eval; .*plan_json_v1\.json"):
        task(tmp_path).load()


@pytest.mark.parametrize(
    "names", [("plan_json_v1", "plan_json_v2"), ("instruct_v2", "instruct_json_v1")]
)
def test_two_versions_of_a_subtask_are_refused(tmp_path: Path, names: tuple[str, str]):
    write(tmp_path, {name: {} for name in names})
    with pytest.raises(UserError, match=r"two versions of the same subtask"):
        task(tmp_path).load()


@pytest.mark.parametrize(
    ("name", "fields", "problem"),
    [
        ("plan_json", 3, "origin_prompt is missing"),
        ("review_str", {**review("A"), "template": ["\ud83d"]}, r"a text has '\\ud83d', half"),
        ("plan_json", record(ground_truth=3), "ground_truth is not a list or str"),
        ("plan_json", plan("json", PLAN[2:]), "ground_truth must be a plan"),
        ("plan_json", plan("json", [{"id": 0, "name": "a"}]), "ground_truth must be a plan"),
        ("plan_str", record(ground_truth=PLAN), "meta.API_list is missing"),
        ("review_str", review("F"), "ground_truth.answer is 'F'"),
        ("review_str", {**review("A"), "origin_prompt": []}, "origin_prompt must end"),
        ("review_str", {**review("A"), "origin_prompt": [{"role": "tool"}]}, r"origin_prompt\[0\]"),
        ("instruct", record(), "meta_data.response_format is missing"),
        ("instruct", {**instruct("json"), "template": MARKS}, "template.thought is missing"),
        ("instruct", instruct("xml"), "meta_data.response_format is 'xml'"),
        ("reason_str", record(ground_truth={"name": "x"}), "ground_truth.thought is missing"),
        ("understand_str", record(ground_truth="no dict"), "ground_truth.args is missing"),
    ],
)
def test_a_malformed_record_is_named_by_file_and_key(
    tmp_path: Path, name: str, fields: Any, problem: str
):
    write(tmp_path, {f"{name}_v1": {"key 1": fields}})
    with pytest.raises(UserError, match=rf"{name}_v1\.json: record 'key 1': {problem}"):
        task(tmp_path).load()


def test_a_file_that_is_no_json_object_is_named(tmp_path: Path):
    (write(tmp_path, {}) / "teval" / "plan_json_v1.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"cannot read .*plan_json_v1\.json"):
        task(tmp_path).load()
    write(tmp_path, {"plan_json_v1": [PLAN]})
    with pytest.raises(UserError, match=r"plan_json_v1\.json is not a JSON object"):
        task(tmp_path).load()


# The published rules, subtask by subtask


def test_gold_answers_score_one_everywhere(tmp_path: Path):
    scores = answer(task(write(tmp_path, ALL)), GOLD)
    metrics = {name: value for score in scores.values() for name, value in score.metrics.items()}
    assert metrics == pytest.approx(dict.fromkeys(metrics, 1.0))
    assert metrics.keys() == {
        "instruct_json/format", "instruct_json/args", "instruct_str/format", "instruct_str/args",
        "plan_json/f1", "plan_json/precision", "plan_json/recall",
        "plan_str/f1", "plan_str/precision", "plan_str/recall",
        "reason_str/thought", "retrieve_str/name", "understand_str/args",
        "reason_json/thought", "retrieve_json/name", "understand_json/args", "review_str/answer",
    }  # fmt: skip
    assert {score.failure for score in scores.values()} == {None}


@pytest.mark.parametrize("text", ["", "  \n", "``"])
def test_an_empty_answer_is_worth_nothing_anywhere(tmp_path: Path, text: str):
    scores = answer(task(write(tmp_path, ALL)), dict.fromkeys(GOLD, text))
    assert {value for score in scores.values() for value in score.metrics.values()} == {0}
    assert {score.failure for score in scores.values()} == {"no answer"}


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[TEval, list[Item]]:
    benchmark = task(write(tmp_path_factory.mktemp("all"), ALL))
    return benchmark, benchmark.load()


@settings(deadline=None, max_examples=60)
@given(text=st.text() | st.text(alphabet="[]{}()'\"\\:,.0eE-+xub`j \n", max_size=80))
def test_no_text_breaks_a_scorer_and_samples_can_be_written(
    loaded: tuple[TEval, list[Item]], text: str
):
    benchmark, items = loaded
    for score in benchmark.score([(item, Response((text,), ("stop",))) for item in items]):
        assert all(0 <= value <= 1 for value in score.metrics.values())
        json.dumps(score.details, ensure_ascii=False).encode()


def call(action: Any, args: Any, **more: Any) -> str:
    return json.dumps({"goal": "", "tool": action, "input": args, **more})


@pytest.mark.parametrize(
    ("text", "form", "args"),
    [
        (call("Bnb.search", {"place": "Rome", "guests": 2}), 1, 1),
        (call("Bnb.search", {"place": "Rome", "guests": "2"}), 1, 2 / 3),  # no text is a number
        (call("Bnb.search", {"place": "Rome", "guests": 2, "more": 1}), 1, 1),
        (call("other", {"place": "Rome"}), 1, 1 / 3),
        (call("Bnb.search", "{'place': 'Rome', 'guests': 2}"), 1, 1 / 3),  # args are no object
        ("{'goal': '', 'tool': 'Bnb.search', 'input': {}}", 1, 1 / 3),
        (json.dumps({"tool": "Bnb.search", "input": CALL["args"]}), 0, 0),  # no thought
        ("Here: " + call("Bnb.search", CALL["args"]), 0, 0),  # words around it
        ("[1]", 0, 0),
    ],
)
def test_instruct_json_counts_name_and_equal_args_by_the_templates_keys(
    score: Any, text: str, form: float, args: float
):
    found = score("instruct", instruct("json"), text)
    assert found.metrics == pytest.approx(
        {"instruct_json/format": form, "instruct_json/args": args}
    )
    assert found.failure == (None if form else "not parsed")


@pytest.mark.parametrize(
    ("text", "form", "args"),
    [
        ("Goal (why): a\nb\nTool: Bnb.search\nArgs: {'place': 'Rome', 'guests': 2}", 1, 1),
        ("So. Goal (why): a\nTool:  Bnb.search \nArgs: {'place': 'Rome'}", 1, 2 / 3),
        ("Goal (why): a\nTool: Bnb.search\nArgs: place=Rome", 1, 1 / 3),
        ("Goal (why): a\nTool: Bnb.search", 0, 0),
        ("Tool: Bnb.search\nArgs: {}\nGoal (why): a", 0, 0),
    ],
)
def test_instruct_in_words_is_read_between_the_templates_marks(
    score: Any, text: str, form: float, args: float
):
    found = score("instruct", instruct("string"), text)
    assert found.metrics == pytest.approx({"instruct_str/format": form, "instruct_str/args": args})


def test_instruct_with_no_gold_args_is_the_name_alone_and_a_missing_arg_is_an_empty_one(score: Any):
    fields = {**instruct("json"), "ground_truth": {"action": "x", "args": {}}}
    assert score("instruct", fields, call("x", {"a": 1})).metrics["instruct_json/args"] == 1
    fields = {**instruct("json"), "ground_truth": {"action": "x", "args": {"a": ""}}}
    assert score("instruct", fields, call("x", {})).metrics["instruct_json/args"] == 1


@pytest.mark.parametrize(
    ("text", "f1"),
    [
        (json.dumps(PLAN[:2]), 1),
        (f"My plan is {PLAN} and no more", 1),
        (json.dumps([{**step, "args": str(step["args"])} for step in PLAN]), 1),
        (json.dumps(PLAN[::-1]), 1),  # the ids tell the order
        (json.dumps(PLAN[:1]), 2 / 3),
        (json.dumps([{"name": step["name"], "args": {}} for step in PLAN]), 0),  # no ids
        (json.dumps([*PLAN, "and so on"]), 0),
        (json.dumps([{**PLAN[0], "id": "first"}]), 0),
        (json.dumps(PLAN[0]), 0),
        (json.dumps(PLAN)[:-5], 0),
        ("[]", 0),
    ],
)
def test_plan_json_is_a_list_of_steps_with_id_name_and_args(score: Any, text: str, f1: float):
    found = score("plan_json", plan("json"), text, embedder=apart_by_text)
    assert found.metrics["plan_json/f1"] == pytest.approx(f1)
    assert found.failure == (None if f1 else "not parsed")


def apart_by_text(texts: list[str]) -> np.ndarray:
    """Different texts are as unlike as can be, seen apart by all their letters."""
    return np.stack([np.eye(997)[int.from_bytes(text.encode(), "big") % 997] for text in texts])


def found_steps(score: Any, text: str) -> list[tuple[str, str]]:
    found = score("plan_str", plan("str"), text).details["parsed"]
    return [(step["name"], step["args"]) for step in found]


def test_plan_in_words_is_split_at_sentences_and_lines_and_each_names_its_first_api(score: Any):
    text = "1. Use Bnb.search, then Bnb.price. Wait.\nAsk Bnb.price. Finish"
    assert found_steps(score, text) == [
        ("Bnb.search", "Use Bnb.search, then Bnb.price"),
        ("Bnb.price", "Ask Bnb.price"),
    ]
    found = score("plan_str", plan("str"), "I cannot")
    assert found.failure == "not parsed"
    assert found.metrics["plan_str/f1"] == 0


def test_a_gold_plan_may_be_given_as_text(score: Any):
    assert (
        score("plan_json", plan("json", json.dumps(PLAN)), str(PLAN)).metrics["plan_json/f1"] == 1
    )


@pytest.mark.parametrize(
    ("text", "right"),
    [
        ("Bnb.price", 1),
        ("I would call Bnb.price now.", 1),
        ("Bnb.price or Bnb.price", 1),
        ("Bnb.price or Bnb.search", 0),
        ("Bnb.prices", 0),  # another name that begins alike
        ("Bnb.price, then FinishAction", 0),
        ("price", 0),
    ],
)
def test_retrieve_in_words_holds_the_name_and_no_other(score: Any, text: str, right: int):
    fields = record(ground_truth=STEP)
    assert score("retrieve_str", fields, text).metrics == {"retrieve_str/name": right}


def test_retrieve_in_words_may_be_the_end(score: Any):
    fields = record(ground_truth={"name": "FinishAction"})
    assert score("retrieve_str", fields, "FinishAction").metrics == {"retrieve_str/name": 1}
    assert score("retrieve_str", fields, "A.b").metrics == {"retrieve_str/name": 0}


@pytest.mark.parametrize(
    ("text", "right"),
    [("May 1", 1), ('"May 1"', 1), ("'May 1'", 1), ("May 1.", 0), ("may 1", 0), ("['May 1']", 0)],
)  # fmt: skip
def test_understand_in_words_is_the_exact_text_without_quotes(score: Any, text: str, right: int):
    fields = record(ground_truth={"args": "May 1"})
    assert score("understand_str", fields, text).metrics == {"understand_str/args": right}


@pytest.mark.parametrize(
    ("answered", "name", "args"),
    [
        (STEP, 1, 1),
        ({**STEP, "args": {"id": "7", "day": "May 1", "more": 0}}, 1, 1),  # equal as texts
        ({**STEP, "args": {"id": 7}}, 1, 1 / 2),
        ({**STEP, "args": "{'id': 7, 'day': 'May 1'}"}, 1, 0),  # no object
        ({"thought": STEP["thought"]}, 0, 0),
        ({**STEP, "name": "the Bnb.price"}, 0, 1),
    ],
)
def test_one_json_answer_is_scored_by_thought_name_and_args(
    score: Any, answered: dict[str, Any], name: float, args: float
):
    found = score("reason_retrieve_understand_json", record(ground_truth=STEP), str(answered))
    assert found.metrics == pytest.approx(
        {"reason_json/thought": 1, "retrieve_json/name": name, "understand_json/args": args}
    )


@pytest.mark.parametrize(("args", "right"), [({}, 1), ({"a": 1}, 0), ("", 1)])
def test_understand_json_without_gold_args_wants_none(score: Any, args: Any, right: float):
    fields = record(ground_truth={**STEP, "args": {}})
    found = score("understand_json", fields, json.dumps({**STEP, "args": args}))
    assert found.metrics == {"understand_json/args": right}
    assert score("understand_json", fields, "none").metrics == {"understand_json/args": 0}


def test_reason_is_the_clipped_cosine_of_the_thoughts(score: Any):
    directions = {"gold": [1.0, 0.0], "near": [0.6, 0.8], "against": [-1.0, 0.1]}

    def embed(texts: list[str]) -> np.ndarray:
        return np.array([directions[text] for text in texts])

    fields = record(ground_truth={**STEP, "thought": "gold"})
    for thought, value in (("near", 0.6), ("against", 0), ("gold", 1)):
        found = score("reason_str", fields, thought, embedder=embed)
        assert found.metrics == pytest.approx({"reason_str/thought": value})
        text = json.dumps({"thought": thought})
        found = score("reason_json", fields, text, embedder=embed)
        assert found.metrics == pytest.approx({"reason_json/thought": value})


@pytest.mark.parametrize(
    ("text", "right", "failure"),
    [
        ("Answer: B", 1, None),
        ("B", 1, None),
        ("Answer:B because", 1, None),
        ("Because: of this: B", 0, "not parsed"),  # after the first colon, nowhere else
        ("The answer is B", 0, "not parsed"),
        ("Answer: A", 0, None),
        ("Answer: b", 0, "not parsed"),
        ("Answer:", 0, "not parsed"),
        ("Answer: F", 0, "not parsed"),
    ],
)
def test_review_is_the_letter_after_the_first_colon(
    score: Any, text: str, right: int, failure: str | None
):
    found = score("review_str", review("B"), text)
    assert (found.metrics, found.failure) == ({"review_str/answer": right}, failure)


# The score, and what is said beside it


def means(scores: dict[str, Score]) -> dict[str, list[float]]:
    table: dict[str, list[float]] = {}
    for each in scores.values():
        for name, value in each.metrics.items():
            table.setdefault(name, []).append(value)
    return table


def test_the_score_is_the_mean_of_six_subtasks_each_the_mean_of_its_variants(tmp_path: Path):
    benchmark = task(write(tmp_path, ALL))
    texts = {**GOLD, "instruct_v2/b": "?", "review_str_v2/a": "A", "retrieve_str_v2/a": "?"}
    table = means(answer(benchmark, texts))
    weights = benchmark.weights({name: len(values) for name, values in table.items()})
    assert weights is not None
    total = sum(weight * np.mean(table[name]) for name, weight in weights.items())
    # instruct 1/2, plan 1, reason 1, retrieve 1/2, understand 1, review 0
    assert total == pytest.approx(4 / 6)
    assert sum(weights.values()) == pytest.approx(1)
    assert weights["review_str/answer"] == pytest.approx(1 / 6)
    assert weights["instruct_json/format"] == pytest.approx(1 / 24)
    assert not any("precision" in name or "recall" in name for name in weights)


def test_it_is_whole_with_all_variants_and_the_records_known_of_plan_and_review(tmp_path: Path):
    benchmark = task(write(tmp_path, ALL))
    items = benchmark.load()
    assert not benchmark.is_complete(items)
    assert benchmark.notes(items, [])[1:] == [
        "plan_json: 1 of at least 553 records",
        "plan_str: 1 of at least 553 records",
        "review_str: 1 of at least 487 records",
    ]
    assert benchmark.is_complete(items * 553)
    assert not benchmark.is_complete(items * 486)
    without = [item for item in items if item.group != "retrieve_str"]
    assert not benchmark.is_complete(without * 553)


def test_what_the_limit_left_out_is_not_told_as_missing_data(tmp_path: Path):
    files = {name: ALL[name] for name in ("reason_str_v2", "retrieve_str_v2", "understand_str_v2")}
    benchmark = task(write(tmp_path, files))
    assert benchmark.notes(benchmark.load()[:1], []) == [
        "T-Eval data v2, scored by the rules of v2",
        "not measured, because there is no data: instruct, plan, review",
        "not measured, because no item was run: retrieve, understand",
    ]


def test_the_place_of_the_system_text_stands_in_the_settings(tmp_path: Path):
    benchmark = task(write(tmp_path, ALL), teval_system="as_user")
    assert benchmark.settings()["teval_system"] == "as_user"


def test_there_is_no_score_without_all_six_and_the_missing_ones_are_told(tmp_path: Path):
    files = {name: ALL[name] for name in ("plan_json_v2", "review_str_v2", "understand_str_v2")}
    benchmark = task(write(tmp_path, files))
    scores = answer(benchmark, GOLD)
    assert benchmark.weights({name: 1 for name in means(scores)}) is None
    assert benchmark.weights({}) is None
    assert not benchmark.is_complete(benchmark.load())
    notes = benchmark.notes(benchmark.load(), list(scores.values()))
    assert notes == [
        "T-Eval data v2, scored by the rules of v2",
        "not measured, because there is no data: instruct, reason, retrieve",
        "plan_json: 1 of at least 553 records",
        "review_str: 1 of at least 487 records",
    ]


def test_the_score_is_of_the_english_files_where_there_are_two_languages(tmp_path: Path):
    chinese = {f"{name}_zh": records for name, records in ALL.items()}
    benchmark = task(write(tmp_path, {**ALL, **chinese}))
    items = benchmark.load()
    names = {name: 1 for item in items for name in (f"{item.group}/x",)}
    texts = GOLD | {key.replace("_v2/", "_v2_zh/"): text for key, text in GOLD.items()}
    scores = answer(benchmark, texts)
    counts = {name: len(values) for name, values in means(scores).items()}
    assert len(counts) == 2 * 17
    assert len(names) == 2 * 9
    weights = benchmark.weights(counts)
    assert weights is not None
    assert not [name for name in weights if "_zh/" in name]
    alone = benchmark.weights({name: 1 for name in counts if "_zh/" in name})
    assert alone is not None
    assert alone.keys() == {name.replace("/", "_zh/") for name in weights}
    assert "English" in benchmark.notes(items, list(scores.values()))[-1]
    assert benchmark.is_complete([item for item in items if item.group.endswith("_zh")] * 553)


def without_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)


def test_without_an_embedder_plan_and_reason_are_not_scored_and_never_zero(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    without_package(monkeypatch)
    benchmark = task(write(tmp_path, ALL), embedder=None)
    scores = answer(benchmark, GOLD)
    table = means(scores)
    assert not [name for name in table if name.startswith(("plan", "reason"))]
    assert table["retrieve_json/name"] == [1]
    assert benchmark.weights({name: 1 for name in table}) is None
    assert scores["plan_json_v2/a"].failure is None
    (note,) = [n for n in benchmark.notes(benchmark.load(), []) if n.startswith("not scored")]
    assert "plan, reason" in note
    assert "pip install" in note
    assert benchmark.settings()["teval_embedder"] is None


def test_an_embedder_that_was_named_must_be_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    without_package(monkeypatch)
    write(tmp_path, ALL)
    benchmark = task(tmp_path, embedder=None, teval_embedder="some-model")
    with pytest.raises(UserError, match=r"sentence-transformers .*: pip install"):
        benchmark.load()


class FakeModel:
    """In place of sentence-transformers: knows one model, and whether it may download."""

    def __init__(self, name: str, device: str, local_files_only: bool):
        if name != "here" and local_files_only:
            raise OSError("not found\nlocally")
        if name == "nowhere":
            raise OSError("no such model")

    def encode(self, texts: list[str], show_progress_bar: bool) -> np.ndarray:
        return by_letters(texts)


def test_the_default_embedder_is_never_downloaded_and_a_named_one_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    package = types.SimpleNamespace(SentenceTransformer=FakeModel)
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)
    write(tmp_path, ALL)
    default = task(tmp_path, embedder=None)
    items = default.load()
    note = default.notes(items, [])[-1]
    assert "cannot load the sentence embedder 'all-mpnet-base-v2' (not found locally)" in note
    assert "--teval-embedder" in note
    named = task(tmp_path, embedder=None, teval_embedder="some-model")
    assert answer(named, GOLD)["plan_json_v2/a"].metrics["plan_json/f1"] == 1
    assert named.settings()["teval_embedder"] == "some-model"
    with pytest.raises(UserError, match=r"'nowhere' \(no such model\)"):
        task(tmp_path, embedder=None, teval_embedder="nowhere").load()


def test_samples_of_an_item_count_by_their_mean(tmp_path: Path):
    benchmark = task(write(tmp_path, {"review_str_v2": {"a": review("B")}}))
    (item,) = benchmark.load()
    (score,) = benchmark.score([(item, Response(("A", "B", "B", "?"), ("stop",) * 4))])
    assert score.metrics == {"review_str/answer": 0.5}


def test_the_task_is_made_by_its_name(tmp_path: Path):
    assert isinstance(make_task("teval", BenchmarkOptions(tmp_path, tmp_path)), TEval)


def test_the_script_finds_gold_answers_perfect_and_empty_ones_worthless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    without_package(monkeypatch)
    monkeypatch.setattr(sys, "argv", [str(BENCHMARK), str(write(tmp_path, ALL))])
    with pytest.raises(SystemExit) as left:
        runpy.run_path(str(BENCHMARK), run_name="__main__")
    assert left.value.code == 0
    lines = capsys.readouterr().out.splitlines()
    assert "gold: instruct_str/args 1.0000 over 1 items" in lines
    assert "nothing: review_str/answer 0.0000 over 1 items" in lines
    assert lines[-1] == "gold answers below 1.0: none"
    assert ast.literal_eval(lines[0].split()[2]) == 1.0
