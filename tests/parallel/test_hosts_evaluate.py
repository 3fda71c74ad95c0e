"""Two processes of two devices evaluate and answer as one process of four does."""

import json
import shutil
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from moi_jax.checkpoints.hf.importer import import_checkpoint

from support.evaluated_run import answer_train_and_evaluate, generate_arguments
from support.hosts import end_hosts, run_hosts, start_hosts
from support.published import micro_published
from support.runs import lasting, records, small_config

# Floats that are summed in another order.
TOLERANCE = 2e-5
QUESTIONS = [
    {"question": f"Ann has {n} apples and buys 2. How many has she?", "answer": f"#### {n + 2}"}
    for n in range(3)
]
CHOICES = "How much is {0} plus 1?,0,1,2,{0},A"


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Where one process has answered, trained and evaluated."""
    place = tmp_path_factory.mktemp("alone")
    prepare(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [])  # which the commands read
        answer_train_and_evaluate(place, 4)
    return place


@pytest.fixture(scope="module")
def together(tmp_path_factory, alone):
    """Where two processes have done the same after a kill of both; how they ended, and what the
    kill left of the answers."""
    place = tmp_path_factory.mktemp("together")
    prepare(place)
    shutil.rmtree(place / "ckpt")
    shutil.copytree(alone / "ckpt", place / "ckpt")
    partial = place / "answers.jsonl.partial"
    processes = start_hosts(2, 2, ["moi_jax.generate", *generate_arguments(place)])
    while not (partial.exists() and partial.read_bytes().count(b"\n") > 4):
        assert all(process.poll() is None for process in processes)
        time.sleep(0.01)
    for process in processes:
        process.kill()
    end_hosts(processes)
    # An answer that is asked for again would not be this one.
    head, first, *more = partial.read_text().splitlines(keepends=True)
    kept = {**json.loads(first), "text": "kept"}
    partial.write_text("".join([head, json.dumps(kept) + "\n", *more]))
    return place, *run_hosts(2, 2, ["tests.support.evaluated_run", place]), int(kept["id"])


def prepare(place: Path) -> None:
    """Weights and a checkpoint, conversations, the data of two benchmarks, the config of a run."""
    weights = micro_published(place / "weights", np.float32, num_layers=1)
    import_checkpoint(weights, place / "ckpt")
    rows = [{"messages": [{"role": "user", "content": f"Count to {n}."}]} for n in range(40)]
    write(place / "conversations.jsonl", [json.dumps(row) for row in rows])
    write(place / "data/gsm8k/test.jsonl", [json.dumps(question) for question in QUESTIONS])
    write(place / "data/mmlu/test/sums_test.csv", [CHOICES.format(n) for n in range(3)])
    benchmarks = {"tasks": ["gsm8k"], "data": str(place / "data"), "limit": 2}
    train = {
        "sample_prompts": [{"domain": "maths", "prompt": "What is 2 + 3?"}],
        "sample_max_new_tokens": 6,
    }
    small_config(
        place,
        model={"preset": None, "init_from": str(weights)},
        train={"steps": 2, "global_batch_rows": 4, **train},
        checkpoint={"every": 2},
        eval={"every": 0, "benchmarks": {**benchmarks, "max_new_tokens": 6}},
    )


def write(path: Path, lines: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(line + "\n" for line in lines))


def read(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


# What two runs differ in: names of their files, time, and the last bits of what was trained.
DIFFERENT = {"parameters", "untrained", "tokens_per_second", "loss_tokens_per_second"}
DIFFERENT |= {"command", "date", "seconds", "values"}


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
    metrics = [[lasting(r) for r in records(run / "metrics.jsonl")] for run in runs]
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


def test_a_file_of_answers_goes_on_after_a_kill_of_both(alone, together):
    place, _, _, kept = together
    expected = read(alone / "answers.jsonl")
    expected[kept]["messages"][-1]["content"] = "kept"
    assert read(place / "answers.jsonl") == expected
    assert not (place / "answers.jsonl.partial").exists()


def test_data_that_one_host_lacks_ends_all(together):
    place, outputs, statuses, _ = together
    missing = "gsm8k: nothing in data/gsm8k/test.jsonl"
    assert statuses == [2, 2], outputs
    (told, heard) = (error.strip().splitlines()[-1] for _, error in reversed(outputs))
    assert told.startswith(f"error: {missing}")
    assert heard.startswith("error: process 1 (")
    assert f"stopped: {missing}" in heard
    assert not (place / "other").exists()
