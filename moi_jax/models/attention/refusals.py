"""What each attention backend cannot compute, said before anything is compiled."""

import importlib.metadata
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moi_jax.models.config import ModelConfig
from moi_jax.parallel.context import context_shards

# The version with the kernels that mosaic_gpu calls; setup.cfg pins the same ones.
TOKAMAX = "0.0.12" if sys.version_info < (3, 12) else "0.0.17"


def refusal(
    name: str,
    model: ModelConfig,
    device: jax.Device,
    mesh: Mesh | None,
    dtype: jax.typing.DTypeLike,
    packages: bool = True,
) -> str | None:
    """Returns why a backend cannot compute a model's attention, or None if it can.

    Args:
      name: xla or blockwise, which can compute everything, splash or mosaic_gpu.
      device: one of the devices of the mesh.
      dtype: of the activations.
      packages: whether the packages that the backend needs must be installed here. A plan for
        another machine does not ask for them.
    """
    if name in ("xla", "blockwise"):
        return None
    reasons = {"splash": _splash, "mosaic_gpu": _mosaic_gpu}[name]
    reason = next(reasons(model, device, mesh, jnp.dtype(dtype).name), None)
    if reason or not packages or name != "mosaic_gpu" or installed_tokamax() == TOKAMAX:
        return reason
    return (
        f"it calls kernels of tokamax {TOKAMAX}, and {installed_tokamax() or 'none'} is installed "
        f"(pip install 'moi_jax[mosaic]')"
    )


def _splash(model: ModelConfig, device: jax.Device, mesh: Mesh | None, dtype: str) -> Iterator[str]:
    del mesh  # it takes each of them
    if device.platform != "tpu":
        yield f"it runs on a TPU, and the device is a {device.platform.upper()}"
    if dtype not in ("bfloat16", "float32"):
        yield f"it computes in bfloat16 or float32, not in {dtype}"
    if model.head_dim > 256:  # the widest heads that were compiled
        yield f"it takes heads of up to 256, and the model's are {model.head_dim} wide"


def _mosaic_gpu(
    model: ModelConfig, device: jax.Device, mesh: Mesh | None, dtype: str
) -> Iterator[str]:
    if device.platform != "gpu":
        yield f"it runs on a GPU, and the device is a {device.platform.upper()}"
    # Blackwell is 10.0. There, tokamax's backward kernel with k_start needs more shared memory than
    # there is for heads of 128, and adds the queries' gradient in no fixed order.
    capability = getattr(device, "compute_capability", "unknown")
    if capability != "9.0":
        yield f"it runs on compute capability 9.0 (H100, H200), and this GPU's is {capability}"
    if dtype != "bfloat16":
        yield f"it computes in bfloat16, not in {dtype}"
    if model.head_dim > 128:  # what the shared memory holds with the tiles that are fixed
        yield f"it takes heads of up to 128, and the model's are {model.head_dim} wide"
    if context_shards(mesh) > 1:
        yield "it needs whole rows, and mesh.context splits them"


def installed_tokamax() -> str | None:
    """Returns the version of tokamax that is installed, or None."""
    try:
        return importlib.metadata.version("tokamax")
    except importlib.metadata.PackageNotFoundError:
        return None
