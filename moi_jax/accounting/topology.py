"""What a plan is made for: chips by name and number, with their devices where a compiler is."""

import dataclasses
import importlib.util
import math
import os
import re
from typing import TYPE_CHECKING, Any

from moi_jax.common.errors import UserError
from moi_jax.parallel.chips import CHIPS, Chip
from moi_jax.parallel.xla_flags import apply_flags

if TYPE_CHECKING:
    import jax

FORM = "NAME:SHAPE, such as v5p:2x2x2, v5e:4x8 or h100:8"
# XLA takes a part of a GPU's memory when it starts (docs.jax.dev, "GPU memory allocation"). jax
# takes the old name of the variable, too (jaxlib/xla_client.py).
GPU_FRACTION, OLD_GPU_FRACTION = "XLA_CLIENT_MEM_FRACTION", "XLA_PYTHON_CLIENT_MEM_FRACTION"
GPU_DEFAULT = 0.75


@dataclasses.dataclass(frozen=True)
class Topology:
    """Slices of a TPU, or nodes of GPUs.

    Attributes:
      name: as it was given, such as v5p:2x2x2.
      chip: of a GPU, with the memory that XLA takes of it.
      slices: how many of them, connected by the network of the data center.
      shape: the chips of a slice along each axis of the torus, or (GPUs of a node,).
    """

    name: str
    chip: Chip
    shape: tuple[int, ...]
    slices: int

    @property
    def chips(self) -> int:
        """The chips of all slices."""
        return math.prod(self.shape) * self.slices

    @property
    def devices(self) -> int:
        """What jax sees of them."""
        return self.chips * self.chip.devices_per_chip

    @property
    def compiles(self) -> bool:
        """Whether there is a compiler that needs no hardware: the TPU's, in libtpu."""
        return self.chip.platform == "tpu"


def parse_topology(name: str, slices: int) -> Topology:
    """Reads the name of a topology, such as v5p:2x2x2 or h100:8.

    Raises:
      UserError: it is no such name, the chip is not in the table, or the variable for the part of
        a GPU's memory that XLA takes holds no fraction.
    """
    found = re.fullmatch(r"([a-z]\w*):(\d+(?:x\d+)*)", name)
    chips = {chip.name: chip for chip in CHIPS}
    if not found or found[1] not in chips:
        raise UserError(f"--topology {name!r} is unknown; give {FORM}. Known: {', '.join(chips)}")
    chip, shape = chips[found[1]], tuple(int(size) for size in found[2].split("x"))
    if 0 in shape:
        raise UserError(f"--topology {name!r} has no chips; give {FORM}")
    if chip.platform == "gpu" and len(shape) > 1:
        raise UserError(f"--topology {name!r}: a node has a number of GPUs, such as {chip.name}:8")
    if chip.platform == "gpu":
        chip = dataclasses.replace(chip, hbm_bytes=int(chip.hbm_bytes * gpu_fraction()))
    return Topology(name, chip, shape, slices)


def gpu_fraction() -> float:
    """Returns the part of a GPU's memory that XLA takes.

    Raises:
      UserError: the variable holds something else.
    """
    name = GPU_FRACTION if os.environ.get(GPU_FRACTION) else OLD_GPU_FRACTION
    text = os.environ.get(name) or str(GPU_DEFAULT)
    try:
        fraction = float(text)
    except ValueError:
        fraction = 0.0
    if not 0 < fraction <= 1:
        raise UserError(f"{name}={text} is no part of a GPU's memory; set it to 0.9 or so")
    return fraction


def prepare_environment(compiles: bool) -> None:
    """Lets this process plan for devices that it does not have, before jax is imported.

    Args:
      compiles: for a TPU. What the user has set of libtpu's variables stays.

    Raises:
      UserError: libtpu is not installed.
    """
    os.environ["JAX_PLATFORMS"] = "cpu"
    if not compiles:
        return
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            "libtpu, the compiler of the TPU, is not installed; pip install 'moi_jax[plan]' (it "
            "needs no TPU)"
        )
    defaults = {
        "TPU_SKIP_MDS_QUERY": "1",  # do not ask the cloud which TPU this machine has
        "TPU_WORKER_HOSTNAMES": "localhost",
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_LOG_DIR": "disabled",
        "TPU_STDERR_LOG_LEVEL": "3",
        "TPU_MIN_LOG_LEVEL": "3",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    apply_flags("tpu")


def described_devices(topology: Topology) -> "list[jax.Device]":
    """Returns the devices of the topology, which only a compiler can use.

    Raises:
      UserError: libtpu knows no such slice.
    """
    from jax.errors import JaxRuntimeError
    from jax.experimental import topologies

    options: dict[str, Any] = {"num_slices": topology.slices} if topology.slices > 1 else {}
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # both cores of a chip as one device
    try:
        described = topologies.get_topology_desc(
            platform="tpu", topology_name=topology.name, **options
        )
        return list(described.devices)
    except (JaxRuntimeError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(
            f"--topology {topology.name!r}: libtpu does not know this slice ({reason}); give one "
            f"that is sold, such as v5p:2x2x2, v5e:4x8 or v6e:4x4"
        ) from None
