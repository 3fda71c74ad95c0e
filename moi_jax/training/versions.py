"""What a run is computed with: versions, devices and flags. A checkpoint records them."""

import os
import platform
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moi_jax.common.versions import code_versions

# The variables that carry flags of XLA, see moi_jax/parallel/xla_flags.py.
FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "JAX_OPTIMIZATION_LEVEL")

CPU_INFO = Path("/proc/cpuinfo")  # Linux only

Versions = dict[str, Any]


def versions(mesh: Mesh) -> Versions:
    """The versions, devices and flags of this process and its mesh.

    With the same ones the same steps give the same bits.
    """
    device = mesh.devices.flat[0]
    return {
        **code_versions(),
        "device": _cpu() if device.platform == "cpu" else device.device_kind,
        "mesh": dict(mesh.shape),
        "processes": jax.process_count(),
        "matmul_precision": jax.config.jax_default_matmul_precision,  # type: ignore[attr-defined]
        **{name: os.environ.get(name, "") for name in FLAGS},
    }


def differences(recorded: Versions, now: Versions) -> list[str]:
    """What differs, as "jax 0.10.2 -> 0.11.0" each."""
    return [
        f"{name} {recorded.get(name)} -> {now.get(name)}"
        for name in dict.fromkeys((*recorded, *now))
        if recorded.get(name) != now.get(name)
    ]


def _cpu() -> str:
    """The model and the number of cores: both decide what code XLA compiles."""
    lines = CPU_INFO.read_text(encoding="utf-8").splitlines() if CPU_INFO.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    model = names[0] if names else platform.machine()
    return f"{model}, {os.cpu_count()} cores"
