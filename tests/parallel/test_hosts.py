"""Joined processes on one machine: what they do together, and how they end together."""

import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from support.hosts import end_hosts, run_hosts, start_hosts
from support.runs import ROOT, parameters, records, same_parameters, small_config, train_here
from support.xla import QUICK_COMPILATION

LOST = 75


def run_program(*acts, count=2):
    return run_hosts(count, 1, ["tests.support.host_program", *acts], timeout=120)


@pytest.mark.parametrize(
    ("acts", "statuses", "shown"),
    [
        (("wait", "refuse"), [2, 2], ("process 1 (*) stopped: there is no file x", "")),
        (("refuse", "wait"), [2, 2], ("", "process 0 (*) stopped: there is no file x")),
        (("refuse", "refuse_slowly"), [2, 2], ("", "")),
        (("fail", "wait"), [1, 1], ("ZeroDivisionError", "process 0 (*) stopped: ZeroDiv")),
        (("wait", "terminate"), [143, 143], ("process 1 (*) stopped: stopped by SIGTERM", "")),
        (("wait", "kill"), [LOST, -9], ("process 1 (*) is lost: it gave no sign of life", "")),
        (("fail_after_another", "kill"), [LOST, -9], ("process 1 (*) is lost: it gave no", "")),
        (("kill", "wait"), [-9, LOST], ("", "process 0 (*) is lost: its connection is closed")),
        (("wait", "stick"), [LOST, LOST], ("process 1 (*) stopped: stuck: no step", "Thread")),
        (("differ",), [2, 2], ("process 1 (*) has another setting x than process 0", "")),
    ],
)  # fmt: skip
def test_processes_end_together_and_name_the_one_that_failed(acts, statuses, shown):
    outputs, found = run_program(*acts)
    assert found == statuses, outputs
    for (_, error), text in zip(outputs, shown, strict=True):
        assert text.replace("*", platform.node()) in error


def test_no_thread_waits_for_the_others_when_all_have_left():
    """At the end of Python it would abort the process, which is done, with status 134."""
    outputs, statuses = run_program("leave")
    assert statuses == [0, 0], outputs
    assert all("listening 0\n" in out for out, _ in outputs)


