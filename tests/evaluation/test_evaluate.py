"""Benchmarks on a real tiny model: answers kept and gone on with, scores, results, the command."""

import hashlib
import json
import resource
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime

import jax
import numpy as np
import pytest

from moi_jax import config
from moi_jax.checkpoints.items import parameters_fingerprint
from moi_jax.common.errors import UserError
from moi_jax.evaluation.benchmarks import run_benchmarks
from moi_jax.evaluation.methods import describe_sampling, describe_task
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Response, Score, Task, evenly_spaced
from moi_jax.evaluation.provenance import Session
from moi_jax.evaluation.responses import collect_responses, count_tokens, forget_changed
from moi_jax.evaluation.results import overall, read_results, summarize
from moi_jax.evaluation.tasks import open_task
from moi_jax.evaluation.while_training import make_benchmark
from moi_jax.models.decoder import make_model
from moi_jax.models.parameters import random_parameters
from moi_jax.models.presets import preset
from moi_jax.sampling.chat_model import make_chat_model
from moi_jax.sampling.response_log import ResponseLog
from moi_jax.text.conversations import Message
from moi_jax.text.tokenizer import load_tokenizer

from support.runs import SAMPLES

MADE_BY = {"name": "tiny", "parameters": "0123", "system_prompt": None}


class Echo(Task):
    """Right where the answer has an even number of characters."""

    name, files = "echo", "echo.jsonl"
    max_new_tokens = 8
    published_sizes = (3,)

    def load(self) -> list[Item]:
        return [
            Item(str(n), (Message("user", f"Say {n}."),), n, group="ab"[n % 2]) for n in range(3)
        ]

    def score(self, responses) -> Iterator[Score]:
        for _, response in responses:
            right = len(response.texts[0]) % 2 == 0
            yield Score({"accuracy": float(right)}, None if right else "odd")

    def weights(self, counts):
        return {"accuracy": 1.0}


@pytest.fixture(scope="module")
def chat():
    """The preset micro with random weights, 128 tokens of context."""
    model = preset("micro")
    tokenizer = load_tokenizer(SAMPLES / "tokenizer")
    make_chat = make_chat_model(
        make_model(model), model, tokenizer, "You help.", slots=2, context=128
    )
    return make_chat(random_parameters(model, 0, np.float32))


@pytest.fixture
def options(tmp_path):
    return BenchmarkOptions(data=tmp_path / "data", out=tmp_path / "out")


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n")[:-1]]


def run(chat, options, items=None, made_by=MADE_BY):
    task = Echo(options)
    return run_benchmarks([(task, items or task.load())], chat, made_by, options)


def test_results_samples_and_answers_are_written(chat, options):
    results = run(chat, options)
    assert read_results(options.out / "results.json") == json.loads(json.dumps(results))
    summary = results["tasks"]["echo"]
    samples = lines(options.out / "samples" / "echo.jsonl")
    assert [sample["id"] for sample in samples] == ["0", "1", "2"]
    right = [sample["metrics"]["accuracy"] for sample in samples]
    assert summary["score"] == pytest.approx(100 * np.mean(right))
    assert summary["items"] == 3
    assert summary["complete"]
    assert summary["groups"]["a"]["items"] == 2
    cut = [sample["finishes"] for sample in samples].count(["length"])
    assert summary["failures"].get("cut at its length", 0) == cut
    assert summary["failures"].get("odd", 0) == right.count(0.0)
    assert results["overall"] is None  # one task is not the seven


def test_a_killed_run_goes_on_and_asks_nothing_twice(chat, options, monkeypatch):
    whole = run(chat, options)
    path = options.out / "answers" / "echo.jsonl"
    kept = path.read_text(encoding="utf-8").split("\n")
    path.write_text("\n".join(kept[:2]) + "\n" + kept[2][:20], encoding="utf-8")  # torn by a kill
    asked = []
    ask = chat.sampler.run

    def counted(parameters, requests):
        asked.extend(requests)
        return ask(parameters, requests)

    monkeypatch.setattr(chat.sampler, "run", counted)
    assert run(chat, options) == whole
    assert len(asked) == 2
    assert sorted(lines(path)[1:], key=lambda r: r["id"]) == sorted(
        map(json.loads, kept[1:4]), key=lambda r: r["id"]
    )


