"""MT-Bench against a real endpoint on this machine that fails in every way it can."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Response
from moi_jax.evaluation.results import summarize
from moi_jax.evaluation.tasks import make_task
from moi_jax.evaluation.tasks.judgments import MISSING
from moi_jax.evaluation.tasks.llm_judge import TRIES, Judge, read_rating

from support.judge_endpoint import judge_endpoint

TURN_1 = "Rate it.\n[Question]\n{question}\n[Answer]\n{answer}"
TURN_1_MATH = TURN_1.replace("[Answer]", "[Reference]\n{ref_answer_1}\n[Answer]")
TURN_2 = "{question_1}\n{answer_1}\n{question_2}\n{answer_2}"
TURN_2_MATH = "{ref_answer_1}\n{ref_answer_2}\n" + TURN_2
JUDGE_PROMPTS = [
    {"name": "pair-v2", "system_prompt": "Compare.", "prompt_template": "{answer_a} {answer_b}"},
    {"name": "single-v1", "system_prompt": "Help.", "prompt_template": TURN_1},
    {"name": "single-math-v1", "system_prompt": "Help.", "prompt_template": TURN_1_MATH},
    {"name": "single-v1-multi-turn", "system_prompt": "Judge 2.", "prompt_template": TURN_2},
    {"name": "single-math-v1-multi-turn", "system_prompt": "J 2.", "prompt_template": TURN_2_MATH},
]
# 103's inline reference is empty, and 104's is another than the file's: only the file counts.
QUESTIONS = [
    {"question_id": 81, "category": "writing", "turns": ["Write.", "Again, in {braces}."]},
    {"question_id": 91, "category": "roleplay", "turns": ["Be a cat.", "Now a dog."]},
    {
        "question_id": 103,
        "category": "reasoning",
        "turns": ["Why?", "Sure?"],
        "reference": ["", ""],
    },
    {"question_id": 114, "category": "math", "turns": ["1+1?", "2+2?"], "reference": ["3", "5"]},
    {"question_id": 121, "category": "coding", "turns": ["Sort.", "Faster."]},
    {"question_id": 131, "category": "extraction", "turns": ["Find.", "More."], "reference": ["x"]},
    {"question_id": 141, "category": "stem", "turns": ["What is mass?", "And weight?"]},
    {"question_id": 151, "category": "humanities", "turns": ["Who?", "When?"]},
]
REFERENCES = {103: ["because", "yes"], 114: ["two", "four"], 121: ["sorted()", "numpy"]}


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def read_lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture
def data(tmp_path):
    directory = tmp_path / "data" / "mt_bench"
    write_lines(directory / "question.jsonl", QUESTIONS)
    write_lines(directory / "judge_prompts.jsonl", JUDGE_PROMPTS)
    references = [
        {"question_id": question, "choices": [{"index": 0, "turns": turns}]}
        for question, turns in REFERENCES.items()
    ]
    write_lines(directory / "reference_answer" / "gpt-4.jsonl", references)
    return directory.parent


@pytest.fixture
def endpoint(monkeypatch):
    for variable in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    with judge_endpoint() as server:
        yield server


@pytest.fixture
def evaluate(data, tmp_path, endpoint):
    """Scores, as the runner would, answers that say which they are; (task, items, scores)."""

    def run(answer="answer {}.{}", url=endpoint.url, timeout=20.0, workers=4, **options):
        options = {"judge": "org/judge", "judge_url": url, **options}
        task = make_task(
            "mt_bench", BenchmarkOptions(data=data, out=tmp_path / "moi-7b", **options)
        )
        if task.judge is not None:
            task.judge = replace(
                task.judge, timeout=timeout, workers=workers, retries=1, pause=0.01
            )
        items = task.load()
        answers = [
            Response(tuple(answer.format(item.id, turn) for turn in (1, 2)), ("stop", "length"))
            for item in items
        ]
        return task, items, list(task.score(zip(items, answers, strict=True)))

    return run


def summary(task, items, scores):
    answer = Response(finishes=("stop", "stop"))
    scored = [(item, answer, score) for item, score in zip(items, scores, strict=True)]
    return summarize(task, scored, skipped=0, all_items=True)


def judgments(tmp_path):
    return tmp_path / "moi-7b" / "mt_bench" / "model_judgment" / "org_judge_single.jsonl"


def test_items_have_two_turns_and_the_categories_temperature(data, tmp_path):
    task = make_task("mt_bench", BenchmarkOptions(data=data, out=tmp_path / "out"))
    items = task.load()
    assert [(item.id, item.group, item.temperature) for item in items] == [
        ("81", "writing", 0.7),
        ("91", "roleplay", 0.7),
        ("103", "reasoning", 0.0),
        ("114", "math", 0.0),
        ("121", "coding", 0.0),
        ("131", "extraction", 0.0),
        ("141", "stem", 0.1),
        ("151", "humanities", 0.1),
    ]
    assert [message.content for message in items[0].messages] == ["Write."]
    assert items[0].follow_ups == ("Again, in {braces}.",)
    assert task.max_new_tokens == 1024


def test_a_misbehaving_endpoint_gives_the_arithmetic_by_hand(evaluate, endpoint, tmp_path):
    endpoint.plans = {
        "81.1": ["silent", "Good. Rating: [[8]]"],
        "91.1": ["limited", "Rating: [[7.5]]"],
        "103.1": ["I like it: 9 of 10", "Rating: [[rating]]", "Rating: [[2]]"],
        "114.1": ["broken", "x = a[b], so [[1]]"],
        "121.1": ["not_json", "no_choices", "[[10]]"],
        "131.1": ["slow"],  # [[5]]
        "141.1": ["Rating: [6]"],
        "151.1": ["Out of scale: [[11]]", "[[100]]", "[[9]]"],
        "81.2": ["no rating, ever"],
        "91.2": ["no_text", "[[4]]"],
        "103.2": ["[[3]], not [[9]]"],
    }
    task, items, scores = evaluate(timeout=1.0)
    assert [score.metrics for score in scores] == [
        {"rating_1": 8.0},
        {"rating_1": 7.5, "rating_2": 4.0},
        {"rating_1": 2.0, "rating_2": 3.0},
        {"rating_1": 1.0, "rating_2": 5.0},
        {"rating_1": 10.0, "rating_2": 5.0},
        {"rating_1": 5.0, "rating_2": 5.0},
        {"rating_1": 6.0, "rating_2": 5.0},
        {"rating_1": 9.0, "rating_2": 5.0},
    ]
    # 8 + 7.5 + 2 + 1 + 10 + 5 + 6 + 9 = 48.5; 4 + 3 + 5 * 5 = 32; 15 ratings; x 10
    results = summary(task, items, scores)
    assert results["score"] == pytest.approx(80.5 / 15 * 10)
    assert results["groups"]["roleplay"] == {"items": 1, "rating_1": 7.5, "rating_2": 4.0}
    assert results["failures"] == {"no rating": 1}
    assert not task.is_complete(items * 10)
    assert scores[0].details == {"judgments": ["Good. Rating: [[8]]", "no rating, ever"]}
    assert "partial: 1 of 16 ratings" in task.notes(items, scores)[1]
    assert "questions 81)" in task.notes(items, scores)[1]
    assert len(endpoint.asked["81.2"]) == TRIES
    assert task.settings()["judge"] == "org/judge"
    assert task.settings()["judge_version"] == "stub-2024"

    calls = endpoint.calls
    again, _, same = evaluate()
    assert endpoint.calls == calls
    assert (same, again.settings()) == (scores, task.settings())


def test_the_judge_sees_the_prompt_of_category_and_turn(evaluate, endpoint):
    task, items, _ = evaluate()
    assert task.is_complete(items * 10)
    assert not task.is_complete(items)
    request = endpoint.asked["114.1"][0]
    assert request == {
        "path": "/v1/chat/completions",
        "model": "org/judge",
        "messages": [
            {"role": "system", "content": "Help."},
            {
                "role": "user",
                "content": "Rate it.\n[Question]\n1+1?\n[Reference]\ntwo\n[Answer]\nanswer 114.1",
            },
        ],
        "temperature": 0,
        "max_tokens": 2048,
    }
    told = {mark: requests[0]["messages"] for mark, requests in endpoint.asked.items()}
    assert told["131.1"][1]["content"] == "Rate it.\n[Question]\nFind.\n[Answer]\nanswer 131.1"
    assert told["81.2"] == [
        {"role": "system", "content": "Judge 2."},
        {"role": "user", "content": "Write.\nanswer 81.1\nAgain, in {braces}.\nanswer 81.2"},
    ]
    assert told["103.2"][1]["content"].startswith("because\nyes\nWhy?\nanswer 103.1\nSure?")
    assert endpoint.keys == {"Bearer none"}


def test_files_have_fastchats_layout(evaluate, endpoint, tmp_path, data):
    endpoint.plans = {"81.1": ["never"], "91.1": ["[[9]]"], "103.2": ["[[2.5]]"]}
    task, items, scores = evaluate()
    out = tmp_path / "moi-7b" / "mt_bench"
    answers = read_lines(out / "model_answer" / "moi-7b.jsonl")
    assert [answer["question_id"] for answer in answers] == [
        row["question_id"] for row in QUESTIONS
    ]
    assert set(answers[0]) == {"question_id", "answer_id", "model_id", "choices", "tstamp"}
    assert answers[0]["model_id"] == "moi-7b"
    assert answers[0]["choices"] == [{"index": 0, "turns": ["answer 81.1", "answer 81.2"]}]
    for name in ("question.jsonl", "reference_answer/gpt-4.jsonl"):
        assert (out / name).read_bytes() == (data / "mt_bench" / name).read_bytes()
    rows = read_lines(judgments(tmp_path))
    assert len(rows) == 16
    row = next(row for row in rows if row["score"] == 2.5)
    assert row["question_id"] == 103
    assert row["model"] == "moi-7b"
    assert row["judge"] == ["org/judge", "single-math-v1-multi-turn"]
    assert row["turn"] == 2
    assert row["judgment"] == "[[2.5]]"
    assert row["user_prompt"].endswith("answer 103.2")
    # What FastChat's show_result does: -1 is no rating, the rest is averaged.
    told = [row["score"] for row in rows if row["score"] != -1]
    assert len(told) == 15
    assert 10 * sum(told) / len(told) == pytest.approx(summary(task, items, scores)["score"])


def test_only_what_changed_is_asked_again(evaluate, endpoint, data):
    evaluate()
    before = endpoint.calls
    path = data / "mt_bench" / "judge_prompts.jsonl"
    path.write_text(path.read_text().replace("Judge 2.", "Judge the second."))
    evaluate()
    assert endpoint.calls == before + 5  # the second turns that need no reference
    evaluate("another answer {}.{}")
    assert endpoint.calls == before + 5 + 16
    endpoint.version = "stub-2025"
    task, _, _ = evaluate(judge="other")
    assert endpoint.calls == before + 5 + 16 + 16
    assert task.settings()["judge_version"] == "stub-2025"


def test_judgments_of_fastchat_are_scored_as_they_are(evaluate, endpoint, tmp_path):
    """Rows with the fields that FastChat's gen_judgment.py writes: no hash, no system prompt."""
    evaluate()
    fields = ("question_id", "model", "judge", "user_prompt", "judgment", "score", "turn", "tstamp")
    rows = [{field: row[field] for field in fields} for row in read_lines(judgments(tmp_path))]
    for row in rows:
        row["score"] = MISSING if row["turn"] == 2 and row["question_id"] == 81 else row["turn"] + 5
    pair = {"judge": ["org/judge", "pair-v2"], "g1_user_prompt": "Compare."}
    text = "\n".join(map(json.dumps, [*rows, pair]))  # the last line without its end
    judgments(tmp_path).write_text(text)
    calls = endpoint.calls
    # No key and no endpoint are needed, since nothing is asked.
    task, _, scores = evaluate(url=None)
    assert endpoint.calls == calls
    assert scores[0].metrics == {"rating_1": 6.0}
    assert [score.metrics for score in scores[1:]] == [{"rating_1": 6.0, "rating_2": 7.0}] * 7
    assert task.settings()["judge_version"] == "not recorded"
    assert judgments(tmp_path).read_text() == text + "\n"
    with pytest.raises(UserError, match="needs the environment variable OPENAI_API_KEY"):
        evaluate("another answer {}.{}", url=None)


