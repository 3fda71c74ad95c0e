"""The flags of XLA that make training fast on a TPU or GPU, and how a process gets them.

XLA reads them when its first device starts, and jax reads its variables when it is imported. So
nothing here imports jax. The platform is recognised as jax does it.
"""

import importlib.util
import os
from collections.abc import Mapping
from dataclasses import dataclass
from glob import glob
from typing import Literal

Platform = Literal["tpu", "gpu", "cpu"]

# The variable whose value "off" leaves all flags away, for a version of XLA that has dropped one
# of them: XLA ends a process that gives it a flag that it does not know.
SWITCH = "MOI_JAX_XLA_FLAGS"

MAXTEXT = "MaxText, benchmarks/xla_flags_library.py"
TOOLBOX = "JAX-Toolbox, docs/GPU_performance.md"


@dataclass(frozen=True)
class Flag:
    """One flag.

    Attributes:
      variable: the environment variable that carries it. It may be a variable of jax with this
        one setting; then the name is empty.
      name, value: --name=value.
      why: what it is good for.
      source: where it is recommended.
    """

    variable: str
    name: str
    value: str
    why: str
    source: str

    def __str__(self) -> str:
        return f"--{self.name}={self.value}" if self.name else self.value


def _tpu(name: str, value: str, why: str, source: str = MAXTEXT) -> Flag:
    return Flag("LIBTPU_INIT_ARGS", name, value, why, source)


def _gpu(name: str, value: str, why: str) -> Flag:
    return Flag("XLA_FLAGS", name, value, why, TOOLBOX)


# Not here: xla_tpu_enable_async_collective_fusion. On other chips than a v5e libtpu 0.0.52 refuses
# it, as it may give wrong results there.
TPU_FLAGS = (
    _tpu("xla_tpu_scoped_vmem_limit_kib", "98304", "larger fusions: 96 MiB of VMEM for one"),
    _tpu("xla_tpu_overlap_compute_collective_tc", "true", "collectives run beside matmuls"),
    _tpu("xla_enable_async_all_gather", "true", "an all-gather starts early and ends late"),
    _tpu("xla_tpu_use_minor_sharding_for_major_trivial_input", "true", "layout of reduce-scatter"),
    _tpu("xla_tpu_relayout_group_size_threshold_for_reduce_scatter", "1", "also of small groups"),
    _tpu("xla_tpu_assign_all_reduce_scatter_layout", "true", "chosen for reduce-scatter"),
    _tpu(
        "xla_tpu_enable_latency_hiding_scheduler",
        "true",
        "orders the step so that transfers are hidden",
        "axlearn, axlearn/common/compiler_options.py",
    ),
)

# One layer of a model of 7 to 8 billion parameters has up to 233 million: 0.47 GB in bfloat16, and
# 0.93 GB of float32 gradients. JAX-Toolbox asks for at least one layer.
ONE_LAYER = str(1 << 30)

GPU_FLAGS = (
    Flag(
        "JAX_OPTIMIZATION_LEVEL", "", "O1",
        "latency hiding scheduler and pipelined collectives", TOOLBOX,
    ),
    _gpu("xla_gpu_all_gather_combine_threshold_bytes", ONE_LAYER, "one all-gather a layer"),
    _gpu("xla_gpu_reduce_scatter_combine_threshold_bytes", ONE_LAYER, "one reduce-scatter a layer"),
    _gpu("xla_gpu_all_reduce_combine_threshold_bytes", ONE_LAYER, "one all-reduce a layer"),
    _gpu("xla_gpu_enable_while_loop_double_buffering", "true", "next layer's weights come early"),
)  # fmt: skip

FLAGS: Mapping[Platform, tuple[Flag, ...]] = {"tpu": TPU_FLAGS, "gpu": GPU_FLAGS, "cpu": ()}


def likely_platform(root: str = "/") -> Platform:
    """The platform that jax will choose, without starting it.

    JAX_PLATFORMS decides where it is set. Else a TPU needs its device files and libtpu, a GPU its
    device files and jax's plugin for CUDA: without them jax takes the CPU.

    Args:
      root: of the file system; another one for tests.
    """
    if named := os.environ.get("JAX_PLATFORMS", "").partition(",")[0]:
        return "gpu" if named in ("gpu", "cuda", "rocm") else "tpu" if named == "tpu" else "cpu"
    if _exists(root, "dev/accel[0-9]*", "dev/vfio/[0-9]*") and _installed("libtpu"):
        return "tpu"
    plugins = ("jax_cuda12_plugin", "jax_cuda13_plugin")
    if _exists(root, "dev/nvidia0", "dev/nvidiactl", "dev/dxg") and any(map(_installed, plugins)):
        return "gpu"
    return "cpu"


def missing_flags(platform: Platform, environment: Mapping[str, str]) -> list[Flag]:
    """The flags of a platform that the environment does not set, to whatever value."""
    if environment.get(SWITCH) == "off":
        return []
    return [flag for flag in FLAGS[platform] if not _is_set(flag, environment)]


def apply_flags(platform: Platform) -> None:
    """Adds the missing flags to the environment. XLA must have no device yet."""
    for flag in missing_flags(platform, os.environ):
        os.environ[flag.variable] = f"{os.environ.get(flag.variable, '')} {flag}".strip()


def describe_flags(platform: Platform) -> str:
    """Lines of comments that show which flags the commands add to the environment."""
    flags = missing_flags(platform, os.environ)
    lines = [f"{flag.variable} {flag}  ({flag.why}; {flag.source})" for flag in flags]
    head = f"Added to the environment on a {platform.upper()}" + (":" if lines else ": nothing")
    return "".join(f"# {line}\n" for line in [head, *lines])


def _is_set(flag: Flag, environment: Mapping[str, str]) -> bool:
    given = environment.get(flag.variable, "").split()
    # XLA takes a first word without dashes for the name of a file that holds all flags.
    if not flag.name or (given and not given[0].startswith("-")):
        return bool(given)
    return flag.name in {word.lstrip("-").partition("=")[0] for word in given}


def _exists(root: str, *patterns: str) -> bool:
    return any(glob(os.path.join(root, pattern)) for pattern in patterns)


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None
