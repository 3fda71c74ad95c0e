"""The items of a checkpoint: finding a step and reading all but its parameters.

A checkpoint is one orbax step that holds all a model needs. Its items are `parameters`, `model`
(architecture), `tokenizer` (its files), `prompts` (default and domain prompts, chat template) and
`provenance` (of the published weights it began from). A training step also has `optimizer`,
`position` (where the run stands in its data) and `config`. Its checksums are written last.
"""

import dataclasses
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import orbax.checkpoint as ocp
from etils import epath

from moi_jax.checkpoints.checksums import verify_small_items
from moi_jax.checkpoints.damage import DamagedCheckpoint, reading
from moi_jax.checkpoints.fetched import fetch_step
from moi_jax.common.checksums import SUMS
from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.common.locations import is_url
from moi_jax.models.config import ModelConfig

# orbax logs several lines at every save, which would bury the run's own, and a traceback in each
# thread of a save that fails. The error itself is raised.
logging.getLogger("absl").setLevel(logging.CRITICAL)

Json = dict[str, Any]

# Goes up when what is on disk changes: 1 had a flat table of parameters, 2 has the names of the
# modules, 3 has checksums.
FORMAT = 3
READABLE = (2, 3)


@dataclasses.dataclass(frozen=True)
class ModelItems:
    """What makes parameters usable: architecture, tokenizer files, prompts and template.

    Attributes:
      tokenizer: file name -> text.
      prompts: see `moi_jax.text.prompts`.
      provenance: see `hf/provenance.py`; empty if the parameters began at random.
    """

    model: ModelConfig
    tokenizer: dict[str, str]
    prompts: Json
    provenance: Json = dataclasses.field(default_factory=dict)

    def to_args(self) -> dict[str, ocp.args.JsonSave]:
        return {
            "model": ocp.args.JsonSave({"format": FORMAT, **self.model.to_json()}),
            "tokenizer": ocp.args.JsonSave({"files": self.tokenizer}),
            "prompts": ocp.args.JsonSave(self.prompts),
            "provenance": ocp.args.JsonSave(self.provenance),
        }


def find_step(path: Path) -> Path:
    """The directory of one step: `path` itself, or the newest step of a run.

    Of a step in an object store, it is a local copy.

    Raises:
      UserError: there is no checkpoint.
    """
    if is_url(path):
        return fetch_step(path)
    path = expand_home(path)
    if (path / "parameters").is_dir():
        return path
    for folder in (path, path / "checkpoints"):
        if step := newest_step(folder):
            return step
    if (path / "config.json").is_file():
        raise UserError(
            f"{path} is no checkpoint of moi_jax but published weights; make one of them with "
            f"python -m moi_jax.convert import {path} --out CKPT"
        )
    raise UserError(
        f"{path} is no checkpoint (no 'parameters' inside); give one that was written by training "
        f"or by python -m moi_jax.convert import"
    )


def newest_step(folder: Path) -> Path | None:
    """The newest step among the checkpoints in a folder, sound or not; None if there is none."""
    steps = all_steps(folder)
    return steps[0] if steps else None


def all_steps(folder: Path) -> list[Path]:
    """The steps among the checkpoints in a folder, the newest first.

    A save that was cut off has another name, so it is not among them.
    """
    steps = [path for path in folder.glob("*") if path.name.isdigit() and path.is_dir()]
    return sorted(steps, key=lambda path: int(path.name), reverse=True)


def read_items(path: Path) -> ModelItems:
    """Architecture, tokenizer files, prompts and provenance of a checkpoint.

    All of its files but those of the arrays are verified.

    Args:
      path: a step, or a run (its newest step).

    Raises:
      UserError: there is no checkpoint, it is damaged, or written in another format.
    """
    names = ["model", "tokenizer", "prompts"]
    step = find_step(path)
    verified = verify_small_items(step)
    if (step / "provenance").is_dir():
        names.append("provenance")
    items = {name: read_json_item(step, name) for name in names}
    with reading(step, "model"):
        if (written := items["model"].pop("format", 1)) not in READABLE:
            raise UserError(
                f"{step} is of format {written}, this version reads formats {READABLE[0]} and "
                f"{READABLE[1]}; import the published weights again, or export {step.name} with "
                f"the version of moi_jax that wrote it and import that"
            )
        if written == FORMAT and not verified:
            raise DamagedCheckpoint(step, f"{SUMS} is missing")
        model = ModelConfig.from_json(items["model"])
    with reading(step, "tokenizer"):
        files = items["tokenizer"]["files"]
    return ModelItems(model, files, items["prompts"], items.get("provenance", {}))


def read_json_item(step: Path, name: str) -> Json:
    """One JSON item of a step; raises UserError when it is missing or damaged."""
    with reading(step, name):
        # The handler is used directly: a checkpointer would wait for the other processes of a run.
        return dict(ocp.JsonCheckpointHandler().restore(epath.Path(step.absolute() / name)))


def parameters_fingerprint(step: Path) -> str:
    """Identifies a step's parameters by the names (which are random) and sizes of their files."""
    folder = step / "parameters"
    files = sorted(
        (str(file.relative_to(folder)), file.stat().st_size)
        for file in folder.rglob("*")
        if file.is_file()
    )
    return hashlib.sha256(json.dumps(files).encode()).hexdigest()[:16]
