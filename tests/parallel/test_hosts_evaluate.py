"""Two processes of two devices evaluate and answer as one process of four does."""

import json
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from moi_jax.checkpoints.opener import open_checkpoint
from moi_jax.sampling.completion_file import complete_file, read_conversations
from moi_jax.sampling.requests import GenerationConfig

from support.evaluated_run import MESH, train_and_evaluate
from support.hosts import end_hosts, run_hosts, start_hosts
from support.published import tiny_published
from support.runs import records, small_config

# Floats that are summed in another order.
TOLERANCE = 2e-5
QUESTIONS = [
    {"question": f"Ann has {n} apples and buys 2. How many has she?", "answer": f"#### {n + 2}"}
    for n in range(3)
]
CHOICES = "How much is {0} plus 1?,0,1,2,{0},A\n"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """A run from published weights that one process has trained and evaluated."""
    place = tmp_path_factory.mktemp("alone")
    prepare(place)
    train_and_evaluate(place, jax.devices()[:4])
    return place


@pytest.fixture(scope="module")
def together(tmp_path_factory):
    """The same by two processes, and how they ended: the data of a benchmark is then missing."""
    place = tmp_path_factory.mktemp("together")
    prepare(place)
    return place, *run_hosts(2, 2, ["tests.support.evaluated_run", place])


def prepare(place: Path) -> None:
    """The config of a run, its weights, and the data of two benchmarks."""
    weights = tiny_published(place / "weights", np.float32)
    data = place / "data"
    (data / "gsm8k").mkdir(parents=True)
    lines = [json.dumps(question) + "\n" for question in QUESTIONS]
    (data / "gsm8k" / "test.jsonl").write_text("".join(lines))
    (data / "mmlu" / "test").mkdir(parents=True)
    lines = [CHOICES.format(n) for n in range(3)]
    (data / "mmlu" / "test" / "sums_test.csv").write_text("".join(lines))
    benchmarks = {"tasks": ["gsm8k"], "data": str(data), "limit": 2, "max_new_tokens": 6}
    prompts = [{"domain": "maths", "prompt": "What is 2 + 3?"}]
    small_config(
        place,
        model={"preset": None, "init_from": str(weights)},
        train={
            "steps": 2,
            "global_batch_rows": 4,
            "sample_prompts": prompts,
            "sample_max_new_tokens": 6,
        },
        checkpoint={"every": 2},
        eval={"every": 0, "benchmarks": benchmarks},
    )


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# What two runs differ in: names of their files, and time.
DIFFERENT = {"parameters", "untrained", "tokens_per_second", "loss_tokens_per_second"}


def same(left, right) -> None:
    """Asserts that JSON values are equal: floats within the tolerance, all else exactly."""
    if isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left.keys() - DIFFERENT:
            same(left[key], right[key])
    elif isinstance(left, list):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            same(*pair)
    elif isinstance(left, float):
        assert left == pytest.approx(right, abs=TOLERANCE, rel=TOLERANCE, nan_ok=True)
    else:
        assert left == right


def test_training_logs_the_same_losses_scores_and_samples_once(alone, together):
    runs = alone / "run", together[0] / "run"
    metrics = [
        [
            {k: v for k, v in r.items() if "per_second" not in k}
            for r in records(run / "metrics.jsonl")
        ]
        for run in runs
    ]
    assert [r["step"] for r in metrics[0] if "eval/gsm8k/score" in r] == [0, 2]
    same(*metrics)
    samples = [read(run / "samples.jsonl") for run in runs]
    assert len(samples[0]) == 4  # two prompts at two steps
    assert samples[0] == samples[1]


def test_an_evaluation_writes_the_same_results(alone, together):
    outs = alone / "out", together[0] / "out"
    same(*(json.loads((out / "results.json").read_text()) for out in outs))
    held_out = [json.loads((out / "held_out.json").read_text()) for out in outs]
    assert held_out[1]["models"].keys() == {"trained", "untrained"}
    for each, out in zip(held_out, outs, strict=True):
        assert each.pop("checkpoint") == str(out.parent / "run" / "checkpoints" / "2")
    same(*held_out)
    for name in ("held_out_items.jsonl", "samples/gsm8k.jsonl", "samples/mmlu.jsonl"):
        same(*(read(out / name) for out in outs))
    for name in ("answers/gsm8k.jsonl", "answers/mmlu.jsonl"):
        kept = [sorted(read(out / name)[1:], key=lambda r: (r["id"], r["n"])) for out in outs]
        same(*kept)
    assert sorted(p.name for p in outs[0].iterdir()) == sorted(p.name for p in outs[1].iterdir())


def test_data_that_one_host_lacks_ends_all(together):
    place, outputs, statuses = together
    assert statuses == [2, 2]
    assert "error: gsm8k: there is nothing in data/gsm8k/test.jsonl" in outputs[1][1]
    (line,) = [line for line in outputs[0][1].splitlines() if line.startswith("error: ")]
    assert line.startswith("error: process 1 (")
    assert "stopped: gsm8k: there is nothing in data/gsm8k/test.jsonl" in line
    assert not (place / "other").exists()


@pytest.fixture
def conversations(tmp_path):
    path = tmp_path / "conversations.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"Count to {n}."}]} for n in range(40)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_a_file_of_answers_goes_on_after_a_kill(alone, conversations, tmp_path):
    out = tmp_path / "out.jsonl"
    command = [
        *("moi_jax.generate", alone / "run", "--conversations", conversations, "--out", out),
        *("--max-new-tokens", "8", "--slots", "2", "--mesh", MESH),
    ]
    partial = tmp_path / "out.jsonl.partial"
    processes = start_hosts(2, 2, command)
    while not (partial.exists() and len(partial.read_bytes().splitlines()) > 4):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.kill()
    end_hosts(processes)
    # An answer that is asked again would not be this one.
    head, first, *more = partial.read_text().splitlines(keepends=True)
    kept = json.loads(first)
    partial.write_text("".join([head, json.dumps({**kept, "text": "kept"}) + "\n", *more]))

    outputs, statuses = run_hosts(2, 2, command)
    assert statuses == [0, 0], outputs
    checkpoint = open_checkpoint(alone / "run", devices=jax.devices()[:4], mesh=MESH)
    complete_file(
        checkpoint, read_conversations(conversations), tmp_path / "alone.jsonl",
        GenerationConfig(max_new_tokens=8), system=checkpoint.system_prompt, slots=2,
    )  # fmt: skip
    expected = read(tmp_path / "alone.jsonl")
    expected[int(kept["id"])]["messages"][-1]["content"] = "kept"
    assert read(out) == expected
    assert not partial.exists()


def test_what_process_0_refuses_is_told_by_all(alone, conversations, tmp_path):
    out = tmp_path / "out.jsonl"
    out.write_text("mine")
    command = ["moi_jax.generate", alone, "--conversations", conversations, "--out", out]
    outputs, statuses = run_hosts(2, 2, command)
    assert statuses == [2, 2]
    assert f"error: {out} exists" in outputs[0][1]
    assert "error: process 0 (" in outputs[1][1]
    assert f"stopped: {out} exists" in outputs[1][1]
    assert out.read_text() == "mine"
