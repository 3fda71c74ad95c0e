"""A SLURM of this machine alone: munge, slurmctld and slurmd in a temporary directory."""

import os
import pwd
import re
import secrets
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
# A job that is requeued waits for cred_expire.
CONFIG = """
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
SlurmdPort={ports[1]}
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
AuthInfo=socket={directory}/munge.socket,cred_expire=5
StateSaveLocation={directory}/state
SlurmdSpoolDir={directory}/spool
SlurmctldPidFile={directory}/slurmctld.pid
SlurmdPidFile={directory}/slurmd.pid
ProctrackType=proctrack/pgid
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=60
NodeName=localhost NodeHostname={host} NodeAddr=127.0.0.1 CPUs=2
PartitionName=test Nodes=ALL Default=YES MaxTime=INFINITE
"""


class CannotStartError(Exception):
    """SLURM cannot start here, and why."""


class Slurm:
    """A running SLURM; its commands find it by the environment."""

    def __init__(self, environment: dict[str, str]):
        self._environment = environment

    def run(self, *command: str | Path, **variables: str) -> str:
        """What a command prints; it must succeed."""
        done = subprocess.run(
            command, env={**self._environment, **variables}, text=True, stdout=subprocess.PIPE
        )
        done.check_returncode()
        return done.stdout.strip()

    def job(self, number: str) -> dict[str, str]:
        """What is known about a job: JobState, Restarts, ExitCode, ..."""
        return dict(re.findall(r"(\w+)=(\S*)", self.run("scontrol", "show", "job", number)))

    def wait_for_end(self, number: str) -> dict[str, str]:
        """Waits until a job is neither running nor queued."""
        running = ("PENDING", "CONFIGURING", "RUNNING", "COMPLETING", "REQUEUED")
        wait_until(lambda: self.job(number)["JobState"] not in running, f"the end of job {number}")
        return self.job(number)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 600) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"waited {seconds:g} s for {what}")
        time.sleep(0.2)


@contextmanager
def one_node_slurm(directory: Path) -> Iterator[Slurm]:
    """Starts SLURM with a node of two CPUs, and ends all that was started.

    Raises:
      CannotStartError: it is not installed, or this machine does not let it start.
    """
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    if missing := [name for name in PROGRAMS if not shutil.which(name, path=path)]:
        raise CannotStartError(f"not installed: {', '.join(missing)}")
    environment = {**os.environ, "PATH": path, "SLURM_CONF": str(directory / "slurm.conf")}
    _write_config(directory)
    files = {"key-file": "munge.key", "socket": "munge.socket", "pid-file": "munge.pid"}
    files |= {"seed-file": "munge.seed", "log-file": "munge.log"}
    options = [f"--{option}={directory / name}" for option, name in files.items()]
    slurm = Slurm(environment)
    with ExitStack() as stack:
        for daemon in (["munged", "-F", "-f", *options], ["slurmctld", "-D"], ["slurmd", "-D"]):
            stack.enter_context(_running(daemon, directory, environment))
        try:
            wait_until(lambda: slurm.run("sinfo", "-h", "-o", "%T") == "idle", "the node", 60)
        except (TimeoutError, subprocess.CalledProcessError) as error:
            raise CannotStartError(f"{error}; {_last_lines(directory)}") from None
        try:
            yield slurm
        finally:
            slurm.run("scancel", f"--user={_user()}")
            wait_until(lambda: not slurm.run("squeue", "-h"), "the end of all jobs", 120)


def _user() -> str:
    return pwd.getpwuid(os.getuid()).pw_name


def _write_config(directory: Path) -> None:
    for name in ("state", "spool"):
        (directory / name).mkdir()
    key = directory / "munge.key"
    key.write_bytes(secrets.token_bytes(128))
    key.chmod(0o600)
    text = CONFIG.format(
        host=socket.gethostname(), user=_user(), directory=directory, ports=_free_ports(2)
    )
    (directory / "slurm.conf").write_text(text)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        servers = [stack.enter_context(socket.create_server(("", 0))) for _ in range(count)]
        return [server.getsockname()[1] for server in servers]


@contextmanager
def _running(daemon: list[str], directory: Path, environment: dict[str, str]) -> Iterator[None]:
    with (directory / f"{daemon[0]}.out").open("w") as output:
        process = subprocess.Popen(
            daemon, env=environment, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
        )
    try:
        yield
    finally:
        process.terminate()
        process.wait(timeout=60)


def _last_lines(directory: Path) -> str:
    outputs = [path.read_text().splitlines()[-1:] for path in sorted(directory.glob("*.out"))]
    return "; ".join(line for lines in outputs for line in lines)
