"""Runs launch/slurm in a real SLURM of this machine: prepare, train, requeue, resume.

    python tests/launch/slurm.py

Two tasks train the quickstart for a few steps. A run that is interrupted must end with the
parameters of one that is not, bit for bit. It takes some minutes. Where SLURM is not installed or
cannot start, it prints SKIPPED and why.
"""

import shlex
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from support.runs import ROOT, logged_steps, parameters, same_parameters
from support.slurm import CannotStartError, Slurm, one_node_slurm, wait_until
from support.xla import xla_flags

LAUNCH = ROOT / "launch" / "slurm"
STEPS = 12
# The shipped settings, but two tasks without GPUs, and jobs that find this checkout.
SETTINGS = """
source launch/slurm/settings.env
CONFIG=configs/quickstart.yaml
OVERRIDES=({overrides})
COMMAND=(train --config "$CONFIG" "${{OVERRIDES[@]}}")
PYTHON={python}
JOB_NAME={name}
TASKS_PER_NODE=2 GPUS_PER_NODE=0 CPUS_PER_TASK=1 PREPARE_JOBS=2 PREPARE_CPUS=1
LOGS={directory}/logs
export JAX_PLATFORMS=cpu XLA_FLAGS="{xla_flags}"
export JAX_COMPILATION_CACHE_DIR={directory}/programs JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=0.1
"""


@dataclass
class Runs:
    """Runs of the same experiment in one SLURM."""

    slurm: Slurm
    directory: Path

    def submit(self, kind: str, name: str, *options: str) -> str:
        """Submits the job of a run; returns its number."""
        settings = self.directory / f"{name}.env"
        overrides = [
            *[f"train.steps={STEPS}", "train.sample_prompts=[]", "eval.every=0", "logging.every=1"],
            *["checkpoint.every=3", "cluster.lost_seconds=10", "logging.trackers=[]"],
            *[f"logging.run_dir={self.run(name)}", f"data.cache_dir={self.directory / 'cache'}"],
        ]
        values = {"python": sys.executable, "name": name, "directory": self.directory}
        values |= {"overrides": shlex.join(overrides), "xla_flags": xla_flags(devices=1)}
        settings.write_text(SETTINGS.format(**values))
        return self.slurm.run(LAUNCH / "submit.sh", kind, *options, SETTINGS=str(settings))

    def run(self, name: str) -> Path:
        return self.directory / name

    def log(self, job: str) -> str:
        """All that a job has written."""
        logs = sorted((self.directory / "logs").glob(f"{job}[.-]*"))
        return "\n".join(f"{log.name}:\n{log.read_text()}" for log in logs)

    def check_done(self, job: str, restarts: int) -> None:
        found = self.slurm.wait_for_end(job)
        seen = found["JobState"], found["ExitCode"], found["Restarts"]
        assert seen == ("COMPLETED", "0:0", str(restarts)), f"{seen}\n{self.log(job)}"

    def wait_for_checkpoint(self, name: str) -> None:
        checkpoints = self.run(name) / "checkpoints"
        wait_until(lambda: any(checkpoints.glob("[1-9]*/SHA256SUMS")), f"a checkpoint of {name}")


def main() -> None:
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # the daemons end too
    with tempfile.TemporaryDirectory() as directory:
        try:
            with one_node_slurm(Path(directory)) as slurm:
                check(Runs(slurm, Path(directory)))
        except CannotStartError as error:
            print(f"SKIPPED: {error}")


def check(runs: Runs) -> None:
    for script in sorted(LAUNCH.glob("*.sbatch")):
        runs.slurm.run("sbatch", "--test-only", script)
        print(f"sbatch --test-only {script.name}: accepted", flush=True)

    prepared = runs.submit("prepare", "prepare")
    whole = runs.submit("train", "whole", f"--dependency=afterok:{prepared}")
    runs.check_done(whole, restarts=0)
    expected = parameters(runs.run("whole"))
    print(f"prepared by an array of jobs, and trained {STEPS} steps", flush=True)

    def kill_a_task(job: str) -> None:
        pids = runs.slurm.run("scontrol", "listpids", job)
        (pid,) = (line.split()[0] for line in pids.splitlines() if line.split()[3] == "1")
        runs.slurm.run("kill", "-KILL", pid)

    interruptions: dict[str, Callable[[str], object]] = {
        "scontrol_requeue": lambda job: runs.slurm.run("scontrol", "requeue", job),
        "scancel_signal_TERM": lambda job: runs.slurm.run("scancel", "--signal=TERM", job),
        "kill_a_task": kill_a_task,
    }
    for name, interrupt in interruptions.items():
        job = runs.submit("train", name)
        runs.wait_for_checkpoint(name)
        interrupt(job)
        runs.check_done(job, restarts=1)
        assert "requeued 1 times" in runs.log(job)
        assert logged_steps(runs.run(name) / "metrics.jsonl") == list(range(1, STEPS + 1))
        same_parameters(parameters(runs.run(name)), expected)
        print(f"{name}: requeued, resumed, same parameters", flush=True)

    job = runs.submit("train", "scancel")
    runs.wait_for_checkpoint("scancel")
    runs.slurm.run("scancel", job)
    found = runs.slurm.wait_for_end(job)
    assert (found["JobState"], found["Restarts"]) == ("CANCELLED", "0"), found
    print("scancel: not requeued", flush=True)


if __name__ == "__main__":
    main()
