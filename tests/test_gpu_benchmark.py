"""benchmarks/gpu.py with tiny sizes on the CPU: each part runs and leaves its file."""

import dataclasses
import importlib
import json
import subprocess
from types import SimpleNamespace

import jax
import pytest

from moi_jax.config.load import load_config

from support.runs import ROOT, open_data, small_config


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setenv("XLA_CLIENT_MEM_FRACTION", "0.9")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    module = importlib.import_module("gpu")
    monkeypatch.setattr(module, "PARTS", dict(module.PARTS))
    return module


@pytest.fixture
def results(gpu, tmp_path):
    """A part -> its results, as they are in its file."""

    def run(part):
        args = SimpleNamespace(out=tmp_path, dry=True, config=None)
        assert gpu.run_part(part, args) == 0
        report = json.loads((tmp_path / f"{part}.json").read_text())
        assert report["status"] == "done", report
        return report["results"]

    return run


@pytest.mark.skipif(
    not (ROOT / "moi_jax" / "models" / "attention" / "contract.py").exists(),
    reason="the contract of attention is not there yet",
)
def test_the_contract_holds(results):
    assert [result["passed"] for result in results("contract")] == [True]


def test_attention_is_timed_beside_a_matrix_product(results):
    product, *timed = results("attention")
    assert product["tflops"] > 0
    assert [row["direction"] for row in timed] == ["forward", "forward + backward"] * 2
    for row in timed:
        assert row["of_matmul"] == pytest.approx(row["useful_tflops"] / product["tflops"])


def test_the_train_step_runs_on_packed_rows(gpu, results):
    [result] = results("train")
    assert result["tokens"] == 2 * 128
    assert 6 < result["loss"] < 9  # of random weights: log(2,048) is 7.6
    assert [row["fits"] for row in results("largest")] == [True]
    [adapters] = results("lora")
    assert (adapters["lora_rank"], adapters["tokens"]) == (2, 2 * 128)
    assert adapters["compiler_bytes"] < result["compiler_bytes"] / 2


def test_after_a_model_that_finds_no_memory_the_next_one_runs(gpu, results, monkeypatch):
    def time_train_step(model, *_):
        if model == "large":
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory\nwhile trying")
        return {"model": model, "fits": True}

    monkeypatch.setattr(gpu, "time_train_step", time_train_step)
    sizes = dataclasses.replace(gpu.DRY, largest=(("large", 2), ("small", 2), ("tiny", 2)))
    monkeypatch.setattr(gpu, "DRY", sizes)
    large, small = results("largest")
    assert (large["fits"], large["reason"]) == (False, "RESOURCE_EXHAUSTED: Out of memory")
    assert small == {"model": "small", "fits": True}


def test_rows_of_a_config_are_one_microbatch(gpu, tmp_path):
    config = small_config(tmp_path, train={"global_batch_rows": 8, "microbatch_rows": 4})
    open_data(load_config(config))
    batch = gpu.first_batch(SimpleNamespace(config=config), 2, 256)
    assert batch.tokens.shape == (2, 256)


def test_greedy_tokens_are_those_of_the_cpu(results):
    assert [result["equal"] for result in results("greedy")] == [True]


def test_a_part_without_its_package_is_skipped_and_a_wrong_result_is_told(gpu, tmp_path, capsys):
    def lacks(*_):
        yield {"passed": True}
        raise ImportError("No module named 'tokamax'")

    def differs(*_):
        yield {"equal": False}

    gpu.PARTS.update(contract=lacks, greedy=differs)
    args = SimpleNamespace(out=tmp_path, dry=True, config=None)
    assert gpu.run_part("contract", args) == 0
    assert "contract SKIPPED: No module named 'tokamax'" in capsys.readouterr().out
    report = json.loads((tmp_path / "contract.json").read_text())
    assert (report["status"], report["results"]) == ("skipped", [{"passed": True}])
    assert gpu.run_part("greedy", args) == 1


def test_all_runs_each_part_until_the_time_is_over(gpu, tmp_path, monkeypatch, capsys):
    ran = []

    def run(command, timeout):
        ran.append(command[2])
        assert command[-2:] == ["--config", "rows.yaml"]
        if command[2] == "train":
            raise subprocess.TimeoutExpired(command, timeout)
        return SimpleNamespace(returncode=int(command[2] == "largest"))

    monkeypatch.setattr(gpu.subprocess, "run", run)
    args = SimpleNamespace(out=tmp_path, dry=True, config="rows.yaml")
    assert gpu.run_all(args) == 1
    assert ran == list(gpu.PARTS)
    assert "train SKIPPED: 6 minutes are over" in capsys.readouterr().out
