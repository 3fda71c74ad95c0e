"""What made the figures of a task: code, machine, weights, data and command, for results.json."""

import hashlib
import logging
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from time import monotonic
from typing import Any

import numpy as np

from moi_jax.checkpoints.hf.weights import export_tensors
from moi_jax.checkpoints.items import ModelItems, read_items
from moi_jax.checkpoints.opener import OpenCheckpoint
from moi_jax.checkpoints.parameter_files import StoredParameters
from moi_jax.checkpoints.parameters import stored_parameters
from moi_jax.common.checksums import digests
from moi_jax.common.progress import byte_bar
from moi_jax.common.versions import code_commit, code_versions
from moi_jax.models.parameters import parameter_specs
from moi_jax.parallel import hosts

Json = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Session:
    """What all tasks of one command share.

    Attributes:
      facts: command, versions, commit, device, weights (base and values), see `open_session`.
    """

    facts: Json

    def of_task(self, folder: Path, begun: float, tokens: Json) -> Json:
        """The provenance of a task that has just ended.

        Args:
          folder: of the benchmark's files.
          begun: when the task began, by time.monotonic.
          tokens: of `count_tokens`.
        """
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "seconds": round(monotonic() - begun, 3),
            **tokens,
            "data": data_digests(folder),
            **self.facts,
        }


def open_session(checkpoint: OpenCheckpoint, command: str | None, verify: bool = True) -> Session:
    """Finds out what the results of this process will depend on. All processes call it.

    Args:
      command: the line that began the evaluation; None where a program did.
      verify: find the digest of the parameters, which reads them once more.
    """
    devices = checkpoint.mesh.devices.flat
    items = read_items(checkpoint.step)
    facts = {
        "command": command,
        "versions": code_versions(),
        "commit": code_commit(),
        "device": f"{checkpoint.mesh.size} x {devices[0].device_kind} ({devices[0].platform})",
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} processors",
        "base": _base(items),
        "values": hosts.from_main(
            "the digest of the parameters",
            lambda: parameters_digest(checkpoint.step, items) if verify else None,
        ),
    }
    return Session(facts)


def _base(items: ModelItems) -> str | None:
    """The published weights that the checkpoint began from; None where it began at random."""
    base, commit = (items.provenance.get(key) for key in ("base", "commit"))
    return f"{base}@{commit}" if commit else base


def parameters_digest(step: Path, items: ModelItems) -> str:
    """Identifies the values of a checkpoint, whatever its files are called.

    It is the sha256 of a list "DIGEST  NAME" of all tensors in the published layout, sorted by
    name, each with the sha256 of its bytes in the stored dtype. So it can be found from exported
    safetensors, too. Adapters are in the list under their own names; where they alone are in the
    checkpoint, the fingerprint of their base stands for its tensors, under the name "base".
    """
    stored = stored_parameters(step, items.model, verify=False)
    lines = [f"{items.base.fingerprint}  base\n"] if items.base else []
    total = sum(array.size * array.dtype.numpy_dtype.itemsize for array in stored.arrays.values())
    log.info(f"hashing the parameters, {total / 1e9:.2f} GB (--no-verify leaves it out)")
    with byte_bar("hashing the parameters", total) as progress:
        for name, tensor in _stored_tensors(stored, items):
            digest = hashlib.sha256(tensor.reshape(-1).view(np.uint8).data).hexdigest()
            lines.append(f"{digest}  {name}\n")
            progress(tensor.nbytes)
    by_name = sorted(lines, key=lambda line: line.split("  ", 1)[1])
    return hashlib.sha256("".join(by_name).encode()).hexdigest()


def _stored_tensors(
    stored: StoredParameters, items: ModelItems
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors that a step holds: in the published layout, but adapters as they are stored."""
    if items.base is None:
        yield from export_tensors(items.model.base, stored.get)
    for path, spec in parameter_specs(items.model).items():
        if spec.adapter:
            yield path, stored.get(path)


def data_digests(folder: Path) -> dict[str, str]:
    """The sha256 of each file in a folder of benchmark files.

    A folder in it has one entry: the sha256 of what `find NAME -type f | LC_ALL=C sort | xargs
    sha256sum` prints beside it.
    """
    return dict(_data_digests(folder)) if folder.is_dir() else {}


def _data_digests(folder: Path) -> Iterator[tuple[str, str]]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            names = sorted(f"{p.relative_to(folder).as_posix()}" for p in path.rglob("*")
                           if p.is_file())  # fmt: skip
            lines = "".join(f"{digest}  {name}\n" for name, digest in digests(folder, names))
            yield f"{path.name}/ ({len(names)} files)", hashlib.sha256(lines.encode()).hexdigest()
        else:
            ((name, digest),) = digests(folder, [path.name])
            yield name, digest