def test_what_is_asked_is_what_task_item_and_options_say(chat, options, monkeypatch):
    asked = []
    monkeypatch.setattr(chat.sampler, "run", lambda _, requests: asked.extend(requests) or [])
    monkeypatch.setattr(Echo, "stop_strings", ("END",))
    message = Message("user", "Say 0.")
    items = [
        Item("0", (message,), 0),
        Item("1", (message,), 0, temperature=0.5),
        Item("2", (message,), 0, system_block=False),
    ]

    def requests(**choices):
        asked.clear()
        chosen = BenchmarkOptions(data=options.data, out=options.out, **choices)
        with pytest.raises(KeyError):  # nothing is answered
            collect_responses(
                Echo(chosen), items, chat, chosen, ResponseLog(None, {}), lambda count: None
            )
        return asked

    plain = list(requests())
    assert [r.temperature for r in plain] == [0.0, 0.5, 0.0]
    assert {(r.max_new_tokens, r.top_p, r.top_k, r.stop_strings) for r in plain} == {
        (8, 1.0, 0, ("END",))
    }
    assert plain[0].prompt == plain[1].prompt == chat.prompt([message])
    assert chat.tokenizer.decode(plain[2].prompt) == (
        "<|im_start|>user\nSay 0.<|im_end|>\n<|im_start|>assistant\n"
    )
    other = requests(temperature=0.7, top_p=0.9, max_new_tokens=3, seed=1)
    assert {(r.temperature, r.top_p, r.max_new_tokens) for r in other} == {(0.7, 0.9, 3)}
    assert not {r.seed for r in other} & {r.seed for r in plain}


def test_an_item_that_changed_is_asked_again(chat, options):
    run(chat, options)
    items = Echo(options).load()
    changed = [*items[:2], Item("2", (Message("user", "Speak."),), 2)]
    run(chat, options, changed)
    assert len(lines(options.out / "answers" / "echo.jsonl")) == 1 + 3 + 1


def test_progress_counts_no_answer_to_a_prompt_that_changed(chat, options):
    run(chat, options)
    changed = [*Echo(options).load()[:2], Item("2", (Message("user", "Speak."),), 2)]
    (options.out / "progress.log").unlink()
    run(chat, options, changed)
    told = (options.out / "progress.log").read_text().splitlines()
    assert "echo answers: 2 of 3" in told[0]
    assert "echo answers: 3 of 3" in told[1]


def test_responses_to_prompts_that_changed_are_forgotten(chat, options):
    """Texts of several turns, and likelihoods."""
    first, other = (Message("user", text) for text in ("Say 0.", "Say 1."))
    turns = [Item(name, (first,), 0, follow_ups=("And?", "Then?")) for name in "abc"]
    choices = [Item(name, (first,), 0, choices=("A", "B")) for name in "de"]
    log = ResponseLog(None, {})
    collect_responses(Echo(options), [*turns, *choices], chat, options, log, lambda count: None)
    before = set(log.found)
    forget_changed([*turns, *choices], chat, options, log)
    assert set(log.found) == before
    changed = [
        replace(turns[0], messages=(other,)),
        replace(turns[1], follow_ups=("But?", "Then?")),
        turns[2],
        replace(choices[0], choices=("A", "C")),
        replace(choices[1], messages=(other,)),
    ]
    forget_changed(changed, chat, options, log)
    kept = {("b", 0), ("c", 0), ("c", 1), ("c", 2), ("d", 0)}
    assert set(log.found) == kept
    assert count_tokens([("c", 0), ("c", 1)], log).keys() == {"prompt_tokens", "answer_tokens"}


