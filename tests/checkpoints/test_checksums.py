"""Damaged checkpoints: found by their checksums or by NaN, named, and never resumed from."""

import dataclasses
import errno
import hashlib
import itertools
import shutil
import subprocess
from contextlib import closing
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest

import moi_jax
from moi_jax.checkpoints import run_checkpoints
from moi_jax.checkpoints.hf.exporter import export_checkpoint
from moi_jax.checkpoints.hf.verify import verify_checkpoint
from moi_jax.checkpoints.items import ModelItems, newest_step, read_items
from moi_jax.checkpoints.parameters import save_model
from moi_jax.checkpoints.run_checkpoints import RunCheckpoints
from moi_jax.common.checksums import SUMS
from moi_jax.common.errors import UserError
from moi_jax.config.load import make_config
from moi_jax.models.parameters import parameter_specs, random_parameters
from moi_jax.models.presets import PRESETS
from moi_jax.training.optimizer import make_optimizer
from moi_jax.training.state import TrainState, initial_state

from support.runs import (
    forget_checksums,
    lasting,
    records,
    refusal,
    small_config,
    train_command,
    train_here,
)

SIX_STEPS = {"train": {"steps": 6, "global_batch_rows": 2}}


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """A finished run with the checkpoints 3 and 6, which no test changes."""
    directory = tmp_path_factory.mktemp("whole")
    return train_here(small_config(directory, **SIX_STEPS), make_evaluations=None).directory


@pytest.fixture
def run(whole, tmp_path) -> Path:
    """A copy of it, for `small_config(tmp_path)`."""
    shutil.copytree(whole, tmp_path / "run")
    return tmp_path / "run"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


def files(step: Path) -> list[str]:
    return sorted(p.relative_to(step).as_posix() for p in step.rglob("*") if p.is_file())


