"""The compute settings of a model: they change speed and rounding, never the architecture."""

import dataclasses

import jax
from jax.sharding import Mesh

from moi_jax import config as config_lib
from moi_jax.models.attention import AttentionFn, choose_attention
from moi_jax.models.attention.xla import xla_attention
from moi_jax.models.config import ModelConfig
from moi_jax.models.remat import RematPolicy, remat_policy


@dataclasses.dataclass(frozen=True)
class Compute:
    """Settings of one model on one platform.

    Attributes:
      dtype: the dtype of the activations and of the matrix products.
      remat: what the backward pass recomputes; None keeps everything.
      attention: the backend, see `models.attention.choose_attention`.
    """

    dtype: jax.typing.DTypeLike = "float32"
    remat: RematPolicy | None = None
    attention: AttentionFn = xla_attention


def make_compute(
    settings: config_lib.Model, model: ModelConfig, device: jax.Device, mesh: Mesh
) -> Compute:
    """Makes the settings of training a model on a mesh, from the section `model` of a config.

    Args:
      device: one of the mesh's, which decides what `auto` is.

    Raises:
      UserError: the attention that the config names cannot compute this model here.
    """
    dtype = resolve_dtype(settings.compute_dtype, device.platform)
    attention = choose_attention(settings, model, device, mesh, dtype)
    return Compute(dtype, remat_policy(settings.remat, settings.remat_tensors), attention)


def resolve_dtypes(config: config_lib.Config, platform: str) -> config_lib.Config:
    """Returns the config with the dtypes that `auto` is on a platform: cpu, gpu or tpu."""
    dtype = resolve_dtype(config.model.compute_dtype, platform)
    changes: dict[str, config_lib.Section] = {}
    changes["model"] = config.model.model_copy(update={"compute_dtype": dtype})
    if config.lora.rank and config.lora.base_dtype == "auto":
        changes["lora"] = config.lora.model_copy(update={"base_dtype": dtype})
    return config.model_copy(update=changes)


def resolve_dtype(name: str, platform: str) -> str:
    """Resolves the dtype `auto` for a platform: float32 on a CPU, bfloat16 elsewhere."""
    if name != "auto":
        return name
    return "float32" if platform == "cpu" else "bfloat16"
