"""Whole runs with the command: the files they leave, every strategy, deliberate mistakes."""

import dataclasses
import json
import re

import jax.numpy as jnp
import numpy as np
import pytest

import moi_jax
from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.checkpoints.items import ModelItems
from moi_jax.checkpoints.run_checkpoints import RunCheckpoints
from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config, make_config
from moi_jax.models.parameters import random_parameters
from moi_jax.models.presets import PRESETS
from moi_jax.text.tokenizer import load_tokenizer
from moi_jax.training.goodput import PARTS
from moi_jax.training.optimizer import make_optimizer
from moi_jax.training.run_directory import LOCK
from moi_jax.training.state import initial_state

from support.runs import (
    ROOT,
    SAMPLES,
    TWO_DEVICES,
    open_data,
    records,
    refusal,
    small_config,
    train_command,
    train_here,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    directory = tmp_path_factory.mktemp("finished")
    sections = {
        "train": {
            "steps": 8,
            "profile_steps": [3, 4],
            "sample_max_new_tokens": 4,
            "sample_prompts": [{"domain": "maths", "prompt": "What is 2 + 2?"}],
        },
        "eval": {"every": 4},
        "checkpoint": {"every": 2, "keep_last": 1, "keep_best": 1},
        "optimizer": {"learning_rate": 3e-3},
        "logging": {"every": 2, "trackers": ["tensorboard", "prometheus"]},
    }
    done = train_command(small_config(directory, **sections))
    assert done.returncode == 0, done.stderr
    return directory / "run", done.stdout


def test_a_run_leaves_what_the_docs_promise(finished):
    run, _ = finished
    names = {path.name for path in run.iterdir()} - {LOCK}
    assert names == {
        "config.yaml", "mixture.json", "metrics.jsonl", "samples.jsonl", "checkpoints",
        "tensorboard", "metrics.prom", "profile", "report.html",
    }  # fmt: skip
    page = (ROOT / "docs" / "training.md").read_text()
    section = page.split("## The run directory\n")[1].split("\n## ")[0]
    promised = set(re.findall(r"^\| `([a-z.]+)", section, re.MULTILINE))
    assert names == promised
    assert list((run / "tensorboard").glob("events*"))


def test_logged_steps_and_evaluations_have_their_keys(finished):
    log = records(finished[0] / "metrics.jsonl")
    steps = [record for record in log if "token_loss" in record]
    assert [record["step"] for record in steps] == [2, 4, 6, 8]
    assert [record["row"] for record in steps] == [4, 8, 12, 16]
    assert {key for key in steps[0] if not key.startswith("eval/")} == {
        "step", "epoch", "row", "loss", "token_loss", "learning_rate", "grad_norm", "fill",
        "tokens_per_second", "loss_tokens_per_second", "domain/chat/loss", "domain/maths/loss",
        "goodput", "written", *(f"time/{part}" for part in PARTS),
    }  # fmt: skip
    assert 0.5 < steps[0]["fill"] <= 1
    assert steps[-1]["loss"] < steps[0]["loss"]
    evaluations = [record for record in log if "eval/mean/loss" in record]
    assert len({record["step"] for record in log}) == len(log) == 5  # one object a step
    assert [record["step"] for record in evaluations] == [0, 4, 8]
    for name in ("chat", "maths", "mean"):
        key = f"eval/{name}/loss"
        assert evaluations[-1][key] < evaluations[0][key]
        assert f"eval/{name}/default_prompt/loss" in evaluations[0]


@pytest.mark.parametrize("restarts", [False, True])
def test_the_newest_and_the_best_checkpoint_are_kept(tmp_path, restarts):
    """The losses at steps 1 to 4 are 3, 1, 2, 5: step 4 is the newest, step 2 the best."""
    config = make_config({"checkpoint": {"keep_last": 1, "keep_best": 1}})
    model = dataclasses.replace(PRESETS["tiny"], num_layers=1, hidden_size=8, vocab_size=16)
    optimizer = make_optimizer(config.optimizer, model)
    state = initial_state(optimizer, random_parameters(model, 0, jnp.float32))
    items = ModelItems(model, {}, {})

    def opened():
        return RunCheckpoints(tmp_path / "checkpoints", config.checkpoint, items)

    checkpoints = opened()
    for step, loss in enumerate((3.0, 1.0, 2.0, 5.0), start=1):
        checkpoints.save(step, *state.items(), {}, {}, {"eval/mean/loss": loss})
        if restarts:
            checkpoints.close()
            checkpoints = opened()
    checkpoints.close()
    kept = {p.name for p in (tmp_path / "checkpoints").iterdir() if p.name.isdigit()}
    assert kept == {"2", "4"}


def test_answers_before_and_after_are_kept_and_printed(finished):
    run, out = finished
    answers = records(run / "samples.jsonl")
    assert [(a["step"], a["system"]) for a in answers] == [
        (0, "own"), (0, "default"), (8, "own"), (8, "default"),
    ]  # fmt: skip
    assert answers[0]["system_prompt"] == "You are a mathematician."
    assert answers[1]["system_prompt"] == "You are a helpful assistant."
    assert "maths, own system prompt" in out
    assert "maths, default system prompt" in out


def test_the_mixture_is_shown_before_the_first_step_and_kept(finished):
    run, out = finished
    assert out.index("Mixture of one epoch") < out.index("step 2/8")
    mixture = json.loads((run / "mixture.json").read_text())
    chat, maths = mixture["domains"]["chat"], mixture["domains"]["maths"]
    assert chat["occurrences"] == maths["occurrences"]
    for domain in (chat, maths):
        accounted = sum(domain["dropped"].values()) + domain["held_out"] + domain["used"]
        assert domain["read"] == accounted + domain["not_drawn"]


@pytest.mark.parametrize("strategy", ["sequence", "packing", "balance"])
def test_every_strategy_trains(tmp_path, strategy):
    train_here(small_config(tmp_path), f"data.strategy={strategy}", "train.steps=2")
    assert [r["step"] for r in records(tmp_path / "run" / "metrics.jsonl")] == [0, 1, 2]


@pytest.mark.parametrize(
    ("switch", "prompts"),
    [
        ("per_domain", {"You are a helpful assistant.", "You are a mathematician."}),
        ("default", {"You are a helpful assistant."}),
        ("none", set()),
    ],
)
def test_system_prompts_by_their_switch(tmp_path, switch, prompts):
    config = load_config(small_config(tmp_path), [f"data.system_prompts={switch}"])
    tokenizer = load_tokenizer(SAMPLES / "tokenizer")
    text = tokenizer.decode(next(moi_jax.batches(config)).tokens.ravel().tolist())
    assert set(re.findall(r"<\|im_start\|>system\n(.*?)<\|im_end\|>", text)) == prompts


def test_a_run_that_only_skips_stops_after_three_and_names_the_rows(tmp_path):
    config = small_config(tmp_path)
    overrides = ["optimizer.learning_rate=1e36", "optimizer.clip_norm=null", "train.steps=30"]
    said = refusal(config, *overrides)
    assert "3 steps in a row were not finite, the last over rows" in said
    skipped = [r for r in records(tmp_path / "run" / "metrics.jsonl") if r.get("skipped")]
    assert [r["reason"] for r in skipped] == ["not finite"] * 3
    assert skipped[1]["step"] == skipped[0]["step"] + 1
    last = skipped[-1]
    assert f"rows {last['first_row']} to {last['row'] - 1} (step {last['step']})" in said


MISTAKES = [
    (["tokenizer.path=null"], "there is no tokenizer: set tokenizer.path"),
    (["tokenizer.path=nowhere"], "nowhere"),
    (["model.preset=qwen-8b"], "model.preset 'qwen-8b' is unknown; presets: qwen-7b"),
    (["data.sequence_length=9000"], "over the model's seq_length 8192"),
    (["data.domains=[]", "data.order=config"], "data.domains is empty"),
    (["data.domains.0.sources.0.path=no*.jsonl"], "no*.jsonl"),
    (["data.domains.1.sources.0.path=chat.jsonl"], "chat.jsonl is listed twice"),
    (["model.init_from=nowhere"], "nowhere is no checkpoint"),
    (["data.cache_dir=/dev/null/cache"], "/dev/null/cache"),
]


@pytest.mark.parametrize(("overrides", "message"), MISTAKES)
def test_a_mistake_is_named_before_any_work(tmp_path, overrides, message):
    config = load_config(small_config(tmp_path), overrides)
    with pytest.raises(UserError) as error:
        open_data(config)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_an_unknown_preset_is_told_before_anything_is_made(tmp_path):
    config = small_config(tmp_path)
    assert "model.preset 'qwen-8b' is unknown" in refusal(config, "model.preset=qwen-8b")
    assert [path.name for path in tmp_path.iterdir()] == ["config.yaml"]


def test_ids_beyond_the_embedding_are_refused(tmp_path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(SAMPLES / "tokenizer" / "tokenizer.json"))
    tokenizer.add_tokens(["one more"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = load_config(small_config(tmp_path), [f"tokenizer.path={tmp_path}"])
    with pytest.raises(UserError, match="has 2049 ids, the model's embedding only 2048 rows"):
        open_experiment(config)


def test_a_longer_row_is_allowed_by_its_switch(tmp_path):
    config = load_config(
        small_config(tmp_path), ["data.sequence_length=9000", "model.allow_longer=true"]
    )
    assert open_experiment(config).config.data.sequence_length == 9000


def test_rows_that_do_not_divide_over_the_mesh_exit_with_2(tmp_path):
    for overrides, message in (
        (["mesh.fsdp=4"], "does not fit 2 cpu devices"),
        (
            ["train.global_batch_rows=3"],
            "global_batch_rows 3 is not a multiple of the 2 batch shards",
        ),
    ):
        done = train_command(small_config(tmp_path), *overrides, environment=TWO_DEVICES)
        assert done.returncode == 2
        assert message in done.stderr
        assert not (tmp_path / "cache").exists()  # refused before any data is read


def test_batches_are_those_of_the_run_from_any_row(tmp_path):

    import moi_jax

    config = small_config(tmp_path)
    whole = [batch.tokens for batch in moi_jax.batches(config)]
    assert [len(tokens) for tokens in whole] == [2] * 10
    rows = np.concatenate(whole)
    with pytest.raises(UserError, match="start_row -5 is below 0"):
        moi_jax.batches(config, start_row=-5)
    later = next(moi_jax.batches(config, start_row=5))
    np.testing.assert_array_equal(later.tokens, rows[5:7])


def test_training_starts_from_a_checkpoint_with_its_tokenizer_and_prompt(
    finished, tmp_path, log_text
):
    """With init_from, architecture, tokenizer and default prompt come from the checkpoint."""
    source = finished[0] / "checkpoints"
    overrides = [
        f"model.init_from={source}", "model.preset=null", "tokenizer.path=null",
        "train.steps=1", "optimizer.learning_rate=1e-12", "eval.every=1",
    ]  # fmt: skip
    train_here(small_config(tmp_path), *overrides)
    before = [r for r in records(finished[0] / "metrics.jsonl") if "eval/mean/loss" in r][-1]
    after = records(tmp_path / "run" / "metrics.jsonl")[0]
    assert after["eval/mean/loss"] == pytest.approx(before["eval/mean/loss"], rel=1e-6)
    other = load_config(
        small_config(tmp_path), [f"model.init_from={source}", "model.preset=qwen-7b"]
    )
    with pytest.raises(UserError, match="is not the architecture of"):
        open_experiment(other)
    # The run resumes from its own checkpoint, even if model.init_from no longer exists.
    train_here(small_config(tmp_path), "model.init_from=gone", *overrides[1:])
    assert f"resuming with model.init_from: {source} -> gone" in log_text.getvalue()
    assert "is complete" in log_text.getvalue()
