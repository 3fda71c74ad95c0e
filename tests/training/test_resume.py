"""Runs that are killed, stopped, resumed, refused; signals go to their own processes."""

import contextlib
import copy
import os
import random
import shutil
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest

import moi_jax
from moi_jax.common.errors import UserError
from moi_jax.config.load import make_config
from moi_jax.training.resume import config_changes
from moi_jax.training.run_directory import LOCK

from support.runs import (
    ROOT,
    SAMPLES,
    TWO_DEVICES,
    lasting,
    logged_steps,
    parameters,
    records,
    refusal,
    same_parameters,
    small_config,
    stop_after,
    train_command,
    train_here,
    train_until,
)

# Two epochs and a last batch that is not full, in microbatches, over two devices.
HARD = {
    "train": {"steps": None, "epochs": 2, "global_batch_rows": 6, "microbatch_rows": 2},
    "mesh": {"fsdp": 2},
}


def test_a_setting_that_is_newer_than_the_run_counts_as_its_default():
    now = make_config({}).model_dump(mode="json")
    before = copy.deepcopy(now)
    del before["model"]["splash_blocks"], before["optimizer"]["gradient_dtype"]
    assert list(config_changes(before, now)) == []
    now["optimizer"]["gradient_dtype"] = "bfloat16"
    assert list(config_changes(before, now)) == [
        ("optimizer.gradient_dtype: float32 -> bfloat16", "if allowed")
    ]


def test_another_optimizer_is_another_run():
    now = make_config({}).model_dump(mode="json")
    before = copy.deepcopy(now)
    before["optimizer"]["name"] = "lion"
    assert list(config_changes(before, now)) == [("optimizer.name: lion -> adamw", "never")]


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    directory = tmp_path_factory.mktemp("uninterrupted")
    return train_here(small_config(directory)).directory


def test_a_run_killed_at_three_random_steps_ends_bit_identical(tmp_path, log_text):
    """Kill -9 also hits saves in progress: only a complete checkpoint counts."""
    (tmp_path / "whole").mkdir()
    train_here(small_config(tmp_path / "whole", **HARD), devices=2)
    whole = records(tmp_path / "whole" / "run" / "metrics.jsonl")
    last = whole[-1]["step"]
    assert whole[-1]["epoch"] == 1
    assert "empty rows fill up the run's last batch" in log_text.getvalue()
    config = small_config(tmp_path, **HARD)
    third = last // 3
    for low, high in ((1, third), (third + 1, 2 * third), (2 * third + 1, last - 1)):
        step = random.SystemRandom().randint(low, high)
        status = train_until(config, step, signal.SIGKILL, TWO_DEVICES)
        assert status == -signal.SIGKILL, f"killed at step {step}"
    train_here(config, devices=2)
    same_parameters(parameters(tmp_path / "run"), parameters(tmp_path / "whole" / "run"))
    # The log reads as if nothing had happened: every step once, with the same losses.
    ours = records(tmp_path / "run" / "metrics.jsonl")
    assert [r["step"] for r in ours] == list(range(last + 1))
    assert [lasting(record) for record in ours] == [lasting(record) for record in whole]