def test_a_killed_run_asks_only_the_rest(evaluate, endpoint, tmp_path):
    endpoint.plans = {"121.1": ["silent"]}  # the 5th of 16
    program = f"""
from moi_jax.evaluation.tasks.llm_judge import JudgeRequest, Judge
from pathlib import Path
requests = [JudgeRequest(n, 1, "single-v1", "Help.", f"answer {{n}}.1") for n in range(119, 127)]
judge = Judge("org/judge", {endpoint.url!r}, workers=1)
list(judge.rate(requests, "moi-7b", Path({str(judgments(tmp_path))!r})))
"""
    process = subprocess.Popen([sys.executable, "-c", program], env={**os.environ})
    try:
        deadline = time.monotonic() + 30
        while not endpoint.asked["121.1"] and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    kept = read_lines(judgments(tmp_path))
    assert [row["question_id"] for row in kept] == [119, 120]
    with judgments(tmp_path).open("a") as file:
        file.write('{"question_id": 121, "judge": ["org/judge", "sin')
    endpoint.plans = {}
    endpoint.asked.clear()
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)
    assert sorted(endpoint.asked) == [f"{n}.1" for n in range(121, 127)]
    assert [row["question_id"] for row in read_lines(judgments(tmp_path))] == [*range(119, 127)]


