"""What the machine refuses a run: space on the disk, another user's files, a home directory."""

import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.training.run_directory import run_directory

from support.processes import start
from support.runs import (
    ENVIRONMENT,
    ROOT,
    command,
    logged_steps,
    parameters,
    refusal,
    same_parameters,
    small_config,
    train_here,
)

NOBODY = 65534

# A disk of our own that grows: the cache does not fit, then the run directory, then the second
# checkpoint, then all does. It ends with the process, so the run is copied from it.
GROWING_DISK = """
import logging, shutil, subprocess, sys
from pathlib import Path
logging.disable()  # standard error is for mishaps alone
from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config
from moi_jax.data.dataset import open_dataset
from support.runs import small_config, train_here
place, kept = Path(sys.argv[1]), sys.argv[2]

def remount(size):
    subprocess.run(["mount", "-o", f"remount,size={size}", place], check=True)

def just_the_cache():
    remount("20m")
    experiment = open_experiment(load_config(config))
    open_dataset(experiment.config, experiment.tokenizer)
    return shutil.disk_usage(place).used + 8192

subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", place], check=True)
print("mounted", flush=True)
config = small_config(place)
for size in ("100k", just_the_cache, "7m", "80m"):
    remount(size() if callable(size) else size)
    try:
        changes = ("train.steps=7", "logging.trackers=[tensorboard]", "checkpoint.retry_seconds=0")
        print("done", train_here(config, *changes).step)
    except UserError as error:
        print(error)
    print("checkpoints", sorted(path.name for path in place.glob("run/checkpoints/*")))
shutil.copytree(place / "run", kept)
"""


def test_a_run_whose_disk_is_full_keeps_its_checkpoint_and_goes_on_exactly(tmp_path):
    if not shutil.which("unshare"):
        pytest.skip("no unshare to mount a small disk with")
    (tmp_path / "disk").mkdir()
    done = subprocess.run(
        ["unshare", "--user", "--map-root-user", "--mount", sys.executable, "-c", GROWING_DISK,
         tmp_path / "disk", tmp_path / "run"],
        capture_output=True, text=True, cwd=ROOT, check=False,
        env={**ENVIRONMENT, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}"},
    )  # fmt: skip
    if "mounted" not in done.stdout:
        pytest.skip(f"cannot mount a small disk here: {done.stderr.strip()}")
    assert not done.stderr
    cache, _, directory, _, checkpoint, kept, finished, _ = done.stdout.splitlines()[1:]
    full = "no space left on the device ("
    disk = tmp_path / "disk"
    assert cache.startswith(f"domain chat: cannot read or write {disk}/cache: {full}")
    assert "data.cache_dir" in cache
    assert directory.startswith(f"cannot write the run directory {disk}/run: {full}")
    assert checkpoint.startswith(f"cannot save checkpoint 6 in {disk}/run/checkpoints: {full}about")
    assert "MB are needed" in checkpoint
    assert "MB are free); checkpoint 3 is whole" in checkpoint
    assert kept == "checkpoints ['3']"
    assert finished == "done 7"
    (tmp_path / "whole").mkdir()
    whole = train_here(small_config(tmp_path / "whole"), "train.steps=7").directory
    same_parameters(parameters(tmp_path / "run"), parameters(whole))
    assert logged_steps(tmp_path / "run" / "metrics.jsonl") == list(range(1, 8))


def test_tensorboard_tells_a_full_disk(tmp_path):
    """The library's own thread would end, and the run would wait for it forever."""
    limit = (
        "import resource, sys\n"
        "from pathlib import Path\n"
        "from moi_jax.training.metrics import TRACKERS\n"
        "track = TRACKERS['tensorboard'](Path(sys.argv[1]), 0)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (500, 500))\n"
        "for step in range(100): track({'step': step, 'loss': 1.0})"
    )
    done = subprocess.run(
        [sys.executable, "-c", limit, tmp_path],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, timeout=60, check=False,
    )  # fmt: skip
    assert done.stderr.splitlines()[-1] == "OSError: [Errno 27] File too large"


@pytest.fixture
def foreign() -> Iterator[Path]:
    """A directory with `run` and `cache` that this process may only read, and its own `mine`."""
    user = os.geteuid()
    with tempfile.TemporaryDirectory() as name:  # tmp_path is below one that nobody else may enter
        place = Path(name)
        place.chmod(0o755)
        for folder, mode in (("run", 0o555), ("cache", 0o555), ("mine", 0o777)):
            (place / folder).mkdir()
            (place / folder).chmod(mode)
        if user == 0:  # root writes everywhere
            os.seteuid(NOBODY)
        yield place
        os.seteuid(user)


def test_a_directory_of_another_user_is_one_line_with_the_way_out(foreign):
    config = small_config(foreign / "mine")
    said = refusal(config, f"logging.run_dir={foreign / 'run'}")
    assert f"cannot write the run directory {foreign / 'run'}" in said
    assert "Permission denied; choose another logging.run_dir" in said
    said = refusal(config, f"data.cache_dir={foreign / 'cache'}")
    assert f"cannot read or write {foreign / 'cache'}" in said
    assert "Permission denied; choose another data.cache_dir" in said
    run = foreign / "mine" / "run"
    (run / "config.yaml").touch(mode=0o444)
    with pytest.raises(UserError, match=r"run directory .* \(config.yaml\): Permission denied"):
        _open_in_run(run, run / "config.yaml")


def _open_in_run(run: Path, path: Path) -> None:
    with run_directory(run, fresh=False):
        path.open("r+")


def test_an_error_of_another_file_is_not_one_of_the_run_directory(tmp_path):
    with pytest.raises(FileNotFoundError):
        _open_in_run(tmp_path / "run", tmp_path / "other")


def test_no_home_directory_is_one_line(tmp_path, monkeypatch):
    def nobody(_: int) -> None:
        raise KeyError("a user without a name")

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    config = small_config(tmp_path)
    for key in ("logging.run_dir", "data.cache_dir", "data.root", "tokenizer.path"):
        assert "~/x begins in a home directory that is not known" in refusal(config, f"{key}=~/x")
    with pytest.raises(UserError, match="set the environment variable HOME"):
        expand_home(Path("~nobody-of-this-name"))


def test_a_signal_before_the_first_step_is_one_line_and_the_run_starts_anew(tmp_path):
    config = small_config(tmp_path)
    process = start(
        command(config),
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=ENVIRONMENT,
    )  # fmt: skip
    assert process.stdout.readline().startswith("chat: prepared")
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 128 + signal.SIGTERM
    assert errors == "stopped by SIGTERM; to go on, give the same command again\n"
    assert train_here(config, "train.steps=1").finished
