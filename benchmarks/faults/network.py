"""Faults of a network: two hosts, each in a network namespace of its own, joined by a cable.

The cable is a pair of virtual interfaces. A pulled cable is one of them switched off. Each process
has a name and an address of its own, as on a real host. All is gone when the last process is.
"""

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path

from cases import Case
from joined_place import HOSTS, LOST_SECONDS, MARGIN, JoinedPlace, Moment
from joined_verdicts import LOST, judge_joined
from verdicts import EXACT, Verdict
from workplace import Skip

SHORT = 5  # seconds
# Shell: in the namespaces of a host, with its name and its addresses, becomes the command.
AS_HOST = 'hostname "$0" && mount --bind "$1" /etc/hosts && shift && exec "$@"'


def network(steps: int) -> Iterator[Case]:
    moment = Moment(steps // 4, 0.1)
    for process in range(HOSTS):
        for fault, play in {
            f"cable pulled for {SHORT} s": _pulled_shortly,
            "cable pulled for longer than lost_seconds": _pulled,
            f"suspended for {SHORT} s": _suspended_shortly,
            "suspended for longer than lost_seconds": _suspended,
        }.items():
            place = f"host of process {process}"
            yield Case("network of two hosts", place, fault, partial(play, process, moment), EXACT)


class Hosts:
    """Two network namespaces with a cable between them."""

    def __init__(self, directory: Path, name: str):
        self._file = directory / "hosts"
        self._names = [f"{name}-{index}" for index in range(HOSTS)]
        self.addresses = [f"10.213.7.{index + 1}" for index in range(HOSTS)]

    @contextmanager
    def plugged(self) -> Iterator[None]:
        """Makes the hosts, and removes them in the end."""
        lines = zip(["127.0.0.1", *self.addresses], ["localhost", *self._names], strict=True)
        self._file.write_text("".join(f"{address} {name}\n" for address, name in lines))
        with ExitStack() as made:
            for name in self._names:
                _ip("netns", "add", name)
                made.callback(_ip, "netns", "del", name)
            first, second = self._names
            _ip(*("link", "add", "cable", "netns", first, "type", "veth"),
                *("peer", "name", "cable", "netns", second))  # fmt: skip
            for index, (name, address) in enumerate(zip(self._names, self.addresses, strict=True)):
                _ip("-n", name, "address", "add", f"{address}/24", "dev", "cable")
                _ip("-n", name, "link", "set", "lo", "up")
                self.plug(index)
            yield

    def plug(self, host: int, state: str = "up") -> None:
        """Plugs the cable of a host in or, with "down", pulls it."""
        _ip("-n", self._names[host], "link", "set", "cable", state)

    def prefix(self, host: int) -> list[str]:
        """What runs a command on a host."""
        inside = ["unshare", "--uts", "--mount", "sh", "-c", AS_HOST]
        name = self._names[host]
        return ["ip", "netns", "exec", name, *inside, name, str(self._file)]


def _ip(*arguments: str) -> None:
    try:
        done = subprocess.run(["ip", *arguments], capture_output=True, text=True, check=False)
    except FileNotFoundError:
        raise Skip("needs the command ip (Debian's package iproute2)") from None
    if done.returncode:
        raise Skip(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


@contextmanager
def _on_network(place: JoinedPlace) -> Iterator[Hosts]:
    """Lets the processes of a case run on two hosts of a network."""
    place.directory.mkdir(parents=True, exist_ok=True)
    hosts = Hosts(place.directory, f"fault-{os.getpid()}-{place.directory.name}")
    with hosts.plugged():
        place.address = hosts.addresses[0]
        place.prefixes = [hosts.prefix(index) for index in range(HOSTS)]
        yield hosts


def _pulled_shortly(process: int, moment: Moment, place: JoinedPlace) -> Verdict:
    with _on_network(place) as hosts:
        processes = place.start_until(moment)
        hosts.plug(process, "down")
        time.sleep(SHORT)
        hosts.plug(process)
        return judge_joined(place, place.wait_all(processes), [{0}, {0}], "")


def _pulled(process: int, moment: Moment, place: JoinedPlace) -> Verdict:
    """Neither process hears of the other; each says that it lost it."""
    with _on_network(place) as hosts:
        processes = place.start_until(moment)
        hosts.plug(process, "down")
        ended = place.wait_all(processes, LOST_SECONDS + MARGIN)
        hosts.plug(process)
        causes = [r"^error: process 1 .* lost", r"^error: process 0 .* lost"]
        return judge_joined(place, ended, [{LOST}, {LOST}], causes)


def _suspended_shortly(process: int, moment: Moment, place: JoinedPlace) -> Verdict:
    with _on_network(place):
        processes = place.start_until(moment)
        processes[process].send_signal(signal.SIGSTOP)
        time.sleep(SHORT)
        processes[process].send_signal(signal.SIGCONT)
        return judge_joined(place, place.wait_all(processes), [{0}, {0}], "")


def _suspended(process: int, moment: Moment, place: JoinedPlace) -> Verdict:
    """The other process ends while this one is suspended, and this one soon after it wakes up."""
    with _on_network(place):
        processes = place.start_until(moment)
        processes[process].send_signal(signal.SIGSTOP)
        _wait(processes[1 - process], LOST_SECONDS + MARGIN)
        processes[process].send_signal(signal.SIGCONT)
        ended = place.wait_all(processes, LOST_SECONDS + MARGIN)
        causes = [rf"^error: process {process} .* lost"] * HOSTS
        causes[process] = "^error: process . .* lost"
        return judge_joined(place, ended, [{LOST}, {LOST}], causes)


def _wait(process: "subprocess.Popen[bytes]", seconds: float) -> None:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return  # it is judged as a process that does not end
