"""launch/tpu_vm: what is asked of gcloud, and what runs on a worker, with stubs."""

import shutil
import signal
import subprocess

import pytest

from moi_jax.config.run import Cluster

from support.processes import start
from support.runs import ROOT
from support.stubs import Stubs

ZONE = ["--project=mine", "--zone=us-east5-b"]
QUEUED = ["compute", "tpus", "queued-resources"]
SSH = ["compute", "tpus", "tpu-vm", "ssh", *ZONE, "moi-jax"]
# $HERE/worker is the home of a worker. The states of a request are told in turn; - is a failure.
GCLOUD = """
command=${*: -1}
case "$3 $4" in
  "tpu-vm scp") cp "$7" "$8" "$HERE/worker/moi_jax" ;;
  "tpu-vm ssh") cd "$HERE/worker" && bash -c "${command#--command=}" ;;
  "queued-resources describe")
    state=$(sed -n 1p "$HERE/states"); sed -i 1d "$HERE/states"
    [[ $state != - ]] && echo "$state" ;;
esac
"""


@pytest.fixture
def stubs(tmp_path):
    stubs = Stubs(tmp_path)
    stubs.add("gcloud", GCLOUD)
    stubs.add("systemctl", "echo ${SERVICE:-inactive}")
    stubs.add("sudo")
    (tmp_path / "worker").mkdir()
    return stubs


@pytest.fixture
def settings(tmp_path):
    shipped = (ROOT / "launch" / "tpu_vm" / "settings.env").read_text()
    assert "\nPROJECT=\n" in shipped
    path = tmp_path / "mine.env"
    path.write_text(shipped.replace("\nPROJECT=\n", "\nPROJECT=mine\n"))
    return path


@pytest.fixture
def run(stubs, settings, tmp_path):
    """Runs a script of launch/tpu_vm, with these settings added."""

    def run(script, *arguments, added="", scripts=ROOT / "launch" / "tpu_vm", **variables):
        settings.write_text(settings.read_text() + added)
        return stubs.run(
            str(scripts / script), *arguments,
            SETTINGS=str(settings), HERE=str(tmp_path), POLL_SECONDS="0", **variables,
        )  # fmt: skip

    return run


