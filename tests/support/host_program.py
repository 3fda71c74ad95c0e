"""A command for tests of joined processes: `python -m tests.support.host_program ACT...`.

Process i does the i-th act, and the last one if there are fewer.
"""

import argparse
import itertools
import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from moi_jax import config
from moi_jax.cli.arguments import add_hosts
from moi_jax.cli.command import run_command
from moi_jax.cli.hosts import join_hosts
from moi_jax.cli.signals import StopSignals
from moi_jax.common.errors import UserError
from moi_jax.common.log import show_logs
from moi_jax.config.load import load_config
from moi_jax.parallel import hosts, joining
from moi_jax.parallel.agreed_stop import LISTENER, Agreement
from moi_jax.parallel.stuck import ending_when_stuck


def wait() -> None:
    """Waits for the others, which do not come."""
    hosts.wait_for_all("nothing")


def refuse() -> None:
    raise UserError("there is no file x")


def refuse_slowly() -> None:
    """Fails as `refuse` does, and is still there when process 0 has left."""
    hosts.joined().watch.tell(2, "there is no file x")
    time.sleep(30)


def fail() -> None:
    raise ZeroDivisionError("a fault")


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def suspend() -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


def terminate() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


def stick() -> None:
    """Takes a step that never ends."""
    with ending_when_stuck(2, lambda: False):
        time.sleep(60)


def differ() -> None:
    hosts.check_same_code({"x": hosts.process_index(), "y": 1})


def leave() -> None:
    """Leaves the others; prints which threads still wait for a message of theirs."""
    agreement = Agreement(hosts.joined(), lambda: None)
    time.sleep(0.1)
    agreement.end()
    joining.leave()
    print("listening", sum(thread.name == LISTENER for thread in threading.enumerate()))


def fail_after_another() -> None:
    """Meets an error that comes from the loss of another process, as in a collective."""
    time.sleep(1)
    raise ZeroDivisionError("a consequence")


def together() -> None:
    """Does what processes do together; prints what each of them has seen."""
    index = hosts.process_index()
    hosts.check_same({"setting x": 1})
    big = hosts.from_main("something big", lambda: ["x" * 5_000_000, index])
    print("from main", len(big[0]), big[1])
    for _ in range(20):
        hosts.from_main("a number", lambda: 1)
        hosts.wait_for_all("a number")
    left = hosts.joined().store.key_value_dir_get("moi_jax/")
    print("exchanges left", len({key.split("/")[1] for key, _ in left if key[8].isdigit()}))


def in_turn(directory: str) -> None:
    """Does some work that is needed once on a disk."""
    with hosts.one_first(Path(directory), "the work"):
        done = Path(directory) / "done"
        print("found" if done.exists() else "made")
        time.sleep(0.5)
        done.touch()


def share(directory: str) -> None:
    hosts.check_shared(Path(directory), "logging.run_dir")


def step() -> int:
    """Takes steps at a pace of its own until all stop; prints how many."""
    pace = random.Random(hosts.process_index())
    signals, calls = StopSignals(60), 1
    with signals.watching() as should_stop:
        print("stepping", flush=True)
        while not should_stop():
            calls += 1
            time.sleep(pace.random() / 50)
    print("calls", calls)
    return signals.exit_status


@contextmanager
def _stop_after(steps: int) -> Iterator[Callable[[], bool]]:
    calls = itertools.count(1)
    yield lambda: next(calls) >= steps


def train(config_path: str, steps: str) -> None:
    """Trains so many steps of a run."""
    from moi_jax.training import train as training  # the other acts begin without it sooner

    training.train(load_config(config_path), stop=_stop_after(int(steps)))


def train_on(config_path: str, place: str) -> None:
    """Trains to the end of a run; the disk of each host is a folder of `place`."""
    from tests.support import local_copies

    local_copies.train_on(Path(config_path), Path(place))


def train_until_killed(config_path: str, place: str) -> None:
    """Trains until the first local copy is written; then all processes are killed."""
    from tests.support import local_copies

    local_copies.train_until_killed(Path(config_path), Path(place))


def save(directory: str, failing: str, passes: str) -> None:
    """Saves two checkpoints; the process `failing` cannot write the second one at first."""
    from tests.support.joined_saves import save_twice

    save_twice(Path(directory), hosts.process_index() == int(failing), passes == "passes")


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("acts", nargs="+")
    parser.add_argument("--join-seconds", type=int, default=60)
    add_hosts(parser)
    args = parser.parse_args()
    show_logs(process_index=hosts.process_index)
    join_hosts(args, config.Cluster(join_seconds=args.join_seconds, lost_seconds=3))
    act, *rest = args.acts[min(hosts.process_index(), len(args.acts) - 1)].split(":")
    return globals()[act](*rest) or 0


if __name__ == "__main__":
    run_command(main)