def test_tokens_that_were_not_counted_are_left_out(chat, options):
    """An older version counted no tokens of prompts; 0 would be false."""
    run(chat, options)
    path = options.out / "answers" / "echo.jsonl"
    head, *records = lines(path)
    del records[1]["prompt_tokens"]
    path.write_text("".join(json.dumps(line) + "\n" for line in (head, *records)))
    task = Echo(options)
    results = run_benchmarks([(task, task.load())], chat, MADE_BY, options, Session({}))
    made = results["tasks"]["echo"]["run"]
    assert "prompt_tokens" not in made
    assert made["answer_tokens"] == sum(record["tokens"] for record in records)


def test_answers_made_otherwise_are_not_gone_on_with(chat, options, tmp_path):
    run(chat, options)
    hot = BenchmarkOptions(data=options.data, out=options.out, temperature=0.7)
    with pytest.raises(
        UserError, match=r"echo.jsonl holds answers made with other settings.*temperature"
    ):
        run(chat, hot)
    with pytest.raises(UserError, match=r"results of another model.*parameters '0123', now '4567'"):
        run(chat, options, made_by={**MADE_BY, "parameters": "4567"})


def test_a_result_that_takes_the_place_of_another_is_told(chat, options, log_text):
    task = Echo(options)
    run_benchmarks([(task, task.load())], chat, MADE_BY, options)
    fewer = BenchmarkOptions(data=options.data, out=options.out, limit=1)
    run_benchmarks([(task, task.load())], chat, MADE_BY, fewer)
    told = log_text.getvalue().split("\n")[-2]
    assert "replaces an earlier result" in told
    assert "over 3 items" in told
    assert "(limit None, now 1)" in told


@pytest.mark.parametrize("damage", ["[]\n", "{\n", '{"a": 1}\n{}\n'])
def test_a_damaged_log_is_named(tmp_path, damage):
    path = tmp_path / "echo.jsonl"
    path.write_text(damage)
    with pytest.raises(UserError, match=r"echo.jsonl is damaged .*; delete it to start again"):
        ResponseLog(path, {"a": 1})


@pytest.mark.parametrize("tasks", ["[]", '{"gsm8k": {"score": 1}}', '{"gsm8k": null}'])
def test_damaged_results_are_named(tmp_path, tasks):
    path = tmp_path / "results.json"
    path.write_text(f'{{"checkpoint": {{}}, "tasks": {tasks}}}')
    with pytest.raises(UserError, match=r"is not the results.json of an evaluation, or"):
        read_results(path)


def test_a_full_disk_is_told_and_the_answers_before_are_kept(tmp_path):
    path = tmp_path / "echo.jsonl"
    log = ResponseLog(path, {})
    log.add(("0", 0), [1], text="kept", finish="stop")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*echo.jsonl.*The earlier answers are"):
            log.add(("1", 0), [1], text="x" * 100, finish="stop")  # torn by the limit
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    log.close()
    assert list(ResponseLog(path, {}).found) == [("0", 0)]


def test_half_a_surrogate_pair_is_kept(tmp_path):
    log = ResponseLog(tmp_path / "echo.jsonl", {})
    log.add(("0", 0), [1], text="\ud83d é", finish="stop")
    log.close()
    assert ResponseLog(tmp_path / "echo.jsonl", {}).found["0", 0]["text"] == "\ud83d é"


def test_training_asks_a_few_items_and_is_not_kept_waiting(chat, tmp_path, monkeypatch):
    (tmp_path / "gsm8k").mkdir()
    rows = [{"question": f"{n} + 1?", "answer": f"#### {n + 1}"} for n in range(6)]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "gsm8k" / "test.jsonl").write_text(lines)
    settings = config.Benchmarks(tasks=("gsm8k",), data=tmp_path, limit=5, max_new_tokens=4)
    benchmark = make_benchmark(settings, tmp_path / "out", lambda _: chat)
    requests = []
    ask = chat.sampler.run
    monkeypatch.setattr(
        chat.sampler, "run", lambda p, asked: requests.extend(asked) or ask(p, asked)
    )
    assert list(benchmark(chat.parameters, lambda: False)) == ["eval/gsm8k/score"]
    assert [request.max_new_tokens for request in requests] == [4] * 5
    looks = []
    assert benchmark(chat.parameters, lambda: len(looks) == 2 or looks.append(0)) == {}