def test_create_waits_until_the_slice_is_there(run, stubs, tmp_path):
    # gcloud fails at first, because there is no request, and once more while the request waits.
    states = ["-", "WAITING_FOR_RESOURCES", "-", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    (tmp_path / "states").write_text("\n".join(states))
    done = run("create.sh", added="CREATE_OPTIONS=(--spot '--description=a b')\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"moi-jax: {state}" for state in states[3:]]
    assert done.stderr == ""
    first, create, *describe = stubs.calls("gcloud")
    assert create == [
        *[*QUEUED, "create", *ZONE, "moi-jax", "--node-id=moi-jax", "--accelerator-type=v6e-16"],
        *["--runtime-version=v2-alpha-tpuv6e", "--spot", "--description=a b"],
    ]
    assert [first, *describe] == 6 * [
        [*QUEUED, "describe", *ZONE, "moi-jax", "--format=value(state.state)"]
    ]


def test_create_tells_that_there_is_no_slice(run, tmp_path):
    (tmp_path / "states").write_text("-\nFAILED")
    done = run("create.sh")
    assert done.returncode == 1
    assert done.stderr == (
        "error: there is no slice; delete the request by launch/tpu_vm/delete.sh\n"
    )


def test_create_waits_for_a_request_that_was_made_before(run, stubs, tmp_path):
    (tmp_path / "states").write_text("PROVISIONING\nACTIVE\n")
    assert run("create.sh").returncode == 0
    assert [call[3] for call in stubs.calls("gcloud")] == ["describe", "describe"]


def test_create_gives_up_after_many_failures_and_tells_that_the_request_stands(run, tmp_path):
    (tmp_path / "states").write_text(11 * "-\n")
    done = run("create.sh")
    assert done.returncode == 1
    error, request = done.stderr.splitlines()
    assert error == "error: gcloud failed 10 times in a row; the state of moi-jax is not known"
    assert request.startswith("the request moi-jax still stands, and its slice will cost money;")


def test_create_that_is_interrupted_tells_that_the_request_stands(stubs, settings, tmp_path):
    (tmp_path / "states").write_text("PROVISIONING\n" * 2)
    process = start(
        [ROOT / "launch" / "tpu_vm" / "create.sh"], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=stubs.environment(SETTINGS=str(settings), HERE=str(tmp_path), POLL_SECONDS="0.1"),
    )  # fmt: skip
    assert process.stdout.readline() == "moi-jax: PROVISIONING\n"
    process.send_signal(signal.SIGTERM)
    assert "the request moi-jax still stands" in process.communicate(timeout=30)[1]
    assert process.returncode == -signal.SIGTERM


def test_a_value_that_is_not_set_is_named(run, stubs, settings):
    done = run("delete.sh", added="PROJECT=\n")
    assert done.returncode == 2
    assert done.stderr == f"error: {settings}: set PROJECT\n"
    assert not stubs.calls("gcloud")


@pytest.fixture
def checkout(tmp_path):
    """A repository with these scripts, whose worker.sh only tells that it was started."""
    root = tmp_path / "checkout"
    shutil.copytree(ROOT / "launch" / "tpu_vm", root / "launch" / "tpu_vm")
    (root / "launch" / "tpu_vm" / "worker.sh").write_text("#!/bin/sh\necho worker.sh in $PWD\n")
    (root / ".gitignore").write_text("runs/\n")
    (root / "runs").mkdir()
    (root / "runs" / "ignored.txt").touch()
    (root / "not committed.py").touch()
    subprocess.run(["git", "init", "--quiet", root], check=True)
    return root


def sent(tmp_path):
    home = tmp_path / "worker" / "moi_jax"
    return {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}


def test_run_sends_code_and_settings_to_all_workers(run, stubs, settings, checkout, tmp_path):
    done = run("run.sh", scripts=checkout / "launch" / "tpu_vm", added="NAME=other\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"worker.sh in {tmp_path}/worker/moi_jax\nstarted;")
    check, copy, unpack = stubs.calls("gcloud")
    assert check[:-1] == unpack[:-1] == [*SSH[:-1], "other", "--worker=all"]
    assert copy[:6] + copy[8:] == [*SSH[:3], "scp", *ZONE, "other:moi_jax/", "--worker=all"]
    scripts = {f"launch/tpu_vm/{path.name}" for path in (ROOT / "launch" / "tpu_vm").iterdir()}
    more = {"moi_jax.tar.gz", "settings.env", ".gitignore", "not committed.py"}
    assert sent(tmp_path) == scripts | more
    assert (tmp_path / "worker/moi_jax/settings.env").read_text() == settings.read_text()


def test_run_removes_what_was_deleted_and_keeps_what_was_made_on_a_worker(run, checkout, tmp_path):
    run("run.sh", scripts=checkout / "launch" / "tpu_vm")
    (checkout / "not committed.py").unlink()
    for made in (".venv/pyvenv.cfg", "runs/moi/metrics.jsonl"):
        path = tmp_path / "worker" / "moi_jax" / made
        path.parent.mkdir(parents=True)
        path.touch()
    done = run("run.sh", scripts=checkout / "launch" / "tpu_vm")
    assert done.returncode == 0, done.stderr
    assert "not committed.py" not in sent(tmp_path)
    assert {".venv/pyvenv.cfg", "runs/moi/metrics.jsonl", ".gitignore"} < sent(tmp_path)


@pytest.mark.parametrize("state", ["active", "activating", "deactivating"])
def test_a_run_that_lasts_is_left_alone(run, stubs, checkout, state):
    done = run("run.sh", scripts=checkout / "launch" / "tpu_vm", SERVICE=state)
    assert done.returncode == 2
    assert done.stderr.startswith("error: it runs already on ")
    assert len(stubs.calls("gcloud")) == 1


@pytest.mark.parametrize(
    ("script", "arguments", "call"),
    [
        ("stop.sh", [], [*SSH, "--worker=all"]),
        ("logs.sh", [], [*SSH, "--worker=0"]),
        ("logs.sh", ["3"], [*SSH, "--worker=3"]),
        ("delete.sh", ["--quiet"], [*QUEUED, "delete", *ZONE, "moi-jax", "--force", "--quiet"]),
    ],
)
def test_the_slice_is_followed_stopped_and_deleted(run, stubs, script, arguments, call):
    done = run(script, *arguments)
    assert done.returncode == 0, done.stderr
    (asked,) = stubs.calls("gcloud")
    assert [word for word in asked if not word.startswith("--command=")] == call


def test_a_worker_starts_the_command_as_a_service(stubs, settings, tmp_path):
    scripts = tmp_path / "moi_jax" / "launch" / "tpu_vm"
    scripts.mkdir(parents=True)
    worker = shutil.copy(ROOT / "launch" / "tpu_vm" / "worker.sh", scripts)
    added = "COMMAND=(train --config 'a b.yaml' 'x=$HOME')\nNFS_EXPORT=10.0.0.2:/moi\n"
    added += f"MOUNT_POINT='{tmp_path}/mnt'\n"
    (tmp_path / "moi_jax" / "settings.env").write_text(settings.read_text() + added)
    for program in ("python3", "mount.nfs"):
        stubs.add(program)
    stubs.add("mountpoint", "exit 1")
    done = stubs.run(str(worker), HOME="/home/me")
    assert done.returncode == 0, done.stderr
    assert [call[:2] for call in stubs.calls("python3")] == [
        ["-m", "pip"],
        ["-m", "uv"],
        ["-m", "uv"],
    ]
    *mount, service = stubs.calls("sudo")
    assert ["mount", "-t", "nfs", "10.0.0.2:/moi", f"{tmp_path}/mnt"] in mount
    assert service[0] == "systemd-run"
    assert {"--property=RestartForceExitStatus=75", "--property=TimeoutStopSec=180"} < set(service)
    # A worker that comes back before the others have lost it would abort them.
    (pause,) = (word for word in service if word.startswith("--property=RestartSec="))
    assert int(pause.rpartition("=")[2]) > Cluster().lost_seconds
    command = service[service.index("-m") - 1 :]
    assert command == [
        *[f"{tmp_path}/moi_jax/.venv/bin/python", "-m", "moi_jax.train"],
        *["--config", "a b.yaml", "x=$$HOME"],
    ]