def test_a_process_that_does_not_come_is_not_waited_for():
    command = [sys.executable, "-m", "tests.support.host_program", "wait"]
    for index, told in (("0", "not all the others came"), ("1", "could not join the others")):
        flags = ["--coordinator", "localhost:1", "--num-processes", "2", "--process-id", index]
        done = subprocess.run(
            [*command, "--join-seconds", "3", *flags],
            cwd=ROOT, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == LOST
        assert told in done.stderr.splitlines()[-1]


def test_a_mistake_of_one_process_before_they_join_ends_all(tmp_path):
    config = hosts_config(tmp_path)
    processes = start_hosts(2, 1, ["moi_jax.train", "--config", config], ["train.steps=x"])
    outputs, statuses = end_hosts(processes, 120)
    assert statuses == [2, 2], outputs
    assert "process 1 (" in outputs[0][1]
    assert "train.steps" in outputs[0][1]


def test_a_suspended_process_is_lost_and_says_so_when_it_wakes():
    processes = start_hosts(2, 1, ["tests.support.host_program", "wait", "suspend"])
    assert processes[0].wait(60) == LOST
    processes[1].send_signal(signal.SIGCONT)
    outputs, statuses = end_hosts(processes, 60)
    assert statuses == [LOST, LOST], outputs
    assert "process 1 (" in outputs[0][1]
    assert "process 0 (" in outputs[1][1].splitlines()[-1]


def test_processes_exchange_values_of_any_size():
    outputs, statuses = run_program("together", count=3)
    assert statuses == [0, 0, 0], outputs
    assert all("from main 5000000 0\n" in out for out, _ in outputs)
    # The last one; a process may look before process 0 has deleted the two before.
    assert all("exchanges left " in out for out, _ in outputs)
    assert all(int(out.split("exchanges left ")[1].split()[0]) <= 3 for out, _ in outputs)


def test_one_process_of_each_disk_goes_first(tmp_path):
    """Three processes, of which two share a disk."""
    shared, own = f"in_turn:{tmp_path / 'shared'}", f"in_turn:{tmp_path / 'own'}"
    outputs, statuses = run_program(shared, own, shared, count=3)
    assert statuses == [0, 0, 0], outputs
    assert [out.splitlines()[-1] for out, _ in outputs] == ["made", "made", "found"]
    assert [path.name for path in tmp_path.glob("*/*")] == ["done", "done"]


def test_a_directory_that_is_not_shared_is_refused(tmp_path):
    outputs, statuses = run_program(f"share:{tmp_path / '0'}", f"share:{tmp_path / '1'}")
    assert statuses == [2, 2], outputs
    assert all("logging.run_dir" in error and "process 1 (" in error for _, error in outputs)


def test_processes_stop_at_the_same_call():
    """Each takes steps at its own pace; the signal comes to one of them."""
    processes = start_hosts(3, 1, ["tests.support.host_program", "step"])
    for process in processes:
        while "stepping" not in process.stdout.readline():
            assert process.poll() is None
    time.sleep(0.5)
    processes[2].send_signal(signal.SIGTERM)
    outputs, statuses = end_hosts(processes, 60)
    assert statuses == [143, 143, 143], outputs
    assert len({out for out, _ in outputs}) == 1, outputs


def hosts_config(directory: Path, **checkpoint) -> Path:
    """A run without held-out conversations, and split by fsdp alone in test_hosts_evaluate."""
    directory.mkdir(exist_ok=True)
    return small_config(
        directory,
        data={
            "cache_dir": str(directory.parent / "cache"),
            "held_out": {"fraction": 0, "min": 0},
            "sequence_length": 128,
            "max_unplaceable": 1,
        },
        mesh={"data": 2},
        train={"steps": 4, "global_batch_rows": 4},
        checkpoint={"every": 2, **checkpoint},
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The run of one process with four devices."""
    directory = tmp_path_factory.mktemp("alone")
    return train_here(hosts_config(directory / "run"), devices=4).directory


def same_run(left: Path, right: Path) -> None:
    """Asserts that each step has read the same rows, and that its losses are close."""
    ours, theirs = (
        [record for record in records(run / "metrics.jsonl") if "row" in record]
        for run in (left, right)
    )
    assert len(ours) == len(theirs)
    for mine, other in zip(ours, theirs, strict=True):
        for exact in ("step", "epoch", "row", "fill"):
            assert mine[exact] == other[exact]
        names = ["loss", "token_loss", "domain/chat/loss", "domain/maths/loss"]
        np.testing.assert_allclose(
            [mine[name] for name in names], [other[name] for name in names], atol=2e-5
        )


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """Where the local launcher has trained the same run with two processes of two devices.

    It made local copies of odd steps.
    """
    directory = tmp_path_factory.mktemp("launched")
    (directory / "tmp").mkdir()
    config = hosts_config(directory / "two", local_every=1)
    done = subprocess.run(
        [ROOT / "launch/local/run.sh", "2", "train", "--config", config],
        cwd=ROOT, capture_output=True, text=True, check=False,
        env={**os.environ, "DEVICES": "2", "LOGS": directory / "logs", "PYTHON": sys.executable,
             "XLA_FLAGS": QUICK_COMPILATION, "TMPDIR": directory / "tmp"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return directory


def test_two_processes_of_the_local_launcher_train_as_one(alone, launched):
    same_run(launched / "two" / "run", alone)
    other = (launched / "logs" / "process-1.log").read_text()
    assert "process 1 of 2 on " in other
    assert "step " not in other


def test_the_number_of_processes_may_change(alone, launched, tmp_path, log_text):
    """Two processes took two steps, four are stopped after the third, and one ends the run."""
    config = hosts_config(tmp_path / "changing")
    run = config.parent / "run"
    shutil.copytree(launched / "two" / "run", run)
    shutil.rmtree(run / "checkpoints" / "4")
    act = f"train:{config}:1"
    outputs, statuses = run_hosts(4, 1, ["tests.support.host_program", act])
    assert statuses == [0] * 4, outputs
    assert "resuming from step 2" in outputs[0][0]
    assert (run / "checkpoints" / "3").exists()
    assert train_here(config, devices=4, make_evaluations=None).step == 4
    assert "resuming from step 3" in log_text.getvalue()
    same_run(run, alone)


@pytest.fixture(scope="module")
def killed(launched, tmp_path_factory) -> tuple[Path, list[str]]:
    """The config of the same run, whose processes were killed after step 3, and what they said.

    Step 2 is in the run directory. Step 3 is on the disk of each host alone: host0, host1.
    """
    place = tmp_path_factory.mktemp("killed")
    config = hosts_config(place / "two", local_every=1)
    shutil.copytree(launched / "two" / "run", config.parent / "run")
    shutil.rmtree(config.parent / "run" / "checkpoints" / "4")
    act = f"train_until_killed:{config}:{place}"
    outputs, statuses = run_hosts(2, 2, ["tests.support.host_program", act])
    assert set(statuses) <= {-signal.SIGKILL, LOST}, outputs
    return config, [out for out, _ in outputs]


def test_a_finished_run_leaves_no_local_copy(launched):
    (folder,) = (launched / "tmp").glob("moi_jax_*")
    assert not list(folder.iterdir())
    assert (launched / "two" / "run" / "run_id").exists()


def test_all_processes_agree_on_the_newest_local_step_that_is_whole(killed):
    """As each of the processes found it before the end, with its copy hurt in different ways."""
    for out in killed[1]:
        found = [line for line in out.splitlines() if line.startswith("found ")]
        assert found == [
            "found 3 lacking False when all is there",
            "found 3 lacking True when one is deleted",
            "found 3 lacking True when one is damaged",
            "found none when both are damaged",
            "found none when they are of another mesh",
        ]


def test_processes_that_were_killed_go_on_from_their_local_copies(killed, launched):
    """The copy of process 1 is damaged, and beside it lies a newer one of another run."""
    config, _ = killed
    place, run = config.parents[1], config.parent / "run"
    (damaged,) = place.glob("host1/moi_jax_*/*/3.*/1/0.npz")
    folder = damaged.parents[2]
    shutil.copytree(folder, folder.with_name("another"))
    another = folder.with_name("another")
    (another / damaged.parents[1].name).rename(another / "9.x")
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    act = f"train_on:{config}:{place}"
    outputs, statuses = run_hosts(2, 2, ["tests.support.host_program", act])
    assert statuses == [0, 0], outputs
    assert "resuming from step 3" in outputs[0][0]
    named = f"{damaged.parent} on {platform.node()} is damaged and not used: 0.npz has changed"
    assert named in outputs[1][0]
    assert "1 of 2 processes had all of their parts" in outputs[0][0]
    same_parameters(parameters(run), parameters(launched / "two" / "run"))
    assert not folder.exists()
    assert (another / "9.x").exists()
