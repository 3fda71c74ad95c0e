"""Checkpoints of adapters for the tests, made without training."""

from dataclasses import replace
from pathlib import Path

import numpy as np

from moi_jax import config as config_lib
from moi_jax.checkpoints.items import Base, read_items
from moi_jax.checkpoints.merged import stored_fingerprint
from moi_jax.checkpoints.parameters import save_model, stored_parameters
from moi_jax.models.lora import adapted
from moi_jax.models.parameters import parameter_specs


def save_adapters(base: Path, path: Path, **settings) -> Path:
    """Writes random adapters beside the checkpoint `base`; `settings` are those of `lora`."""
    items = read_items(base)
    model = adapted(items.model, config_lib.LoRA(**{"rank": 4, **settings}))
    fingerprint = stored_fingerprint(stored_parameters(base, items.model), items.model)
    items = replace(items, model=model, base=Base("Tiny", str(base.absolute()), fingerprint))
    rng = np.random.default_rng(1)
    stream = (
        (name, (0.1 * rng.standard_normal(spec.shape)).astype(np.float32))
        for name, spec in parameter_specs(model).items()
        if spec.adapter
    )
    save_model(path, stream, np.dtype(np.float32), items)
    return path
