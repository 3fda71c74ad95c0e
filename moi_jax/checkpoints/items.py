"""The items of a checkpoint: finding a step and reading all but its parameters.

A checkpoint is one orbax step that holds all a model needs. Its items are `parameters`, `model`
(architecture), `tokenizer` (its files), `prompts` (default and domain prompts, chat template) and
`provenance` (of the published weights it began from). A training step also has `optimizer`,
`position` (where the run stands in its data) and `config`. Its checksums are written last.
A checkpoint with `base` does not stand alone: its `parameters` are adapters, and the others are
those of the checkpoint that this item names.
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
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import adapters_of

# orbax logs several lines at every save, which would bury the run's own, and a traceback in each
# thread of a save that fails. The error itself is raised.
logging.getLogger("absl").setLevel(logging.CRITICAL)

Json = dict[str, Any]

# Goes up when what is on disk changes: 1 had a flat table of parameters, 2 has the names of the
# modules, 3 has checksums.
# 4 is written for models with adapters alone, which earlier versions do not know.
# 5 is written for adapters beside a quantised base.
FORMAT, ADAPTED, QUANTIZED = 3, 4, 5
READABLE = (2, FORMAT, ADAPTED, QUANTIZED)


@dataclasses.dataclass(frozen=True)
class Base:
    """Which parameters the adapters of a checkpoint were trained beside.

    Attributes:
      name: what model.init_from named.
      path: the checkpoint of moi_jax that was read, absolute.
      fingerprint: of the parameters, see checkpoints/base.py.
    """

    name: str
    path: str
    fingerprint: str


@dataclasses.dataclass(frozen=True)
class ModelItems:
    """What makes parameters usable: architecture, tokenizer files, prompts and template.

    Attributes:
      tokenizer: file name -> text.
      prompts: see `moi_jax.text.prompts`.
      provenance: see `hf/provenance.py`; empty if the parameters began at random.
      base: None if the checkpoint holds all parameters.
    """

    model: ModelConfig
    tokenizer: dict[str, str]
    prompts: Json
    provenance: Json = dataclasses.field(default_factory=dict)
    base: Base | None = None

    def held(self, tree: Tree) -> Tree:
        """The part of a tree of all parameters that the checkpoint holds itself."""
        return tree if self.base is None else adapters_of(self.model, tree)

    def to_args(self) -> dict[str, ocp.args.JsonSave]:
        adapter, written = self.model.adapter, FORMAT
        if adapter:
            written = QUANTIZED if adapter.quantization else ADAPTED
        base = {"base": ocp.args.JsonSave(dataclasses.asdict(self.base))} if self.base else {}
        return {
            **base,
            "model": ocp.args.JsonSave({"format": written, **self.model.to_json()}),
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
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path} is no checkpoint of moi_jax but a PEFT adapter; make one of it with "
            f"python -m moi_jax.convert import {path} --base BASE --out CKPT"
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
    step = find_step(path)
    verified = verify_small_items(step)
    names = ["model", "tokenizer", "prompts"]
    names += [name for name in ("provenance", "base") if (step / name).is_dir()]
    items = {name: read_json_item(step, name) for name in names}
    with reading(step, "model"):
        if (written := items["model"].pop("format", 1)) not in READABLE:
            raise UserError(
                f"{step} is of format {written}, this version reads formats "
                f"{READABLE[0]} to {READABLE[-1]}; import the published weights again, or export "
                f"{step.name} with the version of moi_jax that wrote it and import that"
            )
        if written >= FORMAT and not verified:
            raise DamagedCheckpoint(step, f"{SUMS} is missing")
        model = ModelConfig.from_json(items["model"])
    with reading(step, "tokenizer"):
        files = items["tokenizer"]["files"]
    with reading(step, "base"):
        base = Base(**items["base"]) if "base" in items else None
    return ModelItems(model, files, items["prompts"], items.get("provenance", {}), base)


def read_base(step: Path) -> Base | None:
    """The base of a step; None if it holds all parameters itself."""
    return Base(**read_json_item(step, "base")) if (step / "base").is_dir() else None


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
