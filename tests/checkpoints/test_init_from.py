"""Runs that begin from published weights: of a directory, or of a repository of the hub."""

import logging
import shutil
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
import yaml
from huggingface_hub import constants

import moi_jax
from moi_jax.checkpoints import init_from
from moi_jax.checkpoints.checksums import verify_arrays
from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.init_from import open_start
from moi_jax.checkpoints.items import read_items
from moi_jax.common.checksums import SUMS
from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config

from support.hub import local_hub
from support.published import add_tokenizer, edit_config, micro_published
from support.runs import (
    ENVIRONMENT,
    ROOT,
    open_data,
    refusal,
    small_config,
    stop_after,
    train_here,
)

ID = "Qwen/Tiny"


@pytest.fixture
def published(tmp_path):
    """The preset micro as a published directory, with a licence and a model card."""
    folder = micro_published(tmp_path / "Tiny", np.float32)
    (folder / "LICENSE").write_text("do what is right")
    (folder / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    return folder


@pytest.fixture
def hub(published, tmp_path, monkeypatch):
    """A hub with the repository ID, for the real huggingface_hub in this process."""
    with local_hub() as server:
        server.repositories[ID] = published
        files = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", files)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        yield server


def begin_from(name, directory, **sections):
    """A small config of a run that begins from `name`, with the tokenizer that comes with it."""
    model = {"preset": None, "init_from": str(name), "remat": "none"}
    return small_config(directory, model=model, tokenizer={"path": None}, **sections)


def train(config, *overrides, **options):
    """Trains without evaluations."""
    return train_here(config, *overrides, make_evaluations=None, **options)


def without_weights(folder):
    for path in folder.glob("*.safetensors"):
        path.unlink()


def imported(directory):
    return sorted(p.name for p in (directory / "cache" / "imported").iterdir() if p.is_dir())


def test_data_is_prepared_for_published_weights_that_are_not_there(published, tmp_path):
    import_checkpoint(published, tmp_path / "ckpt")
    without_weights(published)
    ours = open_experiment(load_config(begin_from(tmp_path / "ckpt", tmp_path)))
    theirs = open_experiment(load_config(begin_from(published, tmp_path)))
    assert theirs.items == ours.items
    assert open_data(load_config(begin_from(published, tmp_path))).corpus
    assert not (tmp_path / "cache" / "imported").exists()


def test_a_run_from_a_published_directory_is_the_run_from_its_import(published, tmp_path, log_text):
    import_checkpoint(published, tmp_path / "ckpt")
    ours = train(begin_from(tmp_path / "ckpt", tmp_path), "train.steps=2")
    theirs = train(begin_from(published, tmp_path), "train.steps=2", fresh=True)
    np.testing.assert_array_equal(
        ours.state.trainable["embedding"]["table"], theirs.state.trainable["embedding"]["table"]
    )
    assert read_items(theirs.checkpoint) == read_items(ours.checkpoint)
    (name,) = imported(tmp_path)
    assert name.startswith("Tiny-")
    assert log_text.getvalue().count("Tiny: importing the weights into the cache, this once") == 1
    without_weights(published)  # the run has a checkpoint and does not need them any more
    (published / "config.json").unlink()
    assert train(begin_from(published, tmp_path), "train.steps=2").step == 2


def test_weights_are_imported_once_and_again_when_they_change(published, tmp_path, log_text):
    cache = tmp_path / "cache"
    first = open_start(published).checkpoint(cache)
    assert open_start(published).checkpoint(cache) == first
    assert f"Tiny: the weights are cached in {first}" in log_text.getvalue()
    shutil.copytree(published, tmp_path / "elsewhere" / "Tiny")
    assert open_start(tmp_path / "elsewhere" / "Tiny").checkpoint(cache) == first
    without_weights(published)
    shard = micro_published(tmp_path / "other", np.float16) / "model.safetensors"
    shutil.copy(shard, published)
    second = open_start(published).checkpoint(cache)
    assert second != first
    assert log_text.getvalue().count("importing the weights") == 2


def test_a_damaged_import_is_made_anew(published, tmp_path, log_text):
    cache = tmp_path / "cache"
    path = open_start(published).checkpoint(cache)
    items = read_items(path)
    for damage in ("flip", "no checksums"):
        if damage == "flip":
            largest = max((path / "parameters").rglob("*"), key=lambda file: file.stat().st_size)
            largest.write_bytes(largest.read_bytes()[:-1] + b"x")
        else:
            (path / SUMS).unlink()
        assert open_start(published).checkpoint(cache) == path
        assert log_text.getvalue().count("are damaged, and are made anew") == 1
        log_text.truncate(0)
        assert read_items(path) == items
        verify_arrays(path, ["parameters"])


def test_the_import_gives_the_published_logits(golden, tmp_path):
    """Fixture A has no tokenizer of its own; the config names one."""
    (tmp_path / "tokenizer").mkdir()
    add_tokenizer(tmp_path / "tokenizer")
    config = begin_from(golden / "A", tmp_path, data={"sequence_length": 64})
    with pytest.raises(UserError, match="name a directory with the tokenizer of this model: tok"):
        open_experiment(load_config(config))
    config = load_config(config, [f"tokenizer.path={tmp_path / 'tokenizer'}"])
    experiment = open_experiment(config)
    model, tokenizer = moi_jax.load(experiment.start.checkpoint(config.data.cache_dir))
    arrays = np.load(golden / "A" / "logits.npz")
    np.testing.assert_allclose(
        model(arrays["x100"].astype(np.int32)), arrays["eval_100"], atol=2e-5, rtol=0
    )
    assert tokenizer.fingerprint == experiment.tokenizer.fingerprint


def test_two_processes_at_once_import_once(published, tmp_path, log_text, monkeypatch):
    """Two threads with a lock each, as two processes have; the second comes while one writes."""
    writes, waits = [], threading.Event()

    def write(*arguments):
        writes.append(threading.get_ident())
        assert waits.wait(20)
        return original(*arguments)

    class Waiting(logging.Handler):
        def emit(self, record):
            if "waiting for another process" in record.getMessage():
                waits.set()

    original = init_from.write_checkpoint
    monkeypatch.setattr(init_from, "write_checkpoint", write)
    logging.getLogger("moi_jax").addHandler(handler := Waiting())
    start, paths = open_start(published), []
    threads = [
        threading.Thread(target=lambda: paths.append(start.checkpoint(tmp_path / "cache")))
        for _ in range(2)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    logging.getLogger("moi_jax").removeHandler(handler)
    assert len(writes) == 1
    assert len(paths) == 2
    assert paths[0] == paths[1]


KILLED = """
import os, signal, sys
from pathlib import Path
from moi_jax.checkpoints.hf.safetensors_reader import TensorFiles
from moi_jax.checkpoints.init_from import open_start
read = TensorFiles.read
def killed(self, name):
    if "h.1" in name:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, name)
TensorFiles.read = killed
open_start(Path(sys.argv[1])).checkpoint(Path(sys.argv[2]))
"""


def test_a_killed_import_leaves_nothing_that_the_next_one_uses(published, tmp_path):
    cache = tmp_path / "cache"
    done = subprocess.run(
        [sys.executable, "-c", KILLED, published, cache], cwd=ROOT, env=ENVIRONMENT, check=False
    )
    assert done.returncode == -signal.SIGKILL
    (left,) = imported(tmp_path)
    assert left.startswith(".Tiny-")
    checkpoint = open_start(published).checkpoint(cache)
    assert imported(tmp_path) == [checkpoint.name]
    model, _ = moi_jax.load(checkpoint)
    assert np.isfinite(model(np.array([[1, 2, 3]]))).all()


def test_weights_that_are_damaged_are_told_and_nothing_is_cached(published, tmp_path):
    shard = published / "model.safetensors"
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "is damaged or cut short" in refusal(begin_from(published, tmp_path))
    assert imported(tmp_path) == []


def test_prepare_fetches_everything_but_the_weights(hub, tmp_path):
    environment = {**ENVIRONMENT, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        [sys.executable, "-m", "moi_jax.prepare", "--config", str(begin_from(ID, tmp_path))],
        capture_output=True, text=True, cwd=ROOT, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    told = f"{ID}: read configuration and tokenizer at commit {hub.head(ID)}"
    assert done.stdout.count(told) == 1
    assert done.stderr == ""
    assert sorted(hub.given) == [
        "LICENSE", "README.md", "config.json", "tokenizer.json", "tokenizer_config.json",
    ]  # fmt: skip


def test_a_run_from_the_hub_fetches_weights_once_and_keeps_the_commit(hub, tmp_path, log_text):
    commit = hub.head(ID)
    config = begin_from(ID, tmp_path)
    done = train(config, "train.steps=1")
    assert hub.weights_given == ["model.safetensors"]
    kept = yaml.safe_load((done.directory / "config.yaml").read_text())
    assert kept["model"]["init_from"] == f"{ID}@{commit}"
    provenance = read_items(done.checkpoint).provenance
    assert (provenance["base"], provenance["commit"]) == (ID, commit)
    assert (provenance["license"], provenance["files"]) == (
        "apache-2.0", {"LICENSE": "do what is right"},
    )  # fmt: skip
    # Another run finds the import, and asks the hub for no weights.
    start = open_experiment(load_config(config)).start
    assert start.checkpoint(tmp_path / "cache").name in imported(tmp_path)
    assert hub.weights_given == ["model.safetensors"]
    # The run has a checkpoint: the hub is not asked for the newest commit.
    edit_config(seq_length=4096)(hub.repositories[ID])
    hub.given.clear()
    assert train(config, "train.steps=1").step == 1
    assert "resuming with" not in log_text.getvalue()
    assert hub.given == []


def test_a_run_without_a_checkpoint_does_not_go_on_from_another_commit(hub, tmp_path):
    first = hub.head(ID)
    config = begin_from(ID, tmp_path)
    result = train(config, "train.steps=2", stop=stop_after(1))
    shutil.rmtree(result.directory / "checkpoints")  # as if it was killed before its first one
    edit_config(initializer_range=0.03)(hub.repositories[ID])
    second = hub.head(ID)
    change = f"model.init_from: {ID}@{first} -> {ID}@{second}"
    assert change in refusal(config, "train.steps=2")
    assert train(config, "train.steps=2", f"model.init_from={ID}@{first}").step == 2


def test_files_that_were_fetched_are_used_without_the_hub(hub, tmp_path, monkeypatch):
    before = open_start(begun := load_config(begin_from(ID, tmp_path)).model.init_from)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")  # nothing listens there
    assert open_start(begun) == before


def test_an_imported_repository_names_its_base_and_commit_in_its_card(hub, tmp_path):
    import_checkpoint(load_config(begin_from(ID, tmp_path)).model.init_from, tmp_path / "ckpt")
    card = (tmp_path / "ckpt" / "README.md").read_text()
    assert f'base_model: "{ID}"' in card
    assert f"come from `{ID}` at commit `{hub.head(ID)}`" in card


def test_a_tokenizer_comes_from_the_hub(hub, tmp_path):
    config = load_config(small_config(tmp_path), [f"tokenizer.path={ID}"])
    experiment = open_experiment(config)
    assert str(experiment.config.tokenizer.path) == f"{ID}@{hub.head(ID)}"
    assert experiment.tokenizer.vocab_size == 2048
    assert hub.weights_given == []


def test_the_shipped_config_of_a_hub_model_opens(hub, published):
    hub.repositories["Qwen/Qwen2.5-0.5B-Instruct"] = published
    config = load_config(ROOT / "configs" / "qwen2.5_0.5b.yaml")
    assert open_experiment(config).items.provenance["base"] == "Qwen/Qwen2.5-0.5B-Instruct"


def test_a_local_directory_wins_over_the_hub(hub, published, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "Qwen").mkdir()
    published.rename(tmp_path / ID)
    assert open_start(load_config(begin_from(ID, tmp_path)).model.init_from).source.commit is None
    assert hub.given == []


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nowhere", "nowhere is no checkpoint: it does not exist. Give a checkpoint or a run of"),
        ("a/b/c", "a directory of published weights, a .gguf file, or the id of a Hugging Face"),
        ("Qwen/None", "there is no directory Qwen/None, and as a Hugging Face repository it"),
        (f"{ID}@v9", "cannot be fetched: it has no revision v9"),
    ],
)
def test_a_name_of_nothing_is_one_line(hub, tmp_path, name, message):
    said = refusal(begin_from(name, tmp_path))
    assert message in said
    with pytest.raises(UserError, match=r"there is no directory"):
        open_data(load_config(small_config(tmp_path), [f"tokenizer.path={name}"]))


def test_without_huggingface_hub_a_line_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    said = refusal(begin_from(ID, tmp_path))
    assert f"there is no directory {ID}" in said
    assert "pip install 'moi_jax[hub]'" in said


def test_an_unreachable_hub_is_one_line(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    said = refusal(begin_from(ID, tmp_path))
    assert "Connection refused; check the network, or download it" in said


def test_published_weights_in_the_place_of_a_checkpoint_are_told_apart(published):
    with pytest.raises(UserError, match="but published weights; make one of them with") as error:
        moi_jax.load(published)
    assert f"python -m moi_jax.convert import {published} --out CKPT" in str(error.value)
