"""Simulated hosts: joined processes of one command, each with devices of its own."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

from support.processes import start
from support.runs import ROOT
from support.xla import xla_flags


def start_hosts(
    count: int, devices: int, command: Sequence[Any], of_last: Sequence[str] = ()
) -> list[subprocess.Popen]:
    """Starts `python -m COMMAND` in so many processes, which find each other at a free port.

    Args:
      devices: of each process.
      command: the name of a module and its arguments, the same for all.
      of_last: more arguments of the last process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    together = ["--coordinator", f"localhost:{port}", "--num-processes", str(count)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(devices)}
    return [
        start(
            [sys.executable, "-m", *map(str, command), *together, "--process-id", str(index),
             *(of_last if index == count - 1 else ())],
            cwd=ROOT, env=environment, text=True,
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in range(count)
    ]  # fmt: skip


def end_hosts(
    processes: Sequence[subprocess.Popen], timeout: float = 300
) -> tuple[list[tuple[str, str]], list[int]]:
    """Waits for the end of all; returns (standard output, standard error) and status of each.

    Those that are not done in time are killed, and the test fails.
    """
    try:
        outputs = [process.communicate(timeout=timeout) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return outputs, [process.returncode for process in processes]


def run_hosts(
    count: int, devices: int, command: Sequence[Any], timeout: float = 300
) -> tuple[list[tuple[str, str]], list[int]]:
    """Runs a command in so many processes, see `start_hosts` and `end_hosts`."""
    return end_hosts(start_hosts(count, devices, command), timeout)