def test_training_may_measure_likelihoods(chat, tmp_path, monkeypatch):
    path = tmp_path / "mmlu" / "test" / "law_test.csv"
    path.parent.mkdir(parents=True)
    path.write_text("".join(f"Why?,a,b,c,d,{letter}\n" for letter in "ABCD"))
    settings = config.Benchmarks(tasks=("mmlu",), data=tmp_path, mmlu_method="likelihood")
    monkeypatch.setattr(chat.sampler, "run", None)  # nothing is generated
    benchmark = make_benchmark(settings, tmp_path / "out", lambda _: chat)
    # The same letter is the likeliest for one question with four golds, so one of four is right.
    assert benchmark(chat.parameters, lambda: False) == {"eval/mmlu/score": 25.0}


def test_training_may_measure_slices_of_teval(chat, tmp_path, log_text):
    (tmp_path / "teval").mkdir()
    record = {
        "origin_prompt": [{"role": "user", "content": "Choose."}],
        "ground_truth": {"answer": "B", "thought": ""},
        "meta_data": {"response_format": "str"},
        "template": "",
    }
    text = json.dumps({str(number): record for number in range(9)})
    (tmp_path / "teval" / "review_str_v2.json").write_text(text)
    settings = config.Benchmarks(tasks=("teval",), data=tmp_path, limit=4, max_new_tokens=4)
    benchmark = make_benchmark(settings, tmp_path / "out", lambda _: chat)
    assert benchmark(chat.parameters, lambda: False) == {"eval/teval.review_str.answer/score": 0.0}
    benchmark(chat.parameters, lambda: False)
    assert log_text.getvalue().count("eval.benchmarks: teval: not measured, because there is") == 1


def test_a_benchmark_that_needs_a_judge_is_refused_in_training(chat, tmp_path):
    with pytest.raises(UserError, match=r"eval.benchmarks.tasks names mt_bench"):
        make_benchmark(config.Benchmarks(tasks=("mt_bench",)), tmp_path, lambda _: chat)


def test_an_id_that_comes_twice_is_refused(tmp_path):
    (tmp_path / "humaneval").mkdir()
    row = {
        **{"task_id": "HumanEval/0", "entry_point": "f", "prompt": "def f():\n    pass\n"},
        **{"canonical_solution": "    pass\n", "test": "def check(f):\n    assert True\n"},
    }
    path = tmp_path / "humaneval" / "HumanEval.jsonl"
    path.write_text(2 * (json.dumps(row) + "\n"))
    options = BenchmarkOptions(
        data=tmp_path, out=tmp_path, allow_code_execution=True, sandbox="weak"
    )
    with pytest.raises(UserError, match=r"humaneval: 1 ids occur more than once.*HumanEval/0"):
        open_task("humaneval", options)


def test_a_follow_up_is_asked_after_the_answer_before_it(chat, options):
    item = Item("0", (Message("user", "Say 0."),), 0, follow_ups=("Again.", "And again."))
    log = ResponseLog(None, {})
    ((_, response),) = collect_responses(
        Echo(options), [item], chat, options, log, lambda count: None
    )
    turns = [Message("user", "Say 0.")]
    for text, question in zip(response.texts, ("Again.", "And again.", ""), strict=True):
        one = Item("x", tuple(turns), 0)
        ((_, alone),) = collect_responses(
            Echo(options), [one], chat, options, ResponseLog(None, {}), lambda count: None
        )
        assert alone.texts == (text,)
        turns += [Message("assistant", text), Message("user", question)]