def test_a_run_that_a_fault_ended_goes_on(evaluate, endpoint, tmp_path):
    endpoint.plans = {"141.2": ["not_json"]}
    with pytest.raises(UserError, match="not a chat completion: '<html>Welcome!</html>'") as raised:
        evaluate()
    kept = read_lines(judgments(tmp_path))
    assert f"{len(kept)} of 16 judgments are kept in {judgments(tmp_path)}" in str(raised.value)
    assert len(kept) >= 16 - 1 - 4
    endpoint.plans = {}
    calls = endpoint.calls
    evaluate()
    assert endpoint.calls == calls + 16 - len(kept)
    assert len(read_lines(judgments(tmp_path))) == 16


@pytest.mark.parametrize(
    ("behaviour", "words"),
    [
        ("silent", "no answer within 1 seconds"),
        ("limited", "status 429 .too many requests.*: slow down"),
        ("broken", "status 500: out of order"),
        ("refused", "status 400: prompt too long"),
        ("no_choices", "not a chat completion"),
    ],
)
def test_an_endpoint_that_stays_bad_is_named_in_one_line(evaluate, endpoint, behaviour, words):
    endpoint.plans = {"141.1": [behaviour]}
    with pytest.raises(UserError, match=words) as raised:
        evaluate(timeout=1.0)
    assert str(raised.value).startswith(f"judge org/judge at {endpoint.url}: ")
    assert "the same command continues from there" in str(raised.value)
    assert "\n" not in str(raised.value)


