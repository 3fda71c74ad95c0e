"""launch/slurm: what is asked of SLURM, and when a job goes back into the queue, with stubs.

slurm.py beside this file runs the same scripts in a real SLURM.
"""

import sys

import pytest

from support.runs import ROOT, small_config
from support.stubs import Stubs

KILL_WAIT = 'if [[ $1 == show ]]; then echo "KillWait                = 30 sec"; fi'


@pytest.fixture
def stubs(tmp_path):
    stubs = Stubs(tmp_path)
    stubs.add("sbatch", "echo 17")
    stubs.add("scontrol", KILL_WAIT)
    stubs.add("squeue", "echo $STATE")
    stubs.add("srun", "exit $STATUS")
    return stubs


@pytest.fixture
def settings(tmp_path):
    """The shipped settings with a small config, and no GPU."""
    shipped = (ROOT / "launch" / "slurm" / "settings.env").read_text()
    config = small_config(tmp_path, checkpoint={"grace_seconds": 40})
    values = {
        "CONFIG=configs/qwen_7b_moi.yaml": f"CONFIG='{config}'",
        "OVERRIDES=()": "OVERRIDES=(train.steps=7)",
        "PYTHON=.venv/bin/python": f"PYTHON={sys.executable}",
        "GPUS_PER_NODE=8": "GPUS_PER_NODE=0",
        "LOGS=runs/slurm": f"LOGS={tmp_path / 'logs'}",
    }
    for value, other in values.items():
        assert value in shipped
        shipped = shipped.replace(value, other)
    path = tmp_path / "settings.env"
    path.write_text(shipped)
    return path


def test_train_is_submitted_with_the_settings(stubs, settings, tmp_path):
    done = stubs.run("slurm/submit.sh", "train", "--hold", SETTINGS=str(settings))
    assert done.returncode == 0, done.stderr
    assert done.stdout == "17\n"
    assert stubs.calls("sbatch") == [
        [
            *["--parsable", "--job-name=moi_jax", "--nodes=1", "--ntasks-per-node=8"],
            *["--cpus-per-task=8", "--time=1-00:00:00", "--signal=TERM@180"],
            *[f"--output={tmp_path}/logs/%j.log", "--hold"],
            *[f"{ROOT}/launch/slurm/train.sbatch", str(settings)],
        ]
    ]
    assert done.stderr.startswith("warning: after scancel, scontrol requeue or a preemption this")
    assert "KillWait = 30 seconds, and checkpoint.grace_seconds is 40;" in done.stderr


def test_gpus_are_asked_for(stubs, settings):
    settings.write_text(settings.read_text() + "GPUS_PER_NODE=4 COMMAND=(evaluate runs/moi)\n")
    done = stubs.run("slurm/submit.sh", "train", SETTINGS=str(settings))
    assert "--gpus-per-node=4" in stubs.calls("sbatch")[0]
    assert done.stderr == ""  # only training has to save


def test_too_short_a_time_to_save_is_refused(stubs, settings):
    settings.write_text(settings.read_text() + "STOP_SECONDS=69\n")
    done = stubs.run("slurm/submit.sh", "train", SETTINGS=str(settings))
    assert done.returncode == 2
    assert done.stderr == (
        f"error: {settings}: STOP_SECONDS=69 is too short to save; checkpoint.grace_seconds is 40, "
        "so choose 70 or more\n"
    )
    assert not stubs.calls("sbatch")


def test_a_config_with_a_mistake_is_not_submitted(stubs, settings):
    settings.write_text(settings.read_text() + "COMMAND+=(train.stepz=1)\n")
    done = stubs.run("slurm/submit.sh", "train", SETTINGS=str(settings))
    assert done.returncode == 2
    assert "unknown key 'stepz' in train" in done.stderr
    assert not stubs.calls("sbatch")