def test_samples_of_an_item_differ_and_are_the_same_again(chat, options):
    options = BenchmarkOptions(data=options.data, out=options.out, samples=3, temperature=1.0)
    items = Echo(options).load()[:1]

    def texts(asked):
        log = ResponseLog(None, {})
        answered = collect_responses(Echo(options), asked, chat, options, log, lambda count: None)
        return answered[0][1].texts

    first = texts(items)
    assert len(set(first)) == 3
    assert texts([*items, *Echo(options).load()[1:]]) == first  # whatever is beside them


def test_choices_are_weighed_and_nothing_is_written(chat, options):
    item = Item("0", (Message("user", "A or B?"),), "B", choices=("A", "B", "AA"))
    log = ResponseLog(None, {})
    ((_, response),) = collect_responses(
        Echo(options), [item], chat, options, log, lambda count: None
    )
    prompt = chat.prompt(item.messages)
    assert response.texts == ()
    model = make_model(preset("micro"))(chat.parameters)
    for choice, found in zip(item.choices, response.log_likelihoods, strict=True):
        ids = chat.tokenizer.encode(choice)
        logits = model(np.array([[*prompt, *ids]], np.int32))[0]
        logs = jax.nn.log_softmax(logits[len(prompt) - 1 : -1])
        expected = sum(float(logs[n, token]) for n, token in enumerate(ids))
        assert found == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(("policy", "counted"), [("fail", 3), ("skip", 2)])
def test_an_item_longer_than_the_context_is_counted(chat, options, policy, counted):
    options = BenchmarkOptions(data=options.data, out=options.out, too_long=policy)
    items = Echo(options).load()
    items[1] = Item("1", (Message("user", "word " * 200),), 1)
    summary = run(chat, options, items)["tasks"]["echo"]
    assert summary["items"] == counted
    assert summary["skipped"] == 3 - counted
    assert summary["settings"]["too_long"] == policy
    assert summary["failures"].get("too long", 0) == counted - 2
    assert summary["complete"] == (policy == "fail")


def test_logits_that_are_not_finite_are_named(options, chat):
    broken = jax.tree.map(lambda x: x * np.nan, chat.parameters)
    model = preset("micro")
    tokenizer = load_tokenizer(SAMPLES / "tokenizer")
    make_chat = make_chat_model(make_model(model), model, tokenizer, None, context=128)
    summary = run(make_chat(broken), options)["tasks"]["echo"]
    assert summary["failures"]["not finite"] == 3
    assert any("not finite for 3 items, the first 0" in note for note in summary["notes"])


def test_a_checkpoint_is_known_by_its_files_wherever_it_lies(tmp_path):
    for step, file in (("a", "x1"), ("b", "x1"), ("c", "y2")):
        (tmp_path / step / "parameters" / "d").mkdir(parents=True)
        (tmp_path / step / "parameters" / "d" / file).write_text("0")
    known = [parameters_fingerprint(tmp_path / step) for step in "abc"]
    assert known[0] == known[1] != known[2]
    (tmp_path / "b" / "parameters" / "d" / "x1").write_text("01")
    assert parameters_fingerprint(tmp_path / "b") != known[0]


def test_evenly_spaced_items_cover_the_file():
    items = list(range(10))
    assert evenly_spaced(items, 4) == [0, 2, 5, 7]
    assert evenly_spaced(items, None) == evenly_spaced(items, 20) == items


def test_the_interval_and_the_groups_are_of_the_items(options):
    items = [Item(str(n), (), 0, group="ab"[n % 2]) for n in range(100)]
    scored = [(i, Response(("",), ("stop",)), Score({"accuracy": float(n < 40)})) for n, i in
              enumerate(items)]  # fmt: skip
    summary = summarize(Echo(options), scored, skipped=0, all_items=True)
    assert summary["score"] == 40.0
    low, high = summary["interval"]
    # The normal approximation's is 40 +- 9.6.
    assert low == pytest.approx(30.4, abs=1.5)
    assert high == pytest.approx(49.6, abs=1.5)
    assert not summary["complete"]  # 100 items are not the three of the benchmark
    assert summary["groups"]["a"] == {"items": 50, "accuracy": 0.4}