def test_an_endpoint_that_is_down_is_named_in_one_line(evaluate):
    with judge_endpoint() as closed:
        url = closed.url
    with pytest.raises(UserError) as raised:
        evaluate(url=url)
    assert re.fullmatch(
        rf"judge org/judge at {url}: cannot be reached \(.*refused\); 0 of 16 judgments "
        r"are kept in .*, and the same command continues from there",
        str(raised.value),
    )


def test_judge_calls_run_at_the_same_time(evaluate, endpoint):
    endpoint.plans = {f"{row['question_id']}.1": ["together"] for row in QUESTIONS}
    evaluate()
    assert endpoint.most_at_a_time == Judge.workers == 4


def test_without_a_judge_there_is_no_score_and_the_answers_are_kept(evaluate, endpoint, tmp_path):
    task, items, scores = evaluate(judge=None, judge_url=None)
    assert [score.metrics for score in scores] == [{}] * 8
    assert summary(task, items, scores)["score"] is None
    assert task.notes(items, scores)[0] == "8 of the benchmark's 80 questions"
    assert "not judged: run the same command with --judge" in task.notes(items, scores)[1]
    assert len(read_lines(tmp_path / "moi-7b" / "mt_bench" / "model_answer" / "moi-7b.jsonl")) == 8
    assert endpoint.calls == 0
    evaluate()
    assert endpoint.calls == 16


