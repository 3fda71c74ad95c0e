"""moi_jax: multi-task supervised fine-tuning in JAX with Mixture-of-Instructions.

`moi_jax.load(path)` gives a model and its tokenizer, `moi_jax.batches(config)` the packed
batches of a run. Both resolve on first use: importing this package imports no jax.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moi_jax.checkpoints.opener import load as load
    from moi_jax.training.batches import batches as batches

__all__ = ["batches", "load"]


def __getattr__(name: str) -> Any:
    if name == "load":
        from moi_jax.checkpoints.opener import load

        return load
    if name == "batches":
        from moi_jax.training.batches import batches

        return batches
    raise AttributeError(f"module 'moi_jax' has no attribute {name!r}")
