"""Where a case on two hosts happens: as on one (see workplace.py), but joined processes train."""

import dataclasses
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from workplace import Done, Lab, Trap, Workplace

HOSTS = 2
DEVICES = 2  # simulated, of each process
LOST_SECONDS = 10  # longer than a cable is pulled for, with the pauses of TCP after it
JOIN_SECONDS = 60
MARGIN = 30  # seconds by which an end may be late where other programs use the machine, too

# The config of one host, with shorter rows and without answers: each step and each start is made by
# two processes.
OVERRIDES = {
    "data": {"sequence_length": 128, "max_unplaceable": 1},
    "train": {"global_batch_rows": 4, "sample_prompts": []},
    "cluster": {"lost_seconds": LOST_SECONDS, "join_seconds": JOIN_SECONDS},
}


class Missed(Exception):
    """The processes ended before the moment of the fault."""


@dataclass(frozen=True)
class Moment:
    """A time in a run: some seconds after a file appeared, or after a step was logged.

    Attributes:
      after: a glob in the directory of the case, or a step.
    """

    after: str | int
    seconds: float

    def __str__(self) -> str:
        what = f"step {self.after}" if isinstance(self.after, int) else f"{self.after} is there"
        return f"{self.seconds:.2f} s after {what}"

    def has_come(self, place: "JoinedPlace") -> bool:
        """Whether the file is there, or the step is logged."""
        if isinstance(self.after, str):
            return any(place.directory.glob(self.after))
        path = place.run / "metrics.jsonl"
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        return any(line.startswith(f'{{"step": {self.after},') for line in lines)


class JoinedPlace(Workplace):
    """The directory of one case, in which two joined processes train.

    Attributes:
      address: where process 0 is found.
      prefixes: of the command of each process.
    """

    XLA_FLAGS = f"--xla_force_host_platform_device_count={DEVICES}"

    def __init__(self, directory: Path, lab: Lab):
        super().__init__(directory, lab)
        self.address = "localhost"
        self.prefixes: list[list[str]] = [[]] * HOSTS

    def config(self) -> str:
        values = yaml.safe_load(super().config())
        for section, keys in OVERRIDES.items():
            values[section] = {**values.get(section, {}), **keys}
        return yaml.safe_dump(values)

    def start_all(
        self,
        *arguments: str,
        traps: Mapping[int, Trap] | None = None,
        environments: Mapping[int, Mapping[str, str]] | None = None,
        alone: bool = False,
        name: str = "log",
    ) -> list["subprocess.Popen[bytes]"]:
        """Starts the command in all processes.

        Args:
          traps, environments: of single processes.
          alone: process 0 is started without the others.
          name: of the files for their output.
        """
        started = []
        flags = ["--coordinator", f"{self.address}:{free_port()}", "--num-processes", str(HOSTS)]
        for index in range(1 if alone else HOSTS):
            with ExitStack() as files:
                out, err = (
                    files.enter_context((self.directory / f"{name}-{index}.{kind}").open("wb"))
                    for kind in ("out", "err")
                )
                process = self.start(
                    *(*arguments, *flags, "--process-id", str(index)),
                    trap=(traps or {}).get(index),
                    environment=(environments or {}).get(index),
                    prefix=self.prefixes[index], stdout=out, stderr=err,
                )  # fmt: skip
            started.append(process)
        self._trapped = bool(traps)
        return started

    def start_until(self, moment: Moment) -> list["subprocess.Popen[bytes]"]:
        """Starts a new run, and returns at a moment in it."""
        self.begin("new")
        processes = self.start_all()
        self.wait_for(moment, processes)
        return processes

    def wait_for(self, moment: Moment, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        """Waits for a moment at which all processes still run; without it, the case is over."""
        deadline = time.monotonic() + self.lab.timeout
        try:
            while not moment.has_come(self):
                _must_run(processes, time.monotonic() < deadline)
                time.sleep(0.01)
            time.sleep(moment.seconds)
            _must_run(processes, True)
        except Missed:
            self.wait_all(processes, seconds=1)
            raise

    def wait_all(
        self,
        processes: Sequence["subprocess.Popen[bytes]"],
        seconds: float | None = None,
        name: str = "log",
    ) -> list[Done]:
        """Waits for the end of all processes; those that still run after `seconds` are killed."""
        begin = time.monotonic()
        deadline = begin + (seconds or self.lab.timeout)
        ends: dict[int, float] = {}
        try:
            while len(ends) < len(processes) and time.monotonic() < deadline:
                for index, process in enumerate(processes):
                    if index not in ends and process.poll() is not None:
                        ends[index] = time.monotonic() - begin
                time.sleep(0.02)
        finally:
            for process in processes:
                process.send_signal(signal.SIGCONT)
                process.kill()
                process.wait()
        sprung = not self._trapped or self._sprung.exists()
        return [
            Done(
                status=process.returncode if index in ends else None,
                stdout=self._output(f"{name}-{index}.out"),
                stderr=self._output(f"{name}-{index}.err"),
                sprung=sprung,
                seconds=ends.get(index, deadline - begin),
            )
            for index, process in enumerate(processes)
        ]

    def train_all(self, *arguments: str, **options: Any) -> list[Done]:
        """Runs the command to its end in all processes; for the options see `start_all`."""
        before = self._saved_files()
        ended = self.wait_all(self.start_all(*arguments, **options))
        after = set(self._saved_files().values())
        lost = [name for name, digest in before.items() if digest not in after]
        return [dataclasses.replace(done, lost=lost) for done in ended]

    def train(self, *arguments: str, **options: Any) -> Done:
        """As `train_all`; returns the first process that failed, or process 0."""
        ended = self.train_all(*arguments, **options)
        return next((done for done in ended if done.status), ended[0])

    def results(self) -> dict[str, str]:
        """The digests of what must be equal bit for bit; there are no sample answers."""
        return {name: digest for name, digest in super().results().items() if name != "samples"}

    def _output(self, name: str) -> str:
        return (self.directory / name).read_text(encoding="utf-8", errors="replace")


def _must_run(processes: Sequence["subprocess.Popen[bytes]"], in_time: bool) -> None:
    if not in_time or any(process.poll() is not None for process in processes):
        raise Missed("the fault never happened")


def free_port() -> int:
    with socket.socket() as free:
        free.bind(("", 0))
        return free.getsockname()[1]