def test_prepare_is_an_array_of_shards(stubs, settings, tmp_path):
    done = stubs.run("slurm/submit.sh", "prepare", SETTINGS=str(settings))
    assert done.returncode == 0, done.stderr
    assert stubs.calls("sbatch") == [
        [
            *[
                "--parsable",
                "--job-name=moi_jax",
                "--array=1-16",
                "--ntasks=1",
                "--cpus-per-task=8",
            ],
            *["--time=04:00:00", f"--output={tmp_path}/logs/%A-prepare-%a.log"],
            *[f"{ROOT}/launch/slurm/prepare.sbatch", str(settings)],
        ]
    ]
    # One share alone is still one of 16.
    variables = {"SLURM_ARRAY_TASK_ID": "3", "SLURM_ARRAY_TASK_COUNT": "1"}
    stubs.run("slurm/prepare.sbatch", str(settings), **variables, STATUS="0")
    assert stubs.calls("srun") == [
        [
            *["--ntasks=1", "--cpus-per-task=8", sys.executable, "-m", "moi_jax.prepare"],
            *["--config", str(tmp_path / "config.yaml"), "train.steps=7", "--shard", "3/16"],
        ]
    ]


@pytest.mark.parametrize(
    ("status", "tasks", "state", "requeued"),
    [
        (143, 1, "RUNNING", True),  # before the time limit, or by scancel --signal=TERM
        (75, 8, "RUNNING", True),  # a host was lost
        (137, 8, "RUNNING", True),  # a task was killed, which the others call a lost host
        (137, 1, "RUNNING", False),
        (130, 8, "RUNNING", False),
        (134, 8, "RUNNING", False),  # a task aborts, which it would do again
        (139, 8, "RUNNING", False),
        (0, 8, "RUNNING", False),
        (1, 8, "RUNNING", False),
        (2, 8, "RUNNING", False),
        (143, 8, "COMPLETING", False),  # scancel, or SLURM requeues it itself
    ],
)
def test_a_job_goes_back_into_the_queue(stubs, settings, status, tasks, state, requeued):
    done = job(stubs, settings, STATUS=str(status), SLURM_NTASKS=str(tasks), STATE=state)
    assert done.returncode == status
    assert stubs.calls("scontrol") == ([["requeue", "17"]] if requeued else [])


def test_a_job_is_requeued_only_so_often(stubs, settings):
    done = job(stubs, settings, STATUS="75", SLURM_RESTART_COUNT="50")
    assert done.returncode == 75
    assert done.stderr == (
        "error: not requeued: it was requeued MAX_REQUEUES=50 times; "
        "submit the job again to resume\n"
    )
    assert not stubs.calls("scontrol")


def test_a_busy_controller_is_asked_again(stubs, settings, tmp_path):
    stubs.add("squeue", f"mkdir '{tmp_path}/asked' 2>/dev/null && exit 1; echo $STATE")
    job(stubs, settings, STATUS="75", RETRY_SECONDS="0")
    assert stubs.calls("scontrol") == [["requeue", "17"]]


@pytest.mark.parametrize(("name", "what"), [("squeue", "squeue"), ("scontrol", "scontrol requeue")])
def test_a_job_that_cannot_be_requeued_says_so(stubs, settings, name, what):
    stubs.add(name, "exit 1")
    done = job(stubs, settings, STATUS="75", RETRY_SECONDS="0")
    assert done.returncode == 75
    assert done.stderr == (f"error: not requeued: {what} fails; submit the job again to resume\n")


@pytest.mark.parametrize("script", ["train", "prepare"])
def test_a_job_without_settings_does_not_run_others(stubs, script):
    done = stubs.run(f"slurm/{script}.sbatch")
    assert done.returncode != 0
    assert "launch/slurm/submit.sh submits this script and names the settings" in done.stderr
    assert not stubs.calls("srun")


def job(stubs, settings, **variables):
    of_slurm = {"SLURM_JOB_ID": "17", "SLURM_NTASKS": "8", "SLURM_JOB_NODELIST": "node-1"}
    defaults = {**of_slurm, "STATE": "RUNNING"}
    return stubs.run("slurm/train.sbatch", str(settings), **{**defaults, **variables})
