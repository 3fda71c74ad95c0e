"""What `auto` is on a chip, and which attention a chip has, without the chip."""

import dataclasses
from typing import Any, cast

import jax
from jax.sharding import Mesh

from moi_jax.common.errors import UserError
from moi_jax.config import Config
from moi_jax.models.attention import AUTOMATIC
from moi_jax.models.attention.refusals import refusal
from moi_jax.models.compute import resolve_dtypes
from moi_jax.models.config import ModelConfig
from moi_jax.parallel.chips import Chip

# developer.nvidia.com/cuda-gpus
CAPABILITY = {"a100": "8.0", "h100": "9.0", "h200": "9.0", "b200": "10.0"}


@dataclasses.dataclass(frozen=True)
class _Described:
    """What a backend asks of a device."""

    platform: str
    compute_capability: str | None


def on_chip(config: Config, model: ModelConfig, chip: Chip, mesh: Mesh) -> Config:
    """Returns the config with the dtype and the attention that training takes on the chip.

    Raises:
      UserError: the attention that the config names cannot compute this model there.
    """
    config = resolve_dtypes(config, chip.platform)
    named = config.model.attention
    name = AUTOMATIC[chip.platform] if named == "auto" else named
    device = cast(jax.Device, _Described(chip.platform, CAPABILITY.get(chip.name)))
    reason = refusal(name, model, device, mesh, config.model.compute_dtype, packages=False)
    if reason is None:
        return _changed(config, attention=name)
    if named == "auto":
        return _changed(config, attention="blockwise")
    raise UserError(f"model.attention {name} on {chip.name}: {reason}; use auto or blockwise")


def _changed(config: Config, **settings: Any) -> Config:
    return config.model_copy(update={"model": config.model.model_copy(update=settings)})
