"""Local copies of two joined processes, each with a disk of its own."""

import itertools
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import jax

from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.checkpoints.local_copies import LocalCopies
from moi_jax.checkpoints.local_saves import LocalSaves
from moi_jax.config import Config, Mesh
from moi_jax.config.load import load_config
from moi_jax.parallel import hosts
from moi_jax.parallel.mesh import make_mesh
from moi_jax.training.optimizer import make_optimizer
from moi_jax.training.state import abstract_state
from moi_jax.training.train import train


def own_disk(place: Path) -> Path:
    """The folder for temporary files of this process from now on."""
    disk = place / f"host{hosts.process_index()}"
    disk.mkdir(exist_ok=True)
    tempfile.tempdir = str(disk)
    return disk


def train_on(config_path: Path, place: Path) -> None:
    own_disk(place)
    assert train(load_config(config_path)).finished


def train_until_killed(config_path: Path, place: Path) -> None:
    disk, calls = own_disk(place), itertools.count()
    config = load_config(config_path)

    def copy_is_written() -> bool:
        if next(calls) == 0:  # the first step is saved after this call
            return False
        (copies,) = disk.glob("moi_jax_*/*")
        while not (written := list(copies.glob(f"*.*/{hosts.process_index()}"))):
            time.sleep(0.01)
        hosts.wait_for_all("the copies")
        print_found(written[0].parents[1], disk, config)
        hosts.wait_for_all("the ways")
        os.kill(os.getpid(), signal.SIGKILL)
        return True

    train(config, stop=_calling(copy_is_written))


@contextmanager
def _calling(function: Callable[[], bool]) -> Iterator[Callable[[], bool]]:
    yield function


def print_found(copies: Path, disk: Path, config: Config) -> None:
    """Prints what a start would find if the copies were hurt in different ways."""
    mine = hosts.process_index()
    model = open_experiment(config, None).model
    optimizer = make_optimizer(config.optimizer, model)

    def look(when: str, hurt: Callable[[Path], None], data: int = 2) -> None:
        again = disk / "hurt"
        shutil.copytree(copies, again)
        (step,) = again.iterdir()
        hurt(step)
        mesh = make_mesh(Mesh(data=data), jax.devices())
        state = abstract_state(model, optimizer, config.param_dtype, mesh).items()
        with closing(LocalSaves(LocalCopies(again), "", [step.name], "", mesh)) as saves:
            found = saves.newest(2, 3, lambda beside_base: state)
        what = f"{found.step} lacking {found.lacking}" if found else "none"
        print(f"found {what} {when}", flush=True)
        shutil.rmtree(again)

    look("when all is there", lambda step: None)
    look("when one is deleted", lambda step: shutil.rmtree(step) if mine == 1 else None)
    look("when one is damaged", lambda step: damage(step) if mine == 1 else None)
    look("when both are damaged", damage)
    look("when they are of another mesh", lambda step: None, data=4)


def damage(step: Path) -> None:
    file = sorted(step.glob("*/*.npz"))[0]
    file.write_bytes(file.read_bytes()[:-1])
