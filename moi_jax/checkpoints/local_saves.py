"""Saves on the hosts' own disks, every few steps: a run that was killed repeats less.

Each process writes the parts of the state that its devices hold, and waits for no other one. At the
start of the run all agree on the newest step that is whole, which is one each part of which some
process still has. Who lacks a part gets it over the mesh from a replica, bit by bit: the axis
`data` has a copy of each part on another host.

orbax's emergency checkpoints have this purpose; docs/reliability.md says why they are not used.
"""

import dataclasses
import hashlib
import logging
import math
import os
import platform
import tempfile
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from moi_jax import config as config_lib
from moi_jax.checkpoints.items import Base
from moi_jax.checkpoints.local_agreement import newest_whole, tell_not_whole
from moi_jax.checkpoints.local_copies import Copy, Json, LocalCopies, Part, step_number
from moi_jax.checkpoints.local_history import read_history, write_history
from moi_jax.checkpoints.local_replicas import from_replicas
from moi_jax.common.errors import UserError, reason
from moi_jax.common.home import expand_home
from moi_jax.common.log import EVERY_HOST
from moi_jax.parallel import hosts

FORMAT = 2  # goes up when other files or records are written

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LocalStep:
    """A step that the processes together have whole.

    Attributes:
      path: its folder on this host, which may lack it.
      copy: what is there.
      record: "position", "config" and more, see `LocalSaves.save`.
      lacking: whether some process needs a part that it does not have.
    """

    step: int
    path: Path
    copy: Copy
    record: Json
    lacking: bool

    @property
    def base(self) -> Base | None:
        """See `ModelItems.base`."""
        return Base(**self.record["base"]) if self.record["base"] else None


@contextmanager
def local_saves(
    config: config_lib.Checkpoint, directory: Path, mesh: Mesh
) -> Iterator["LocalSaves | None"]:
    """Yields the local saves of a run, None if it makes none; removes them at the end of the block.

    An error in the block leaves them for the next start.

    Args:
      directory: of the run. It is not changed.

    Raises:
      UserError: the folder cannot be written.
    """
    if config.local_every is None:
        yield None
        return
    start, place, run_id, *history = hosts.from_main(
        "the id of the run",
        lambda: [
            uuid.uuid4().hex[:8],
            str(directory.resolve()),
            *(read_history(directory) or [uuid.uuid4().hex]),
        ],
    )
    # A copy of the run directory has the same id, but is another run.
    folder = hashlib.sha256(f"{run_id} {place}".encode()).hexdigest()[:32]
    if config.local_dir:
        copies = LocalCopies(expand_home(config.local_dir) / folder)
    else:
        own = Path(tempfile.gettempdir()) / f"moi_jax_{os.getuid()}"
        copies = LocalCopies(own / folder, private=True)
    saves = LocalSaves(copies, run_id, history, start, mesh)
    try:
        yield saves
        saves.wait()
        hosts.wait_for_all("the last step")
        saves.copies.remove()
    finally:
        saves.close()