def arrays(step: Path) -> dict[str, np.ndarray]:
    """Name -> array of the parameters and the optimizer, read by orbax alone."""
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler()) as checkpointer:
        names = ("parameters", "optimizer")
        args = ocp.args.Composite(**{name: ocp.args.StandardRestore() for name in names})
        restored = checkpointer.restore(step, args)
    leaves = jax.tree_util.tree_leaves_with_path({name: restored[name] for name in names})
    return {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


@pytest.mark.skipif(not shutil.which("sha256sum"), reason="no sha256sum (coreutils)")
def test_a_copy_of_a_checkpoint_is_verified_by_coreutils(run):
    for step in ("3", "6"):
        moved = (run / "checkpoints" / step).rename(run.parent / step)
        listed = [line.split("  ")[1] for line in (moved / SUMS).read_text().splitlines()]
        assert listed == [name for name in files(moved) if name != SUMS]
        subprocess.run(["sha256sum", "--check", "--strict", "--quiet", SUMS], cwd=moved, check=True)


@pytest.mark.parametrize("damages", [[flip], [cut, empty, Path.unlink]])
def test_damage_to_any_file_of_a_checkpoint_is_refused_with_its_name(run, tmp_path, damages):
    config, step = small_config(tmp_path, **SIX_STEPS), run / "checkpoints" / "6"
    for name, damage in zip(files(step), itertools.cycle(damages), strict=False):
        content = (step / name).read_bytes()
        damage(step / name)
        said = [refusal(config, strict_resume=True)]
        # Only a run reads the optimizer, and the line of the checksums that is hit may be of it.
        if not name.startswith(("optimizer/", SUMS)):
            with pytest.raises(UserError) as error:
                moi_jax.load(run)
            said.append(str(error.value))
        for message in said:
            assert "checkpoints/6 is damaged" in message
            # Where the checksums themselves are damaged, another file may seem to be.
            assert name in message or name == SUMS
            assert "\n" not in message
        (step / name).write_bytes(content)
    assert train_here(config, make_evaluations=None).step == 6  # whole again


def test_a_file_that_was_not_written_with_an_item_is_refused(run):
    step = run / "checkpoints" / "6"
    (step / "LICENSE").write_text("Beside the items lies what people put there.")
    moi_jax.load(run)
    (step / "parameters" / "more").write_text("")
    with pytest.raises(UserError, match="parameters/more was not written with the checkpoint"):
        moi_jax.load(run)
    with pytest.raises(UserError, match="parameters/more was not written"):
        export_checkpoint(run, run.parent / "out")
    moi_jax.load(run, verify=False)
    export_checkpoint(run, run.parent / "out", verify=False)


def test_a_run_goes_on_from_the_checkpoint_before_a_damaged_one(run, whole, tmp_path, log_text):
    moments = next((run / "checkpoints" / "6" / "optimizer" / "d").iterdir())
    flip(moments)
    train_here(small_config(tmp_path, **SIX_STEPS), make_evaluations=None)
    (said,) = [line for line in log_text.getvalue().splitlines() if "damaged" in line]
    assert f"checkpoint 6 is damaged (optimizer/d/{moments.name} has changed since" in said
    assert "goes on from step 3 and repeats 3 steps" in said
    (aside,) = (run / "checkpoints" / "damaged").iterdir()
    assert files(aside) == files(whole / "checkpoints" / "6")
    same_end(run, whole)


def same_end(run: Path, whole: Path) -> None:
    """Checks that both runs ended with the same checkpoint and log, bit for bit."""
    steps = [folder / "checkpoints" / "6" for folder in (run, whole)]
    ours, theirs = map(arrays, steps)
    assert ours.keys() == theirs.keys()
    for name in ours:
        np.testing.assert_array_equal(ours[name], theirs[name], err_msg=name)
    ours, theirs = ((step / "position" / "metadata").read_bytes() for step in steps)
    assert ours == theirs
    logs = [records(folder / "metrics.jsonl") for folder in (run, whole)]
    ours, theirs = ([lasting(record) for record in log] for log in logs)
    assert ours == theirs


def test_a_strict_resume_stops_the_command_with_one_line(run, tmp_path):
    cut(run / "checkpoints" / "6" / "parameters" / "_METADATA")
    before = files(run)
    done = train_command(small_config(tmp_path, **SIX_STEPS), "--strict-resume")
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert "6 is damaged (parameters/_METADATA has changed since it was written)" in done.stderr
    assert files(run) == before


def test_a_step_directory_without_its_files_is_refused_or_set_aside(run, whole, tmp_path, log_text):
    shutil.rmtree(run / "checkpoints" / "6")
    (run / "checkpoints" / "6").mkdir()
    (run / "checkpoints" / "9" / "config").mkdir(parents=True)
    with pytest.raises(UserError, match=r"checkpoints/9 is no checkpoint"):
        moi_jax.load(run)
    with pytest.raises(UserError, match=r"checkpoints/6 is no checkpoint"):
        moi_jax.load(run / "checkpoints" / "6")
    train_here(small_config(tmp_path, **SIX_STEPS), make_evaluations=None)
    for said in ("checkpoint 9 is damaged (parameters is missing)", "repeats 6 steps",
                 "checkpoint 6 is damaged (parameters is missing)", "repeats 3 steps"):  # fmt: skip
        assert said in log_text.getvalue()
    same_end(run, whole)


def test_an_older_damaged_checkpoint_does_not_stop_a_run(run, tmp_path, log_text):
    """orbax reads the small files of all steps when a run begins."""
    (run / "checkpoints" / "3" / "_CHECKPOINT_METADATA").write_text("{")
    config = small_config(tmp_path, **SIX_STEPS)
    train_here(config, make_evaluations=None, strict_resume=True)
    said = "checkpoint 3 is damaged (_CHECKPOINT_METADATA has changed since it was written), moved"
    assert said in log_text.getvalue()
    assert "the run goes on from" not in log_text.getvalue()


def test_a_run_without_a_sound_checkpoint_is_refused_and_left_as_it_is(run, tmp_path):
    for step in ("3", "6"):
        (run / "checkpoints" / step / "position" / "metadata").unlink()
    before = files(run)
    said = refusal(small_config(tmp_path, **SIX_STEPS))
    assert "no sound checkpoint is left in" in said
    assert "step 6: position/metadata is missing" in said
    assert files(run) == before


def open_tiny(directory: Path) -> tuple[RunCheckpoints, TrainState]:
    """The checkpoints of a tiny model, and its state."""
    config = make_config({})
    model = dataclasses.replace(PRESETS["tiny"], num_layers=1, hidden_size=8, vocab_size=16)
    parameters = random_parameters(model, 0, jnp.float32)
    state = initial_state(make_optimizer(config.optimizer, model), parameters)
    items = ModelItems(model, {}, {})
    return RunCheckpoints(directory / "checkpoints", config.checkpoint, items), state


def test_a_checkpoint_counts_only_when_its_checksums_are_written(tmp_path, monkeypatch):
    """The process is killed between orbax's commit and the end of the checksums."""

    def killed(step: Path) -> None:
        assert (step / "commit_success.txt").exists()
        raise KeyboardInterrupt

    checkpoints, state = open_tiny(tmp_path)
    checkpoints.save(1, *state.items(), {}, {}, {})
    checkpoints.wait()
    monkeypatch.setattr(run_checkpoints, "write_checksums", killed)
    checkpoints.save(2, *state.items(), {}, {}, {})
    with pytest.raises(KeyboardInterrupt):
        checkpoints.wait()
    assert newest_step(tmp_path / "checkpoints") == tmp_path / "checkpoints" / "1"
    monkeypatch.undo()
    with closing(open_tiny(tmp_path)[0]) as checkpoints:
        assert checkpoints.latest() == 1
        checkpoints.save(2, *state.items(), {}, {}, {})
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["1", "2"]


def test_a_checkpoint_of_the_format_without_checksums_is_read_with_a_warning(
    run, whole, tmp_path, log_text
):
    shutil.rmtree(run / "checkpoints" / "6")
    forget_checksums(run / "checkpoints" / "3")
    moi_jax.load(run)
    assert log_text.getvalue().count("checkpoints/3 has no checksums, so damage") == 1
    train_here(small_config(tmp_path, **SIX_STEPS), make_evaluations=None)
    assert log_text.getvalue().count("checkpoints/3 has no checksums, so damage") == 2
    same_end(run, whole)


# orbax leaves coroutines behind, which complain when they are collected.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_arrays_that_cannot_be_read_are_one_line_without_checksums_too(run, tmp_path):
    step = run / "checkpoints" / "6"
    shutil.rmtree(step / "parameters" / "ocdbt.process_0" / "d")
    with pytest.raises(UserError, match=r"6 is damaged or incomplete \(parameters") as error:
        moi_jax.load(run, verify=False)
    assert "\n" not in str(error.value)
    config = small_config(tmp_path, **SIX_STEPS)
    assert "(parameters or optimizer: " in refusal(config, "checkpoint.verify=false")


# --- NaN and infinity ---


@pytest.fixture(scope="module")
def not_finite(whole, tmp_path_factory) -> Path:
    """A model whose checksums hold, and whose last layer has one infinity."""
    items = read_items(whole)
    path = tmp_path_factory.mktemp("not_finite") / "ckpt"

    def values():
        for name, parameter in parameter_specs(items.model).items():
            array = np.zeros(parameter.shape, np.float32)
            if name == "layers.mlp.down.kernel":
                array.reshape(-1)[-1] = np.inf
            yield name, array

    save_model(path, values(), np.dtype(np.float32), items)
    return path


def test_a_checkpoint_with_infinity_is_not_opened(not_finite, whole, tmp_path):
    named = "ckpt: parameters/layers.mlp.down.kernel has values that are NaN or infinite"
    with pytest.raises(UserError, match=named):
        moi_jax.load(not_finite)
    begins_there = (f"model.init_from={not_finite}", "model.preset=null")
    assert named in refusal(small_config(tmp_path), *begins_there)
    with pytest.raises(UserError, match=named):
        export_checkpoint(not_finite, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    export_checkpoint(whole, tmp_path / "there")
    with pytest.raises(UserError, match=named):
        verify_checkpoint(not_finite, tmp_path / "there")


@pytest.mark.parametrize(
    ("item", "name"), [(0, "parameters/embedding.table"), (1, "optimizer/state.")]
)
def test_a_run_is_not_resumed_from_nan(tmp_path, item, name):
    checkpoints, state = open_tiny(tmp_path)
    items = list(state.items())
    leaves, structure = jax.tree.flatten(items[item])
    spoiled = [leaf * jnp.nan if leaf.ndim else leaf for leaf in leaves]
    items[item] = jax.tree.unflatten(structure, spoiled)
    with closing(checkpoints):
        checkpoints.save(1, *items, {}, {}, {})
        checkpoints.wait()
        with pytest.raises(UserError, match=f"1: {name}.* has values that are NaN") as error:
            checkpoints.restore(1, *state.items())
    assert "\n" not in str(error.value)


def test_a_file_that_may_not_be_read_is_no_damage(run, tmp_path, monkeypatch):
    """Nothing is set aside because of another user's file, or of a disk that hesitates."""
    original = hashlib.file_digest

    def refused(file, name):
        if file.name.endswith("config/metadata"):
            raise PermissionError(errno.EACCES, "Permission denied", file.name)
        return original(file, name)

    monkeypatch.setattr(hashlib, "file_digest", refused)
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    said = refusal(small_config(tmp_path))
    assert "cannot read" in said
    assert "config/metadata: Permission denied; get read access" in said
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == steps
