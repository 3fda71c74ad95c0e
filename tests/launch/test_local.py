"""launch/local/run.sh: processes, logs, signals and the exit status, with a stub for Python."""

import signal
import subprocess
import time

import pytest

from support.processes import start
from support.runs import ROOT
from support.stubs import Stubs

# The last argument is the number of the process.
PYTHON = """
if [[ $1 == -c ]]; then exec python3 "$@"; fi
echo "process ${*: -1} with GPU $CUDA_VISIBLE_DEVICES and ${XLA_FLAGS:-no flags}"
"""
WAITING = """
trap 'echo stopped; exit 143' TERM
trap 'echo interrupted; exit 130' INT
echo waiting
for _ in {1..600}; do sleep 0.05; done
"""


@pytest.fixture
def stubs(tmp_path, monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return Stubs(tmp_path)


def run(stubs, tmp_path, *arguments, body="", **variables):
    python = stubs.add("python", PYTHON + body)
    variables = {"XLA_FLAGS": "", "LOGS": str(tmp_path / "logs"), **variables}
    return stubs.run("local/run.sh", *arguments, PYTHON=str(python), **variables)


def test_every_process_gets_the_command_and_its_place(stubs, tmp_path):
    done = run(stubs, tmp_path, "2", "train", "--config", "a b.yaml")
    assert done.returncode == 0, done.stderr
    calls = [call for call in stubs.calls("python") if call[0] == "-m"]
    coordinator = calls[0][5]
    assert coordinator.startswith("localhost:")
    assert sorted(calls) == [
        [
            *["-m", "moi_jax.train", "--config", "a b.yaml", "--coordinator", coordinator],
            *["--num-processes", "2", "--process-id", str(process)],
        ]
        for process in range(2)
    ]


def test_process_0_is_shown_and_each_has_a_log(stubs, tmp_path):
    done = run(stubs, tmp_path, "2", "train")
    lines = [f"process {process} with GPU {process} and no flags\n" for process in range(2)]
    assert done.stdout == lines[0]
    assert [(tmp_path / "logs" / f"process-{n}.log").read_text() for n in range(2)] == lines


def test_the_gpus_that_the_user_chose_are_dealt_out(stubs, tmp_path):
    run(stubs, tmp_path, "2", "train", CUDA_VISIBLE_DEVICES="5,GPU-7,2")
    logs = [(tmp_path / "logs" / f"process-{n}.log").read_text() for n in range(2)]
    assert [log.split()[4] for log in logs] == ["5", "GPU-7"]


def test_too_few_gpus_are_refused(stubs, tmp_path):
    done = run(stubs, tmp_path, "2", "train", CUDA_VISIBLE_DEVICES="5")
    assert done.returncode == 2
    assert done.stderr.startswith("error: CUDA_VISIBLE_DEVICES=5 has too few GPUs for 2 processes;")
    assert not stubs.calls("python")
    done = run(stubs, tmp_path, "2", "train", CUDA_VISIBLE_DEVICES="5", DEVICES="1")
    assert done.returncode == 0, done.stderr


def test_devices_are_simulated_beside_other_flags(stubs, tmp_path):
    done = run(stubs, tmp_path, "1", "train", DEVICES="4", XLA_FLAGS="--other")
    assert "--other --xla_force_host_platform_device_count=4" in done.stdout


def test_the_first_failure_is_the_exit_status(stubs, tmp_path):
    body = "if [[ ${*: -1} == 1 ]]; then exit 3; fi; sleep 0.5; exit 75"
    done = run(stubs, tmp_path, "2", "train", body=body)
    assert done.returncode == 3
    assert "process 1 ended with status 3\nprocess 0 ended with status 75" in done.stderr


@pytest.mark.parametrize("arguments", [[], ["train"], ["0", "train"], ["2"]])
def test_wrong_arguments_are_refused(stubs, tmp_path, arguments):
    done = run(stubs, tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr.startswith("error: give the number of processes and a command")
    assert not stubs.calls("python")


@pytest.mark.parametrize(
    ("sent", "line"), [(signal.SIGTERM, "stopped"), (signal.SIGINT, "interrupted")]
)
def test_a_signal_reaches_every_process(stubs, tmp_path, sent, line):
    python = stubs.add("python", PYTHON + WAITING)
    logs = [tmp_path / f"process-{n}.log" for n in range(2)]
    process = start(
        [ROOT / "launch" / "local" / "run.sh", "2", "train"],
        env=stubs.environment(PYTHON=str(python), LOGS=str(tmp_path)),
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 30
    while not all(log.exists() and "waiting" in log.read_text() for log in logs):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(sent)
    assert process.wait(timeout=30) == 128 + sent
    assert all(log.read_text().endswith(f"{line}\n") for log in logs)