def test_a_turn_that_was_never_reached_is_judged_as_empty(data, tmp_path, endpoint):
    options = BenchmarkOptions(
        data=data, out=tmp_path / "moi-7b", judge="judge", judge_url=endpoint.url
    )
    task = make_task("mt_bench", options)
    item = task.load()[1]
    [score] = task.score([(item, Response(("answer 91.1",), ("length", "too_long")))])
    assert score.metrics == {"rating_1": 5.0, "rating_2": 5.0}
    prompts = {request["messages"][1]["content"] for request in endpoint.asked["91.1"]}
    assert "Be a cat.\nanswer 91.1\nNow a dog.\n" in prompts


def test_cost_is_told_first_and_limited(evaluate, endpoint, log_text):
    # 2048 tokens of judgments a call: 16 * 2048 = 32,768 tokens at 60 $ a million, 1.97 $
    with pytest.raises(UserError, match=r"16 of 16 calls.*32,768 tokens.*\$1\.97, above .* 1\.5"):
        evaluate(judge_price=(0.0, 60.0), judge_max_cost=1.5)
    assert endpoint.calls == 0
    evaluate(judge_price=(0.0, 60.0), judge_max_cost=2.0)
    assert "16 of 16 calls to make" in log_text.getvalue()
    # Nothing left to ask costs nothing.
    evaluate(judge_price=(0.0, 60.0), judge_max_cost=0.0)