def test_sigterm_saves_the_step_and_the_run_resumes_exactly(uninterrupted, tmp_path, log_text):
    config = small_config(tmp_path, checkpoint={"every": 100})
    assert train_until(config, 4, signal.SIGTERM) == 128 + signal.SIGTERM
    saved = [int(p.name) for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert len(saved) == 1
    assert 4 <= saved[0] < 10
    # Accumulation and logging may change too, but the losses may then differ in their last bits.
    # So only the checkpoint interval changes here.
    train_here(config, "checkpoint.every=5")
    assert f"resuming from step {saved[0]}" in log_text.getvalue()
    assert "checkpoint.every: 100 -> 5" in log_text.getvalue()
    same_parameters(parameters(tmp_path / "run"), parameters(uninterrupted))


def test_a_finished_run_is_left_as_it_is(uninterrupted, tmp_path, log_text):
    directory = tmp_path / "run"
    shutil.copytree(uninterrupted, directory)
    before = (directory / "metrics.jsonl").read_bytes()
    (directory / "report.html").unlink()  # as when it was killed before it wrote one
    assert train_here(small_config(tmp_path)).finished
    assert "is complete" in log_text.getvalue()
    assert (directory / "metrics.jsonl").read_bytes() == before
    assert (directory / "report.html").exists()


def test_a_run_is_not_resumed_with_fewer_steps_than_it_has(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = (tmp_path / "run" / "config.yaml").read_bytes()
    said = refusal(small_config(tmp_path), "train.steps=7", allow_change=True)
    assert "is at step 10, past the 7 steps of the config" in said
    assert (tmp_path / "run" / "config.yaml").read_bytes() == before


def test_a_damaged_log_or_config_does_not_keep_a_run_from_resuming(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "config.yaml").write_text("train: {")
    log = tmp_path / "run" / "metrics.jsonl"
    log.write_bytes(log.read_bytes() + b'{}\n5\n\xff\n{"step"')
    train_here(small_config(tmp_path), "train.steps=11", allow_change=True)
    assert logged_steps(log) == list(range(1, 12))


def test_a_damaged_checkpoint_is_one_line(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "10" / "optimizer")
    resumed = {"allow_change": True, "strict_resume": True}
    said = refusal(small_config(tmp_path), "train.steps=11", **resumed)
    assert "checkpoints/10 is damaged (optimizer is missing), and a strict resume" in said
    with pytest.raises(UserError, match="is no checkpoint"):
        moi_jax.load(tmp_path / "nothing")
    (tmp_path / "only" / "parameters").mkdir(parents=True)
    with pytest.raises(UserError, match="is damaged or incomplete"):
        moi_jax.load(tmp_path / "only")


def test_a_stopped_run_leaves_its_last_save_whole(tmp_path):
    """An error that ends a run waits for the save in progress."""
    config = small_config(tmp_path, checkpoint={"every": 1})
    done = train_command(config, "optimizer.learning_rate=1e36", "optimizer.clip_norm=null")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert not list((tmp_path / "run" / "checkpoints").glob("*tmp*"))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.seed=1"], "train.seed: 0 -> 1"),
        (["data.mask=row"], "data.mask: chunk -> row"),
        (["data.domains.1.prompt=Count."], "data.domains.1.prompt"),
        (["optimizer.learning_rate=0.5"], "--allow-change resumes with the new value"),
        (["train.steps=12"], "--allow-change resumes with the new value"),
    ],
)
def test_a_run_is_not_resumed_as_another_run(uninterrupted, tmp_path, overrides, message):
    shutil.copytree(uninterrupted, tmp_path / "run")
    before = sorted(p.name for p in (tmp_path / "run").rglob("*"))
    assert message in refusal(small_config(tmp_path), *overrides)
    assert sorted(p.name for p in (tmp_path / "run").rglob("*")) == before


