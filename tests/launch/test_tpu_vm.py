"""launch/tpu_vm: what is asked of gcloud, and what runs on a worker, with stubs."""

import shutil
import tarfile

import pytest

from moi_jax.config.run import Cluster

from support.runs import ROOT
from support.stubs import Stubs

ZONE = ["--project=mine", "--zone=us-east5-b"]
QUEUED = ["compute", "tpus", "queued-resources"]
SSH = ["compute", "tpus", "tpu-vm", "ssh", *ZONE, "moi-jax"]
# Copies what is sent to the workers into $HERE, and tells the states of a request in turn.
GCLOUD = """
case "$3 $4" in
  "tpu-vm scp") cp "$7" "$8" "$HERE" ;;
  "queued-resources describe") sed -n 1p "$HERE/states"; sed -i 1d "$HERE/states" ;;
esac
"""


@pytest.fixture
def stubs(tmp_path):
    stubs = Stubs(tmp_path)
    stubs.add("gcloud", GCLOUD)
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

    def run(script, *arguments, added=""):
        settings.write_text(settings.read_text() + added)
        return stubs.run(
            f"tpu_vm/{script}", *arguments,
            SETTINGS=str(settings), HERE=str(tmp_path), POLL_SECONDS="0",
        )  # fmt: skip

    return run


def test_create_waits_until_the_slice_is_there(run, stubs, tmp_path):
    states = ["WAITING_FOR_RESOURCES", "WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE"]
    (tmp_path / "states").write_text("\n".join(states))
    done = run("create.sh", added="CREATE_OPTIONS=(--spot '--description=a b')\n")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"moi-jax: {state}" for state in states[1:]]
    create, *describe = stubs.calls("gcloud")
    assert create == [
        *[*QUEUED, "create", *ZONE, "moi-jax", "--node-id=moi-jax", "--accelerator-type=v6e-16"],
        *["--runtime-version=v2-alpha-tpuv6e", "--spot", "--description=a b"],
    ]
    assert describe == 4 * [[*QUEUED, "describe", *ZONE, "moi-jax", "--format=value(state.state)"]]


def test_create_tells_that_there_is_no_slice(run, tmp_path):
    (tmp_path / "states").write_text("FAILED")
    done = run("create.sh")
    assert done.returncode == 1
    assert done.stderr.startswith("error: there is no slice; delete the request by")


def test_a_value_that_is_not_set_is_named(run, stubs, settings):
    done = run("delete.sh", added="PROJECT=\n")
    assert done.returncode == 2
    assert done.stderr == f"error: {settings}: set PROJECT\n"
    assert not stubs.calls("gcloud")


def test_run_sends_code_and_settings_to_all_workers(run, stubs, settings, tmp_path):
    new = ROOT / "launch" / "tpu_vm" / "not-committed.tmp"
    new.touch()
    try:
        done = run("run.sh", added="NAME=other\n")
    finally:
        new.unlink()
    assert done.returncode == 0, done.stderr
    check, copy, start = stubs.calls("gcloud")
    ssh = [*SSH[:-1], "other", "--worker=all"]
    assert check[:-1] == start[:-1] == ssh
    assert "systemctl --quiet is-active moi_jax" in check[-1]
    assert copy[:6] + copy[8:] == [*SSH[:3], "scp", *ZONE, "other:moi_jax/", "--worker=all"]
    assert start[-1] == (
        "--command=cd moi_jax && tar --extract --file=moi_jax.tar.gz && launch/tpu_vm/worker.sh"
    )
    assert (tmp_path / "settings.env").read_text() == settings.read_text()
    with tarfile.open(tmp_path / "moi_jax.tar.gz") as code:
        names = code.getnames()
        assert code.getmember("launch/tpu_vm/worker.sh").mode & 0o100
    assert {"moi_jax/train.py", "launch/tpu_vm/not-committed.tmp"} < set(names)
    assert not any(name.startswith(".git/") or "__pycache__" in name for name in names)


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
    for program in ("sudo", "python3", "mount.nfs"):
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
