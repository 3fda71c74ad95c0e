"""The protocol of each kind of task in words: true for it, and without empty settings."""

from pathlib import Path

import pytest

from moi_jax.evaluation.benchmarks import all_settings
from moi_jax.evaluation.methods import describe_held_out, describe_lm_eval, describe_task
from moi_jax.evaluation.options import BenchmarkOptions, HeldOutOptions
from moi_jax.evaluation.tasks import make_task

CODE = {"allow_code_execution": True, "sandbox": "weak"}
JUDGE = {"judge": "j", "judge_url": "http://me:pw@host/v1?key=SECRET"}
SHARE = "Where a metric is 1 for all items, or 0 for all"


@pytest.fixture
def told(tmp_path: Path):
    """Describes ten items of a task under some options."""

    def describe(name: str, **given) -> str:
        options = BenchmarkOptions(tmp_path, tmp_path / "out", **given)
        task = make_task(name, options)
        settings = all_settings(task, None, 1_024, options, task.settings())
        words = describe_task(task, 10, 10, settings, {})
        assert " ," not in words
        assert " ." not in words
        return words

    return describe


@pytest.mark.parametrize(
    ("name", "given", "there", "not_there"),
    [
        ("gsm8k", {}, ["One greedy answer to each, at most 512", SHARE], ["mean over", "judge"]),
        (
            "gsm8k",
            {"samples": 5, "temperature": 0.5},
            ["5 answers to each at temperature 0.5", "The score of an item is the mean over its"],
            [],
        ),
        (
            "mmlu",
            {"mmlu_method": "likelihood", "samples": 5, "temperature": 0.5},
            ["The likeliest of the given choices, in a context of 1,024 tokens", SHARE],
            ["new tokens", "answers to each", "mean over"],
        ),
        ("mmlu", {}, ["at most 512 new tokens", "method generate"], []),
        (
            "mt_bench",
            {},
            ["One answer to each of the 2 turns of an item", "so there is no score", "is empty"],
            ["A judge rates", "counts as wrong", "Clopper", "Further settings"],
        ),
        (
            "mt_bench",
            {**JUDGE, "temperature": 0.0, "too_long": "skip"},
            ["One greedy answer to each of the 2 turns of an item", "A judge rates both answers",
             "is left out", "judge url http://host/v1, judge prompts"],
            ["Clopper", "judge version", "SECRET", "pw"],
        ),
        ("teval", {}, ["mean of the six abilities", SHARE], [", files", "data version"]),
        ("humaneval", CODE, ["in the sandbox (pass@1). An item"], ["estimates", "packages"]),
        (
            "humaneval",
            {**CODE, "samples": 10, "temperature": 0.8},
            ["unbiased estimates of pass@10 too", "10 answers to each", "mean over its answers"],
            ["pass@100"],
        ),
        (
            "mbpp",
            {**CODE, "samples": 100, "temperature": 0.8},
            ["unbiased estimates of pass@10 and pass@100 too"],
            [],
        ),
    ],
)  # fmt: skip
def test_the_words_are_true_for_each_kind_of_task(told, name, given, there, not_there):
    words = told(name, **given)
    assert [part for part in there if part not in words] == []
    assert [part for part in not_there if part in words] == []


def test_held_out_losses_are_told():
    words = describe_held_out(HeldOutOptions())
    assert words.startswith("held_out: losses and accuracies on the held-out conversations of the")
    assert "start of training" in words
    words = describe_held_out(HeldOutOptions(untrained=Path("base"), limit=50))
    assert "50 of each domain, evenly spaced" in words
    assert "The same is measured for base." in words


def test_tasks_of_the_harness_are_told():
    pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed (extra: eval)")
    options = BenchmarkOptions(Path("data"), Path("out"))
    words = describe_lm_eval(["arc_easy", "piqa"], options)
    assert ": arc_easy, piqa. All items. Prompts are rendered by the chat template, with " in words
    assert "Answers are made as the task says. " in words
    options = BenchmarkOptions(
        Path("data"), Path("out"), limit=5, shots=3, max_new_tokens=9, temperature=0.0, top_p=0.9
    )
    words = describe_lm_eval(["piqa"], options)
    assert "The first 5 items of each. " in words
    assert "with 3 worked examples. " in words
    assert "but with at most 9 new tokens, temperature 0.0, top-p 0.9. " in words