def test_prompt_tokens_are_guessed_as_four_characters_each(evaluate, endpoint, log_text):
    evaluate()
    asked = [request["messages"] for requests in endpoint.asked.values() for request in requests]
    tokens = sum(sum(len(each["content"]) for each in messages) // 4 for messages in asked)
    assert f"about {tokens:,} prompt tokens" in log_text.getvalue()
    longest = "if every judgment has the maximum length and no call is repeated"
    assert longest in log_text.getvalue()


USAGE = {"prompt_tokens": 10, "completion_tokens": 2048}


@pytest.mark.parametrize(
    ("usage", "judgment", "prices", "limit", "calls", "spent"),
    [
        # A call may cost 0.2048 $, and is made three times: 16 fit into 3.3 $.
        (USAGE, "no rating", (0.0, 100.0), 3.3, 16, "3.277"),
        # Judgments half as long leave 0.2048 $ for one more 30 times.
        ({**USAGE, "completion_tokens": 1024}, "no rating", (0.0, 100.0), 3.3, 31, "3.174"),
        (None, "x" * 4 * 1024, (0.0, 100.0), 3.3, 31, "3.174"),
        # The prompts are far longer than guessed.
        ({**USAGE, "prompt_tokens": 30_000}, "[[5]]", (10.0, 0.0), 2.1, 7, "2.1"),
    ],
)
def test_calls_end_before_they_cost_more_than_the_limit(
    evaluate, endpoint, tmp_path, usage, judgment, prices, limit, calls, spent
):
    endpoint.usage, endpoint.judgment = usage, judgment
    with pytest.raises(UserError, match=rf"\${spent} are spent.*-max-cost {limit}; ") as raised:
        evaluate(judge_price=prices, judge_max_cost=limit, workers=1)
    kept = len(read_lines(judgments(tmp_path)))
    assert f"{kept} of 16 judgments are kept" in str(raised.value)
    assert endpoint.calls == calls


def test_the_environments_key_is_sent(evaluate, endpoint, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    evaluate()
    assert endpoint.keys == {"Bearer secret"}


def test_the_password_of_an_address_is_used_and_not_shown(evaluate, endpoint, log_text):
    url = endpoint.url.replace("//", "//me:secret@")
    task, _, _ = evaluate(url=url)
    assert endpoint.calls == 16
    assert f" at {endpoint.url}: 16 of 16 calls" in log_text.getvalue()
    assert task.settings()["judge_url"] == endpoint.url
    endpoint.judgment = "refused"
    with pytest.raises(UserError, match=f"^judge other at {endpoint.url}: "):
        evaluate(url=url, judge="other")
    with pytest.raises(UserError, match=r"^--judge-url host/v1 is not an address"):
        evaluate(url="me:secret@host/v1")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"judge": None}, "--judge-url needs the name of the judge model"),
        ({"judge_url": "localhost:8000/v1"}, "not an address such as http"),
        ({"judge_url": None}, "OPENAI_API_KEY"),
        ({"judge_max_cost": 3.0}, "needs --judge-price"),
        ({"samples": 2}, "use --samples 1"),
        ({"judge_price": (1.0, float("nan"))}, "--judge-price must be dollars, 0 or more"),
        ({"judge_price": (-1.0, 1.0)}, "--judge-price must be dollars, 0 or more"),
        (
            {"judge_price": (1.0, 1.0), "judge_max_cost": float("inf")},
            "--judge-max-cost must be dollars, 0 or more",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_at_once(evaluate, options, words):
    with pytest.raises(UserError, match=words):
        evaluate(**options)


@pytest.mark.parametrize(
    ("file", "text", "words"),
    [
        ("question.jsonl", None, r"nothing in .*question.jsonl; put into .*data: mt_bench/"),
        ("question.jsonl", '{"question_id": 81,\n', "question.jsonl, line 1: .*correct the row"),
        ("question.jsonl", '{"turns": ["\\ud83d", ""]}\n', "question.jsonl, line 1: a text has"),
        ("question.jsonl", "3\n", "question.jsonl, line 1: the row is a .*correct the row"),
        (
            "question.jsonl",
            '{"question_id": 81, "category": "art", "turns": ["a", "b"]}\n',
            "question.jsonl, line 1: a question must have",
        ),
        (
            "question.jsonl",
            '\n{"question_id": 81, "category": "math", "turns": ["a", "b"]}\n',
            "question.jsonl, line 2: question 81 of math .* has none",
        ),
        ("judge_prompts.jsonl", "", "has no prompt single-v1"),
        (
            "judge_prompts.jsonl",
            '{"name": "single-v1", "system_prompt": "", "prompt_template": "{answer_c}"}\n',
            "judge_prompts.jsonl, line 1: prompt single-v1 cannot be filled in",
        ),
        (
            "reference_answer/gpt-4.jsonl",
            '{"question_id": 103}\n',
            "gpt-4.jsonl, line 1: an answer must have",
        ),
    ],
)
def test_bad_files_are_named_with_their_line(data, tmp_path, file, text, words):
    path = data / "mt_bench" / file
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(UserError, match=words):
        make_task("mt_bench", BenchmarkOptions(data=data, out=tmp_path / "out")).load()


def test_ratings_are_read_from_judgments():
    assert read_rating("Rating: [[5]]") == 5.0
    assert read_rating("[3] as in [[7.5]]") == 7.5
    assert read_rating("only [6]") == 6.0
    assert read_rating("[[0]]") == 0.0
    for malformed in ("", "5", "[[10.5]]", "[[5/10]]", "[[-1]]", "[[nan]]", "[[５]]", "[]"):
        assert read_rating(malformed) is None


@settings(deadline=None)
@given(st.text(), st.text(), st.integers(0, 100))
def test_a_rating_is_found_in_any_text(before, after, tenths):
    before = before.replace("[", "(")
    assert read_rating(f"{before}[[{tenths / 10}]]{after}") == tenths / 10
    anything = read_rating(before + after)
    assert anything is None or 0 <= anything <= 10