def test_a_refused_change_is_one_line_and_exit_status_2(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    config = small_config(tmp_path)
    done = train_command(config, "train.steps=12")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "train.steps: 10 -> 12; --allow-change resumes with the new value" in done.stderr
    done = train_command(config, "train.steps=12", "--allow-change")
    assert done.returncode == 0, done.stderr
    assert "resuming with train.steps: 10 -> 12 (allowed)" in done.stdout


def test_changed_data_is_refused_though_its_path_is_the_same(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    shutil.copytree(SAMPLES, tmp_path / "samples")
    chat = tmp_path / "samples" / "chat.jsonl"
    lines = chat.read_text(encoding="utf-8").splitlines(keepends=True)
    chat.write_text("".join(lines[1:]), encoding="utf-8")
    said = refusal(small_config(tmp_path), f"data.root={tmp_path / 'samples'}")
    assert "the content of data has changed" in said


def test_a_longer_run_and_another_batch_size_resume_when_allowed(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "run_id").write_text("0" * 32 + " 1f 7.1f")
    changes = ["train.steps=12", "train.global_batch_rows=4"]
    train_here(small_config(tmp_path), *changes, allow_change=True)
    # Local copies of an earlier start are behind the run now, so they are of its history no more.
    assert (tmp_path / "run" / "run_id").read_text() == "0" * 32
    last = records(tmp_path / "run" / "metrics.jsonl")[-2:]
    # Ten batches of two rows, then two of four.
    assert [r["row"] for r in last if "row" in r][-1] == 10 * 2 + 2 * 4


def test_a_run_that_cannot_start_leaves_the_history_of_its_local_copies(
    uninterrupted, tmp_path, monkeypatch
):
    shutil.copytree(uninterrupted, tmp_path / "run")
    (tmp_path / "run" / "run_id").write_text("0" * 32 + " 1f 7.1f")
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert "not installed" in refusal(small_config(tmp_path), "logging.trackers=[wandb]")
    assert (tmp_path / "run" / "run_id").read_text() == "0" * 32 + " 1f 7.1f"


def test_a_run_resumes_on_another_mesh_with_other_microbatches(uninterrupted, tmp_path, log_text):
    config = small_config(tmp_path)
    assert train_here(config, make_evaluations=None, stop=stop_after(3)).step == 3
    train_here(config, "mesh.tensor=2", "train.microbatch_rows=1", devices=2)
    assert "resuming with mesh.tensor: 1 -> 2" in log_text.getvalue()
    assert "resuming with train.microbatch_rows: None -> 1" in log_text.getvalue()
    whole, ours = (
        [r["loss"] for r in records(run / "metrics.jsonl") if "token_loss" in r]
        for run in (uninterrupted, tmp_path / "run")
    )
    np.testing.assert_allclose(ours, whole, rtol=0, atol=2e-5)


def test_fresh_moves_the_old_run_aside(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    done = train_command(small_config(tmp_path), "--fresh", "train.steps=1")
    assert done.returncode == 0, done.stderr
    aside = next(p for p in tmp_path.iterdir() if p.name.startswith("run."))
    assert logged_steps(aside / "metrics.jsonl")[-1] == 10
    assert logged_steps(tmp_path / "run" / "metrics.jsonl") == [1]


def test_a_checkpoint_is_complete_wherever_it_is_copied(uninterrupted, tmp_path):
    newest = max((uninterrupted / "checkpoints").glob("[0-9]*"), key=lambda p: int(p.name))
    shutil.copytree(newest, tmp_path / "elsewhere")
    model, tokenizer = moi_jax.load(tmp_path / "elsewhere")
    assert tokenizer.decode(tokenizer.encode("Hello!")) == "Hello!"
    logits = model(np.array([tokenizer.encode("How are you?")], np.int32))
    assert logits.shape[-1] == 2048
    assert np.isfinite(logits).all()
    same_parameters(parameters(tmp_path / "elsewhere"), parameters(uninterrupted))


def test_a_foreign_directory_is_left_alone(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("precious: thesis")
    assert "is not a run directory" in refusal(small_config(tmp_path))
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["config.yaml"]
    assert (tmp_path / "run" / "config.yaml").read_text() == "precious: thesis"


def test_fresh_moves_nothing_before_the_config_is_known_to_work(uninterrupted, tmp_path):
    shutil.copytree(uninterrupted, tmp_path / "run")
    refusal(small_config(tmp_path), "data.domains.0.sources.0.path=nothing*", fresh=True)
    assert logged_steps(tmp_path / "run" / "metrics.jsonl")[-1] == 10
    relative = os.path.relpath(tmp_path / "run", ROOT)
    for source in (tmp_path / "run" / "checkpoints", tmp_path / "run", relative):
        begins_there = (f"model.init_from={source}", "model.preset=null")
        assert "--fresh would move" in refusal(small_config(tmp_path), *begins_there, fresh=True)


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_an_unwritable_run_directory_is_one_line(tmp_path):
    (tmp_path / "locked").mkdir(mode=0o500)
    said = refusal(small_config(tmp_path), f"logging.run_dir={tmp_path / 'locked' / 'run'}")
    assert "cannot write the run directory" in said


def test_a_run_directory_below_a_file_is_one_line(tmp_path):
    (tmp_path / "file").write_text("x")
    said = refusal(small_config(tmp_path), f"logging.run_dir={tmp_path / 'file' / 'run'}")
    assert "cannot write the run directory" in said


def test_a_live_run_locks_its_directory(tmp_path):
    import filelock

    (tmp_path / "run").mkdir()
    with filelock.FileLock(tmp_path / "run" / LOCK):
        done = train_command(small_config(tmp_path))
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "in use by another run" in done.stderr


def test_a_run_that_another_planner_planned_is_refused_by_name(uninterrupted, monkeypatch):
    monkeypatch.setattr("moi_jax.training.resume.PLANNER", 3)
    with pytest.raises(UserError, match=r"planner 2, and this version has planner 3.*--fresh"):
        train_here(small_config(uninterrupted.parent))


ANSWER = {
    "domain": "chat",
    "system": "own",
    "system_prompt": "",
    "prompt": "Well?",
    "answer": "Yes.",
}


class Held:
    """Held-out losses of a run that is asked to stop in an evaluation: at step 0 in the first."""

    def __init__(self, stop_in):
        self.calls, self.stop_in, self.stopping = 0, stop_in, False

    def losses(self, *_):
        self.calls += 1
        if self.calls == self.stop_in:
            self.stopping = True
            return {}
        names, kinds = ("chat", "maths", "mean"), ("loss", "default_prompt/loss")
        return {f"eval/{name}/{kind}": 1.5 for name in names for kind in kinds}

    def train(self, config):
        self.stopping = False
        return train_here(
            config,
            make_evaluations=lambda *_: SimpleNamespace(
                held_out=self.losses, benchmarks=None, samples=lambda _: [ANSWER]
            ),
            stop=contextlib.nullcontext(lambda: self.stopping),
        )


@pytest.mark.parametrize("stop_in", [1, 2])
def test_an_evaluation_that_was_cut_off_is_made_once_and_logged_once(tmp_path, stop_in, log_text):
    """At the first step and after the last one."""
    config = small_config(tmp_path, train={"steps": 1})
    held = Held(stop_in)
    assert not held.train(config).finished
    assert "is complete" not in log_text.getvalue()
    result = held.train(config)
    assert (result.finished, held.calls) == (True, 3)
    for _ in range(2):  # nothing is left to make up for, though no later checkpoint was saved
        assert held.train(config).finished
    assert held.calls == 3
    log = records(result.directory / "metrics.jsonl")
    assert [(r["step"], r["eval/mean/loss"]) for r in log] == [(0, 1.5), (1, 1.5)]
    answers = records(result.directory / "samples.jsonl")
    assert [answer["step"] for answer in answers] == [0, 1]