def test_a_part_of_a_benchmark_is_not_complete(options):
    scored = [(Item("0", (), 0), Response(("",), ("stop",)), Score({"accuracy": 1.0}))] * 3
    assert summarize(Echo(options), scored, skipped=0, all_items=True)["complete"]
    assert not summarize(Echo(options), scored, skipped=0, all_items=False)["complete"]
    assert not summarize(Echo(options), scored, skipped=1, all_items=True)["complete"]


def test_an_answer_that_is_missing_for_a_known_reason_fails_once(options):
    wrong = Score({"accuracy": 0.0}, "no answer")
    ends = ("too_long", "not_finite", "length", "stop")
    scored = [(Item(end, (), 0), Response(("",), (end,)), wrong) for end in ends]
    assert summarize(Echo(options), scored, skipped=0, all_items=True)["failures"] == {
        "no answer": 2, "too long": 1, "not finite": 1, "cut at its length": 1,
    }  # fmt: skip


def test_the_last_of_the_seven_brings_the_overall_figure(chat, options, monkeypatch):
    monkeypatch.setattr(Echo, "name", "gsm8k")
    first = run(chat, options)
    assert first["overall"] is None
    gsm8k = first["tasks"]["gsm8k"]
    others = ("math", "humaneval", "mbpp", "mmlu", "mt_bench", "teval")
    first["tasks"] |= {name: {**gsm8k, "score": 30.0} for name in others}
    (options.out / "results.json").write_text(json.dumps(first))
    assert run(chat, options)["overall"] == pytest.approx((6 * 30 + gsm8k["score"]) / 7)


def test_the_overall_figure_needs_all_seven_in_full():
    names = ("gsm8k", "math", "humaneval", "mbpp", "mmlu", "mt_bench", "teval")
    tasks = {name: {"score": 10.0 * n, "complete": True} for n, name in enumerate(names)}
    assert overall(tasks) == 30.0
    assert overall({**tasks, "mmlu": {"score": 40.0, "complete": False}}) is None
    assert overall({name: tasks[name] for name in names[1:]}) is None


def test_the_outcomes_of_items_add_up(options):
    """Unlike failures: an answer that was cut and is wrong fails twice."""
    scored = [
        (Item(str(n), (), 0), Response(("",), (finish,)), Score(metrics, failure))
        for n, (finish, metrics, failure) in enumerate(
            [
                ("stop", {"accuracy": 1.0}, None),
                ("length", {"accuracy": 0.0}, None),
                ("length", {"accuracy": 0.0}, "no answer"),
                ("too_long", {"accuracy": 0.0}, "no answer"),
                ("stop", {"accuracy": 0.25}, None),
                ("stop", {}, None),
            ]
        )
    ]
    found = summarize(Echo(options), scored, skipped=0, all_items=True)
    assert found["outcomes"] == dict.fromkeys(
        ["right", "wrong", "no answer", "too long", "partly right", "not scored"], 1
    )
    assert sum(found["outcomes"].values()) == found["items"]


def test_ratings_are_neither_right_nor_wrong(options, monkeypatch):
    monkeypatch.setattr(Echo, "rated", True)
    monkeypatch.setattr(Echo, "weights", lambda task, counts: {"rating_1": 0.1})
    scored = [(Item("0", (), 0), Response(("",), ("stop",)), Score({"rating_1": 1.0}))]
    found = summarize(Echo(options), scored, skipped=0, all_items=True)
    assert found["outcomes"] == {"rated": 1}
    assert found["interval"] == pytest.approx((10, 10))  # a rating of 1 is not "all right"


def test_each_answer_has_its_tokens_and_progress_is_told(chat, options):
    run(chat, options)
    records = lines(options.out / "answers" / "echo.jsonl")[1:]
    for record in records:
        prompt = chat.prompt([Message("user", f"Say {record['id']}.")])
        assert record["prompt_tokens"] == len(prompt)
        assert 0 <= record["tokens"] <= Echo.max_new_tokens
    told = (options.out / "progress.log").read_text().splitlines()
    assert "echo answers: 0 of 3" in told[0]
    assert "echo answers: 3 of 3" in told[1]
    assert "echo scores: 3 of 3" in told[-1]