class LocalSaves:
    """Saves and restores a run's state on the disks of its hosts.

    A part is numbered by its place on the mesh without the axis `data`, in whose direction the
    state is replicated.
    """

    def __init__(
        self, copies: LocalCopies, run_id: str, history: Sequence[str], start: str, mesh: Mesh
    ):
        """
        Args:
          history: the last start of the run, and the copy from which it went on, if from one.
          start: identifies this start of the run.
        """
        self.copies, self._run_id = copies, run_id
        self._history, self._start, self._mesh = history, start, mesh
        self._parts = {  # of the devices of this process
            device: int(np.ravel_multi_index(place[1:], mesh.devices.shape[1:]))
            for place, device in np.ndenumerate(mesh.devices)
            if device.process_index == jax.process_index()
        }
        self._thread = ThreadPoolExecutor(1, "local save")
        self._writing: Future[None] | None = None
        self._failed = False

    def save(self, step: int, state: Any, position: Json, config: Json, base: Base | None) -> None:
        """Starts a save; returns when the values are copied from the devices.

        One that the system refuses is a warning: the run, and the other hosts, do not need it.

        Args:
          state: a pytree of arrays on the mesh.
          position, config: as in a checkpoint.
          base: of adapters, whose other parameters are not in `state`.
        """
        self.wait()
        leaves = _by_name(state)
        record = {
            "format": FORMAT,
            "position": position,
            "config": config,
            "base": dataclasses.asdict(base) if base else None,
            "mesh": dict(self._mesh.shape),
            "dtypes": {name: str(leaf.dtype) for name, leaf in leaves.items()},
            "layout": _layout(leaves),
        }
        self._writing = self._thread.submit(self._write, step, record, self._copy_parts(leaves))

    def wait(self) -> None:
        """Waits until the last save is written, or has failed."""
        if self._writing:
            self._writing.result()

    def close(self) -> None:
        """Waits for the last save, and ends the thread."""
        self._thread.shutdown()

    def newest(self, after: int, logged: int, abstract: Callable[[bool], Any]) -> LocalStep | None:
        """The newest step after `after` that is whole and goes on with the run.

        All processes call it, and get the same. A warning names each copy that is not used.

        Args:
          logged: the last step of the metrics that are there.
          abstract: whether a copy is beside a base -> the state that it must hold.
        """
        held = {}
        for name, copy in self.copies.sound(after).items():
            if unfit := self._unfit(name, copy.record, logged, abstract):
                log.warning(
                    f"the local copy {self.copies.folder / name} on {platform.node()} is not used: "
                    f"{unfit}", extra={EVERY_HOST: True},
                )  # fmt: skip
            else:
                held[name] = copy
        needed = sorted(set(self._parts.values()))
        mine: Json = {"needed": needed, "held": {name: sorted(held[name].parts) for name in held}}
        reports = hosts.gather("the local copies", mine)
        newest = newest_whole(reports)
        tell_not_whole(reports, newest)
        if newest is None:
            return None
        lacking = [
            set(report["needed"]) - set(report["held"].get(newest, ())) for report in reports
        ]
        copy = held.get(newest, Copy({}))
        record = next(record for record in hosts.gather("the local copy", copy.record) if record)
        step, path = step_number(newest), self.copies.folder / newest
        log.info(
            "step %d is taken from the hosts' own disks (%s); %d of %d processes had all of their "
            "parts", step, path, sum(not part for part in lacking), len(lacking),
        )  # fmt: skip
        return LocalStep(step, path, copy, record, any(lacking))

    def _unfit(
        self, name: str, record: Json, logged: int, abstract: Callable[[bool], Any]
    ) -> str | None:
        """Why the run cannot go on from a copy; None if it can."""
        start = name.partition(".")[2]
        if record["format"] != FORMAT:
            return f"it has format {record['format']}, and this version reads {FORMAT}"
        if not {name, start} & set(self._history):
            # Other hosts, perhaps with other settings, have taken other steps since, and the
            # metrics are theirs.
            return "it belongs to another history of the run"
        if step_number(name) > logged:
            # The directory of the run was lost, or came from a store that did not have them yet.
            return f"the metrics of the run end at step {logged}"
        if record["mesh"] != dict(self._mesh.shape):
            return f"it has the mesh {record['mesh']}, and the run {dict(self._mesh.shape)}"
        had, needed = record["layout"], _layout(_by_name(abstract(record["base"] is not None)))
        for leaf in sorted(had.keys() | needed.keys()):
            if had.get(leaf) != needed.get(leaf):
                return f"of {leaf} it has {had.get(leaf)}, and the run needs {needed.get(leaf)}"
        return None

    def begin(self, directory: Path, name: str, retry_seconds: int = 0) -> None:
        """Makes the steps of this start the history of the run, and removes other copies.

        All processes call it when the run is certain to start. None removes a copy before the
        history is written.

        Args:
          directory: of the run.
          name: of the step from which it starts, a copy or not.
          retry_seconds: for how long a write is tried again when the store fails.

        Raises:
          UserError: the history cannot be written.
        """
        words = [self._run_id, self._start, *([name] if name else [])]
        hosts.from_main(
            "the history of the run", lambda: write_history(directory, words, retry_seconds)
        )
        self.copies.keep_only(name)

    def restore(self, found: LocalStep, abstract: Any) -> Any:
        """The state of a step, with the dtypes and shardings of the tree `abstract`.

        All processes call it.

        Raises:
          UserError: the copy cannot be read any more.
        """
        with _reading(found):
            files = {part: np.load(path) for part, path in found.copy.parts.items()}
        restored = [
            self._restore_leaf(found, files, name, leaf)
            for name, leaf in _by_name(abstract).items()
        ]
        for file in files.values():
            file.close()
        return jax.tree.unflatten(jax.tree.structure(abstract), restored)

    def _restore_leaf(
        self, found: LocalStep, files: Mapping[int, Mapping[str, np.ndarray]], name: str, leaf: Any
    ) -> jax.Array:
        shape = leaf.sharding.shard_shape(leaf.shape)
        dtype = jnp.dtype(found.record["dtypes"][name])
        # Two devices may hold the same part: it is read once.
        with _reading(found):
            read = {part: files[part][name] for part in set(self._parts.values()) & files.keys()}
        shards = {device: read[part] for device, part in self._parts.items() if part in read}
        if found.lacking:
            size = math.prod(shape) * dtype.itemsize
            shards = from_replicas(shards, list(self._parts), size, self._mesh)
        arrays = [
            jax.device_put(shard.view(dtype).reshape(shape).astype(leaf.dtype, copy=False), device)
            for device, shard in shards.items()
        ]
        return jax.make_array_from_single_device_arrays(leaf.shape, leaf.sharding, arrays)

    def _copy_parts(self, leaves: Mapping[str, jax.Array]) -> dict[int, Part]:
        """The bytes of the parts of this process, copied: a step donates what it is given."""
        devices = {part: device for device, part in self._parts.items()}
        parts: dict[int, Part] = {part: {} for part in devices}
        shards = {
            name: {shard.device: shard.data for shard in leaf.addressable_shards}
            for name, leaf in leaves.items()
        }
        for of_leaf in shards.values():
            for device in devices.values():
                of_leaf[device].copy_to_host_async()
        for name, of_leaf in shards.items():
            for part, device in devices.items():
                parts[part][name] = np.array(of_leaf[device]).reshape(-1).view(np.uint8)
        return parts

    def _write(self, step: int, record: Json, parts: Mapping[int, Part]) -> None:
        """Writes a save, in the thread."""
        try:
            self.copies.write(f"{step}.{self._start}", hosts.process_index(), record, parts)
            self._failed = False
        except (OSError, UserError) as error:
            if not self._failed:  # told once
                log.warning(
                    f"cannot write the local copy of step {step} in {self.copies.folder} on "
                    f"{platform.node()}: {reason(error, self.copies.folder)}; the run goes on",
                    extra={EVERY_HOST: True},
                )
            self._failed = True


@contextmanager
def _reading(found: LocalStep) -> Iterator[None]:
    """Makes one line of an error: the copy was sound when all agreed on it."""
    try:
        yield
    except (OSError, BadZipFile) as error:
        raise UserError(
            f"the local copy {found.path} on {platform.node()} cannot be read any more: "
            f"{reason(error)}; give the same command again, which goes on from what is there then"
        ) from None


def _by_name(tree: Any) -> dict[str, Any]:
    """The leaves of a tree by their paths."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path): leaf for path, leaf in leaves}


def _layout(leaves: Mapping[str, Any]) -> dict[str, str]:
    """The shape of each leaf, and the axes of the mesh over which it is split."""
    return {name: f"{leaf.shape} over {tuple(leaf.sharding.spec)}" for name, leaf in leaves.items()}
