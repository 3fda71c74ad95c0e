"""The accelerators and their published figures: what utilisation and plans are measured against."""

import dataclasses

GIB = 1 << 30


@dataclasses.dataclass(frozen=True)
class Chip:
    """The published figures of one device of jax, which is a chip, or half of one on TPU7x.

    Attributes:
      name: as in the name of a topology, such as v5p in v5p:2x2x2 and h100 in h100:8.
      device_kind: what `jax.Device.device_kind` says.
      bf16_flops: peak of dense bfloat16 matrix products, in operations a second.
      hbm_bytes: memory that a program can have. TPU: what the compiler of libtpu 0.0.42 grants,
        which is the published size less what the system keeps.
      hbm_bandwidth: bytes a second.
      link_bandwidth: bytes a second that it can send (and receive at the same time) over all its
        links to the chips of its slice (ICI) or node (NVLink). The published figures are those of
        both directions together, so these are their halves.
      network_bandwidth: bytes a second that it can send to another slice or node, its share of the
        network cards of its host; None where none is published.
      devices_per_chip: what is sold as one chip may be several devices of jax.
    """

    name: str
    device_kind: str
    bf16_flops: float
    hbm_bytes: int
    hbm_bandwidth: float
    link_bandwidth: float
    network_bandwidth: float | None
    devices_per_chip: int = 1

    @property
    def platform(self) -> str:
        """Returns tpu or gpu, as jax names the platform."""
        return "tpu" if self.device_kind.startswith("TPU") else "gpu"


# TPU: docs.cloud.google.com/tpu/docs/NAME. Peak, bandwidth of HBM, ICI and DCN stand in the tables
# there. v4's links (6 of 50 GB/s) are in Jouppi et al. 2023, table 4; v5e's network is the 6.4 Tb/s
# of its pod divided by 256. GPU: NVIDIA's data sheets, without sparsity; the network is that of a
# DGX node, one card of 200 Gb/s (A100) or 400 Gb/s for each GPU.
CHIPS = (
    Chip("v4", "TPU v4", 275e12, int(30.75 * GIB), 1.2e12, 300e9, None),
    Chip("v5e", "TPU v5 lite", 197e12, int(15.75 * GIB), 819e9, 200e9, 3.125e9),
    Chip("v5p", "TPU v5", 459e12, int(95.74 * GIB), 2.765e12, 600e9, 6.25e9),
    Chip("v6e", "TPU v6 lite", 918e12, int(31.25 * GIB), 1.638e12, 400e9, 12.5e9),
    # docs.cloud.google.com/tpu/docs/tpu7x: 2,307 TFLOP/s, 192 GiB, 7.38 TB/s, 1.2 TB/s, 100 Gb/s
    # for two devices.
    Chip("tpu7x", "TPU7x", 1153.5e12, int(94.75 * GIB), 3.69e12, 300e9, 6.25e9, devices_per_chip=2),
    # L4: NVIDIA's product page, 242 TFLOP/s with sparsity; PCIe 4.0 x16, 64 GB/s both ways.
    Chip("l4", "NVIDIA L4", 121e12, int(24e9), 300e9, 32e9, None),
    # A100 80GB SXM: nvidia-a100-datasheet.
    Chip("a100", "NVIDIA A100-SXM4-80GB", 312e12, int(80e9), 2.039e12, 300e9, 25e9),
    # H100 SXM: the data sheet, 1,979 TFLOP/s with sparsity.
    Chip("h100", "NVIDIA H100 80GB HBM3", 989.5e12, int(80e9), 3.35e12, 450e9, 50e9),
    Chip("h200", "NVIDIA H200", 989.5e12, int(141e9), 4.8e12, 450e9, 50e9),
    # DGX B200: 1,440 GB and 64 TB/s for 8 GPUs; HGX: 4.5 PFLOP/s a GPU with sparsity.
    Chip("b200", "NVIDIA B200", 2250e12, int(180e9), 8e12, 900e9, 50e9),
)


def chip_of(device_kind: str) -> Chip | None:
    """Returns the chip of a device by its `device_kind`; None for a CPU or one not in the table."""
    return next((chip for chip in CHIPS if chip.device_kind == device_kind), None)