def test_provenance_says_what_made_a_score(chat, options):
    """Seconds and tokens, the digests of the files, and the protocol in words."""
    folder = options.data / "echo"
    (folder / "dev").mkdir(parents=True)
    (folder / "echo.jsonl").write_text("one\n")
    for name in "gcfbhdae":
        (folder / "dev" / f"{name}.csv").write_text(name)
    listed = subprocess.run(
        "find dev -type f | LC_ALL=C sort | xargs sha256sum | sha256sum",
        shell=True, cwd=folder, capture_output=True, text=True, check=True,
    )  # fmt: skip
    task = Echo(options)
    session = Session({"device": "1 x cpu (cpu)"})
    results = run_benchmarks([(task, task.load())], chat, MADE_BY, options, session)
    made = results["tasks"]["echo"]["run"]
    assert made["data"] == {
        "dev/ (8 files)": listed.stdout.split()[0],
        "echo.jsonl": hashlib.sha256(b"one\n").hexdigest(),
    }
    records = lines(options.out / "answers" / "echo.jsonl")[1:]
    assert made["prompt_tokens"] == sum(record["prompt_tokens"] for record in records)
    assert made["answer_tokens"] == sum(record["tokens"] for record in records)
    assert made["seconds"] > 0
    assert datetime.fromisoformat(made["date"]).tzinfo
    assert made["device"] == "1 x cpu (cpu)"
    told = results["tasks"]["echo"]["protocol"]
    assert told.startswith("echo: 3 items (sha256 of the files: dev/ (8 files)")
    assert "One greedy answer to each, at most 8 new tokens in a context of 128 tokens" in told


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({}, "One greedy answer to each"),
        ({"temperature": 0.0}, "One greedy answer to each"),
        (
            {"temperature": 0.8, "samples": 10, "top_p": 0.9, "seed": 3},
            "10 answers to each at temperature 0.8, top-p 0.9, seed 3",
        ),
        ({"method": "likelihood"}, "The likeliest of the given choices"),
    ],
)
def test_sampling_is_told_in_words(options, settings, told):
    own = {"samples": 1, "temperature": None, "top_p": 1.0, "seed": 0, **settings}
    assert describe_sampling(Echo(options), own) == told


def test_other_settings_are_told_in_words(options):
    own = {
        **{"samples": 1, "temperature": None, "top_p": 1.0, "seed": 0, "max_new_tokens": 8},
        **{"context": 1_024, "limit": None, "too_long": "skip", "shots": 4},
        **{"code_timeout_s": 3.0, "code_memory_mib": 512, "code_packages": [], "judge": None},
        **{"method": "generate", "judge_version": "", "files": ["a.json", "b.json"]},
    }
    told = describe_task(Echo(options), 3, 3, own, {"echo.jsonl": "0123456789abcdef0123"})
    assert told == (
        "echo: 3 items (sha256 of the files: echo.jsonl 0123456789abcdef). One greedy answer to "
        "each, at most 8 new tokens in a context of 1,024 tokens, 4 worked examples. An item that "
        "does not fit the context is left out. Where a metric is 1 for all items, or 0 for all, "
        "its interval is that of Clopper and Pearson. Further settings: code timeout 3 s, code "
        "memory 512 MiB, method generate, files a.json, b.json."
    )


def test_a_protocol_that_samples_says_so(options, monkeypatch):
    monkeypatch.setattr(Echo, "own_temperature", "at the temperature of its category")
    own = {"samples": 1, "temperature": None, "top_p": 1.0, "seed": 0}
    assert describe_sampling(Echo(options), own) == (
        "One answer to each at the temperature of its category, seed 0"
    )
    assert describe_sampling(Echo(options), {**own, "temperature": 0.0}).startswith("One greedy")
