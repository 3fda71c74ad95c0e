"""What code runs: a fingerprint of this package, and the versions of what the results depend on."""

import hashlib
import importlib.metadata
import platform
from pathlib import Path

# Packages whose version may change the values or the order of the data.
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def code_fingerprint() -> str:
    """A fingerprint of the source files of moi_jax, 16 hex digits."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\n".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def versions() -> str:
    """The versions of Python and of the packages that the results depend on, in one line."""
    found = [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *found])
