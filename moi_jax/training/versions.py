"""What a run is computed with: versions, devices and flags. A checkpoint records them."""

import functools
import hashlib
import os
import platform
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

import moi_jax

PACKAGES = ("moi_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")
CPU_INFO = Path("/proc/cpuinfo")  # Linux only

Versions = dict[str, Any]


def versions(mesh: Mesh) -> Versions:
    """The versions, devices and flags of this process and its mesh.

    With the same ones the same steps give the same bits.
    """
    device = mesh.devices.flat[0]
    return {
        **{name: _version(name) for name in PACKAGES},
        "code": code_fingerprint(),
        "python": platform.python_version(),
        "device": _cpu() if device.platform == "cpu" else device.device_kind,
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        "XLA_FLAGS": os.environ.get("XLA_FLAGS", ""),
    }


def differences(recorded: Versions, now: Versions) -> list[str]:
    """What differs, as "jax 0.10.2 -> 0.11.0" each."""
    return [
        f"{name} {recorded.get(name)} -> {now.get(name)}"
        for name in dict.fromkeys((*recorded, *now))
        if recorded.get(name) != now.get(name)
    ]


@functools.cache
def code_fingerprint() -> str:
    """A fingerprint of all Python files of this package."""
    root = Path(moi_jax.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return None


def _cpu() -> str:
    """The model and the number of cores: both decide what code XLA compiles."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.machine()
    return f"{model}, {os.cpu_count()} cores"
