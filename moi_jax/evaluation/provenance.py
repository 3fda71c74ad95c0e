"""What made the figures of a task: code, machine, weights, data and command, for results.json."""

import hashlib
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
from moi_jax.checkpoints.parameters import stored_parameters
from moi_jax.common.checksums import digests
from moi_jax.common.versions import code_commit, code_versions
from moi_jax.parallel import hosts

Json = dict[str, Any]


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


def open_session(checkpoint: OpenCheckpoint, command: str | None) -> Session:
    """Finds out what the results of this process will depend on. All processes call it.

    Args:
      command: the line that began the evaluation; None where a program did.
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
            "the digest of the parameters", lambda: parameters_digest(checkpoint.step, items)
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
    safetensors, too.
    """
    stored = stored_parameters(step, items.model, verify=False)
    lines = [
        f"{hashlib.sha256(tensor.reshape(-1).view(np.uint8).data).hexdigest()}  {name}\n"
        for name, tensor in export_tensors(items.model, stored.get)
    ]
    return hashlib.sha256("".join(sorted(lines, key=lambda line: line[66:])).encode()).hexdigest()


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
