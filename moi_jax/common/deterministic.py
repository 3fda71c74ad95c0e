"""The flag of XLA for train.deterministic; XLA reads it when jax starts its first device."""

import os

FLAG = "--xla_gpu_deterministic_ops=true"


def ask_for_determinism() -> None:
    """Makes the XLA of this process deterministic on a GPU. jax must have no device yet."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {FLAG}"


def is_deterministic() -> bool:
    """Whether the XLA of this process was asked to be deterministic."""
    return FLAG in os.environ.get("XLA_FLAGS", "")
