"""Keeps what the compiler said, so that a plan made again needs no compilation.

jax's own compilation cache does not serve here: it stores a program that was compiled for a
described topology, but cannot load it without the devices (seen with jax 0.10.2).
"""

import dataclasses
import json
import os
from importlib import metadata
from pathlib import Path

from moi_jax.accounting.compilation import Compiled
from moi_jax.accounting.topology import Topology
from moi_jax.common.atomic_files import atomic_write_text, check_writable
from moi_jax.common.fingerprint import json_fingerprint
from moi_jax.common.home import expand_home
from moi_jax.common.versions import code_versions
from moi_jax.config import Config
from moi_jax.models.config import ModelConfig
from moi_jax.training.versions import FLAGS

FOLDER = "plans"  # in data.cache_dir
# The sections of the config on which the compiled step depends, and what is without effect on it.
SECTIONS = {"model", "lora", "optimizer", "mesh", "train", "loss"}
NO_EFFECT = {
    "model": {"init_from"},
    "train": {
        "seed", "compilation_cache", "sample_prompts", "sample_every", "sample_max_new_tokens",
    },
}  # fmt: skip


def kept_path(config: Config, model: ModelConfig, topology: Topology, step: str) -> Path:
    """Returns the file of a compilation; its name tells all on which the result depends."""
    key = json_fingerprint(
        {
            "config": config.model_dump(mode="json", include=SECTIONS, exclude=NO_EFFECT),
            "sequence_length": config.data.sequence_length,
            "domains": len(config.data.domains),
            "model": model.to_json(),
            "topology": [topology.name, topology.slices],
            "step": step,
            "versions": code_versions() | {"libtpu": _libtpu()},
            "flags": {name: os.environ.get(name, "") for name in FLAGS},
        }
    )
    return expand_home(config.data.cache_dir) / FOLDER / f"{key}.json"


def read_kept(path: Path) -> Compiled | None:
    """Returns the compilation that is kept in a file; None if there is none."""
    if not path.is_file():
        return None
    values = json.loads(path.read_text(encoding="utf-8"))
    values["buffers"] = [(name, size) for name, size in values["buffers"]]
    return Compiled(**values)


def keep(path: Path, compiled: Compiled) -> None:
    """Writes a compilation to its file."""
    check_writable(path.parent)
    atomic_write_text(path, json.dumps(dataclasses.asdict(compiled), indent=1))


def _libtpu() -> str | None:
    try:
        return metadata.version("libtpu")
    except metadata.PackageNotFoundError:  # such as a nightly build, under another name
        return None
