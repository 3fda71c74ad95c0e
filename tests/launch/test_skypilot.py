"""launch/skypilot: the command that each node runs, and when a job is started again."""

import os
import subprocess

import pytest
import yaml

from support.runs import ROOT
from support.stubs import Stubs

SKYPILOT = ROOT / "launch" / "skypilot"


def task(name):
    return yaml.safe_load((SKYPILOT / f"{name}.yaml").read_text(encoding="utf-8"))


def run_on_node(name, tmp_path, **variables):
    """Runs the commands of a node with a python that only prints where and how it was called."""
    home, workspace = tmp_path / "home", tmp_path / "workspace"
    workspace.mkdir()
    python = home / "moi" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text('#!/bin/sh\necho "$PWD" "$HOME" "$@"\n')
    python.chmod(0o755)
    commands = task(name)["run"].replace("/workspace", str(workspace))
    environment = {"PATH": os.environ["PATH"], "HOME": str(home), **task(name)["envs"], **variables}
    done = subprocess.run(
        ["bash", "-c", commands], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_gpu_node_names_the_first_node_and_its_own_rank(tmp_path):
    words = run_on_node(
        "train_gpu", tmp_path, NFS="host:/moi", CONFIG="my.yaml",
        SKYPILOT_NODE_IPS="10.0.0.7\n10.0.0.8", SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1",
    )  # fmt: skip
    workspace = f"{tmp_path}/workspace"
    assert words == [
        *(workspace, workspace, "-m", "moi_jax.train", "--config", f"{ROOT}/my.yaml"),
        *("--coordinator", "10.0.0.7:8476", "--num-processes", "2", "--process-id", "1"),
    ]


def test_a_tpu_host_leaves_the_places_to_the_runtime(tmp_path):
    words = run_on_node("train_tpu", tmp_path, NFS="host:/moi")
    config = f"{ROOT}/configs/topologies/v5e_4x8.yaml"
    workspace = f"{tmp_path}/workspace"
    assert words == [workspace, workspace, "-m", "moi_jax.train", "--config", config]


@pytest.mark.parametrize(("name", "extra"), [("train_gpu", "cuda"), ("train_tpu", "tpu")])
def test_a_job_is_started_again_where_that_helps_and_asks_for_its_disk(name, extra):
    found = task(name)
    recovery = found["resources"]["job_recovery"]
    assert recovery == {"max_restarts_on_errors": 0, "recover_on_exit_codes": [75, 143]}
    assert found["envs"]["NFS"] is None  # SkyPilot refuses to launch until it is given
    assert (ROOT / found["envs"]["CONFIG"]).exists()


@pytest.mark.parametrize(("name", "extra"), [("train_gpu", "cuda"), ("train_tpu", "tpu")])
def test_a_node_gets_a_python_that_is_new_enough(name, extra, tmp_path):
    stubs = Stubs(tmp_path)
    for program in ("sudo", "mountpoint", "python3"):
        stubs.add(program)
    environment = stubs.environment(HOME="/home/me", NFS="host:/moi")
    subprocess.run(["bash", "-c", task(name)["setup"]], env=environment, check=True)
    assert [" ".join(call) for call in stubs.calls("python3")[1:]] == [
        "-m uv venv --quiet --python 3.12 --allow-existing /home/me/moi",
        f"-m uv pip install --quiet --python /home/me/moi --editable .[{extra}]",
    ]
