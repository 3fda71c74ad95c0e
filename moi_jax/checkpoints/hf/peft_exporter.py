"""Exporting adapters as a directory that peft loads."""

import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax.checkpoints.hf.companion_files import companion_files
from moi_jax.checkpoints.hf.model_card import model_card
from moi_jax.checkpoints.hf.peft_modules import (
    CONFIG,
    STEM,
    Part,
    PublishedModule,
    published_modules,
)
from moi_jax.checkpoints.hf.safetensors_writer import write_tensors
from moi_jax.checkpoints.items import ModelItems, find_step, read_items
from moi_jax.checkpoints.parameter_files import StoredParameters
from moi_jax.checkpoints.parameters import stored_parameters
from moi_jax.common.atomic_files import atomic_directory, check_new, write_texts
from moi_jax.common.errors import UserError
from moi_jax.common.progress import byte_bar
from moi_jax.models.adapter import Adapter

log = logging.getLogger(__name__)


def export_adapter(checkpoint: Path, out: Path, verify: bool = True) -> None:
    """Writes the adapters of a checkpoint for peft, in float32; their base is not read.

    Where a published module holds several of our matrices, as Qwen v1's c_attn does, its A is
    theirs one after the other and its B has theirs as blocks: its rank is their sum.

    Args:
      checkpoint: a step, or a run (its newest step).

    Raises:
      UserError: `checkpoint` is damaged or has no adapters, or `out` exists or cannot be written.
    """
    check_new(out)
    step = find_step(checkpoint)
    items = read_items(step)
    adapter = items.model.adapter
    if adapter is None:
        raise UserError(
            f"{step} has no adapters for peft (it was trained or imported whole); leave out --peft"
        )
    stored = stored_parameters(step, items.model, verify)
    modules = [
        module
        for module in published_modules(items.model)
        if any(part.path in adapter.targets for part in module.parts)
    ]
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(items.model.num_layers):
        for module in modules:
            rank = adapter.rank * len(_adapted(module, adapter))
            shapes[module.tensor(layer, "A")] = (rank, module.inputs)
            shapes[module.tensor(layer, "B")] = (module.outputs, rank)
    total = 4 * sum(map(math.prod, shapes.values()))
    with atomic_directory(out) as staging, byte_bar("writing", total) as progress:
        staging.mkdir()
        tensors = _tensors(items, adapter, modules, stored)
        write_tensors(staging, shapes, np.float32, tensors, total, progress, STEM)
        (staging / "README.md").write_text(model_card(items, step), encoding="utf-8")
        files = companion_files(items, None, "float32", step)
        del files["config.json"]  # with it the directory would pass for a whole model
        files[CONFIG] = json.dumps(_config(items, adapter, modules), indent=2) + "\n"
        write_texts(staging, files)
    log.info(f"wrote {out}: adapters of rank {adapter.rank}, {total / 1e6:.1f} MB, float32")


def _adapted(module: PublishedModule, adapter: Adapter) -> list[Part]:
    return [part for part in module.parts if part.path in adapter.targets]


def _tensors(
    items: ModelItems, adapter: Adapter, modules: list[PublishedModule], stored: StoredParameters
) -> Iterator[tuple[str, np.ndarray]]:
    """Yields PEFT's tensors by name."""
    rank = adapter.rank
    for layer in range(items.model.num_layers):
        for module in modules:
            parts = _adapted(module, adapter)
            a = [stored.get(f"{p.path}.lora_a", layer).reshape(-1, rank).T for p in parts]
            b = np.zeros((module.outputs, rank * len(parts)), np.float32)
            for n, part in enumerate(parts):
                block = stored.get(f"{part.path}.lora_b", layer).reshape(rank, -1).T
                b[part.rows, n * rank : (n + 1) * rank] = block
            yield module.tensor(layer, "A"), np.concatenate(a)
            yield module.tensor(layer, "B"), b


def _config(items: ModelItems, adapter: Adapter, modules: list[PublishedModule]) -> dict[str, Any]:
    """The values of adapter_config.json."""
    fused = {m.in_layer: n for m in modules if (n := len(_adapted(m, adapter))) > 1}
    rslora, base = adapter.scaling == "rslora", items.base
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": items.provenance.get("base") or (base and base.name),
        "revision": items.provenance.get("commit"),
        "r": adapter.rank,
        "lora_alpha": adapter.alpha,
        "use_rslora": rslora,
        "target_modules": [module.in_layer for module in modules],
        # The rank of a fused module is n times as large, and its scale must stay.
        "rank_pattern": {name: n * adapter.rank for name, n in fused.items()},
        "alpha_pattern": {
            name: adapter.alpha * (math.sqrt(n) if rslora else n) for name, n in fused.items()
        },
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
