"""Importing a PEFT adapter as a checkpoint of ours, beside its base."""

import json
import logging
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax.checkpoints.hf.model_card import model_card
from moi_jax.checkpoints.hf.peft_modules import (
    CONFIG,
    Part,
    PublishedModule,
    published_modules,
)
from moi_jax.checkpoints.hf.reader import check_names
from moi_jax.checkpoints.hf.safetensors_reader import TensorFiles, read_bytes
from moi_jax.checkpoints.hf.source import find_source
from moi_jax.checkpoints.items import Base, find_step, read_items
from moi_jax.checkpoints.merged import stored_fingerprint
from moi_jax.checkpoints.parameters import save_model, stored_parameters
from moi_jax.common.atomic_files import atomic_directory, check_new, write_texts
from moi_jax.common.errors import UserError
from moi_jax.models.adapter import Adapter
from moi_jax.models.config import ModelConfig
from moi_jax.models.lora import check_rank

# Keys of adapter_config.json with the values that change nothing; a missing key changes nothing.
PLAIN: dict[str, tuple[Any, ...]] = {
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "modules_to_save": (None, []),
    "rank_pattern": (None, {}),
    "alpha_pattern": (None, {}),
    "layers_to_transform": (None, []),
    "layer_replication": (None, []),
    "lora_bias": (False,),
    "trainable_token_indices": (None, [], {}),
    "target_parameters": (None, []),
    "alora_invocation_tokens": (None, []),
}
# Other methods that PEFT keeps in the same file: use_dora, use_qalora, arrow_config, ...
METHOD = re.compile(r"use_(?!rslora)\w+|(arrow|kasa|monteclora|velora)_config")
# Ways to begin that change the base: its published weights are then not those of training.
CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")

log = logging.getLogger(__name__)


def is_adapter(source: Path) -> bool:
    """Whether a local directory, or a repository of the hub, holds a PEFT adapter."""
    return (find_source(source).path / CONFIG).is_file()


def import_adapter(source: Path, base: Path, out: Path) -> None:
    """Writes the PEFT adapter `source` as a checkpoint of ours at `out`, which names its base.

    Args:
      source: a directory with adapter_config.json and safetensors, or the id of a repository.
      base: a checkpoint of ours with the base.

    Raises:
      UserError: the adapter has a feature that is not built (the message names it) or does not fit
        the base, a file is missing or damaged, or `out` exists or cannot be written.
    """
    check_new(out)
    found = find_source(source)
    found.fetch_weights()
    path = found.path / CONFIG
    values = _read_config(path)
    step = find_step(base)
    items = read_items(step)
    if items.model.adapter:
        raise UserError(f"{base} has adapters itself; give the model beside which they go")
    files = TensorFiles(found.path)
    modules = _found(items.model, files, values["r"], found.path)
    targets = sorted(part.path for module in modules for part in module.parts)
    adapter = Adapter(
        rank=check_rank(items.model, targets, values["r"], f"{path}: r"),
        alpha=float(values["lora_alpha"]),
        scaling="rslora" if values.get("use_rslora") else "standard",
        targets=tuple(targets),
    )
    stored = stored_parameters(step, items.model)
    beside = Base(str(base), str(step.absolute()), stored_fingerprint(stored, items.model))
    adapted = replace(items, model=items.model.with_adapter(adapter), base=beside)
    with atomic_directory(out) as staging:
        stream = _parameters(adapted.model, adapter, modules, files)
        save_model(staging, stream, np.dtype(np.float32), adapted)
        (staging / "README.md").write_text(model_card(adapted), encoding="utf-8")
        write_texts(staging, items.provenance.get("files", {}))
    log.info(f"wrote {out}: adapters of rank {adapter.rank} on {', '.join(targets)}")


def _read_config(path: Path) -> dict[str, Any]:
    """The values of adapter_config.json; raises UserError where they are not those of a LoRA."""
    try:
        values = json.loads(read_bytes(path))
    except ValueError as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or values.get("peft_type") != "LORA":
        raise UserError(f"{path} is of no LoRA adapter (peft_type); other kinds are not built")
    for key, plain in PLAIN.items():
        if key in values and values[key] not in plain:
            raise UserError(_unsupported(path, key, values[key]))
    for key, value in values.items():
        if METHOD.fullmatch(key) and value:
            raise UserError(_unsupported(path, key, value))
    begun = values.get("init_lora_weights")
    if isinstance(begun, str) and begun.startswith(CHANGES_BASE):
        raise UserError(_unsupported(path, "init_lora_weights", begun))
    for key in ("r", "lora_alpha"):
        number: Any = values.get(key)
        whole = isinstance(number, int if key == "r" else int | float)
        if not whole or isinstance(number, bool) or not number > 0:
            raise UserError(f"{path}: {key} is {number!r}, not a number above zero")
    return values


def _unsupported(path: Path, key: str, value: Any) -> str:
    return (
        f"{path}: {key} {value!r} is not supported; merge the adapter with peft "
        f"(merge_and_unload) and import the merged weights"
    )


def _found(
    model: ModelConfig, files: TensorFiles, rank: int, source: Path
) -> list[PublishedModule]:
    """The modules whose adapters the files hold, each in all layers and nothing else."""
    layers = range(model.num_layers)
    modules = [
        module
        for module in published_modules(model)
        if any(module.tensor(layer, "A") in files.headers for layer in layers)
    ]
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules:
        for layer in layers:
            a, b = (module.tensor(layer, which) for which in "AB")
            shapes |= {a: (rank, module.inputs), b: (module.outputs, rank)}
    check_names(source, files.headers, shapes)
    for name, shape in shapes.items():
        if files.headers[name].shape != shape:
            raise UserError(
                f"{files.headers[name].path}: {name} has shape {files.headers[name].shape}; rank "
                f"and base ask for {shape}: is it the adapter of another model?"
            )
    return modules


def _parameters(
    model: ModelConfig, adapter: Adapter, modules: list[PublishedModule], files: TensorFiles
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields our parameters: every part of a fused module has its A, and its own rows of B."""

    def stacked(module: PublishedModule, which: str) -> list[np.ndarray]:
        names = [module.tensor(layer, which) for layer in range(model.num_layers)]
        return [files.read(name).astype(np.float32) for name in names]

    for module in modules:
        a, b = (stacked(module, which) for which in "AB")
        for part in module.parts:
            yield f"{part.path}.lora_a", _a(a, part, adapter.rank)
            yield f"{part.path}.lora_b", _b(b, part, adapter.rank)


def _a(layers: list[np.ndarray], part: Part, rank: int) -> np.ndarray:
    """[r, inputs] of each layer -> [L, inputs, r]."""
    return np.stack([a.T.reshape(*part.inputs, rank) for a in layers])


def _b(layers: list[np.ndarray], part: Part, rank: int) -> np.ndarray:
    """[outputs, r] of each layer -> [L, r, outputs]."""
    return np.stack([b[part.rows].T.reshape(rank, *part.outputs) for b in layers])
