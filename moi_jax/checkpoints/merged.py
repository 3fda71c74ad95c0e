"""The parameters of a checkpoint with its adapters merged into them, read one at a time."""

from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from moi_jax.checkpoints.base import bits_sum, check_base, find_base
from moi_jax.checkpoints.items import ModelItems
from moi_jax.checkpoints.parameter_files import StoredParameters
from moi_jax.checkpoints.parameters import stored_parameters
from moi_jax.common.fingerprint import json_fingerprint
from moi_jax.models.config import ModelConfig
from moi_jax.models.parameters import parameter_specs
from moi_jax.models.quantized_base import quantized_once


class Parameters(Protocol):
    """Parameters of a model, read when they are needed."""

    @property
    def dtype(self) -> np.dtype:
        """The common dtype of all parameters."""

    def get(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter by its dotted path, or one layer of a stacked one."""


class MergedParameters:
    """The parameters of a model without adapters, W + scale A B in the place of an adapted W."""

    def __init__(self, config: ModelConfig, adapters: StoredParameters, base: StoredParameters):
        """
        Args:
          adapters, base: the same where a checkpoint holds both.
        """
        assert config.adapter is not None
        self._adapter, self._adapters, self._base = config.adapter, adapters, base
        self._specs = parameter_specs(config.base)

    @property
    def dtype(self) -> np.dtype:
        return np.result_type(*(self._base.dtype_of(path) for path in self._specs))

    def get(self, path: str, layer: int | None = None) -> np.ndarray:
        """A parameter, or one layer of a stacked one; merged ones are float32 or wider."""
        value = self._trained_beside(path, layer)
        module, _, name = path.rpartition(".")
        if name != "kernel" or module not in self._adapter.targets:
            return value
        a, b = (self._adapters.get(f"{module}.{part}", layer) for part in ("lora_a", "lora_b"))
        rank, leading = self._adapter.rank, () if layer is not None else value.shape[:1]
        product = a.reshape(*leading, -1, rank) @ b.reshape(*leading, rank, -1)
        wide = np.result_type(value.dtype, np.float32)
        return value.astype(wide) + self._adapter.scale * product.reshape(value.shape)

    def _trained_beside(self, path: str, layer: int | None) -> np.ndarray:
        """A parameter of the base as training had it: quantised and back, where it was so."""
        value, spec = self._base.get(path, layer), self._specs[path]
        scheme = self._adapter.quantization
        if scheme is None or not (path.startswith("layers.") and spec.contracted):
            return value
        layers = value if layer is None else value[None]
        flat = layers.reshape(len(layers), -1, *layers.shape[1 + spec.contracted :])
        return np.stack([quantized_once(scheme, matrix) for matrix in flat]).reshape(value.shape)


def merged_parameters(
    step: Path, items: ModelItems, verify: bool = True, base: Path | None = None
) -> Parameters:
    """The parameters of a step as those of a model without adapters.

    Args:
      verify: compare the files with their checksums first.
      base: a checkpoint with the base of adapters; None for where it was in training.

    Raises:
      UserError: files are missing or damaged, the stored shapes are not those of the model, or the
        base is missing or another one.
    """
    stored = stored_parameters(step, items.model, verify)
    if items.model.adapter is None:
        return stored
    if items.base is None:
        return MergedParameters(items.model, stored, stored)
    place = find_base(step, items.base, base)
    beside = stored_parameters(place, items.model.base, verify)
    check_base(step, items.base, place, stored_fingerprint(beside, items.model.base))
    return MergedParameters(items.model, stored, beside)


def stored_fingerprint(stored: Parameters, config: ModelConfig) -> str:
    """The fingerprint of parameters on disk, with one of them in memory at a time."""
    summed = jax.jit(bits_sum)
    return json_fingerprint(
        {path: int(summed(stored.get(path))) for path in parameter_specs(config)}
    )
