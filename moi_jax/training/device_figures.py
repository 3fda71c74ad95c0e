"""What a log line says of the devices: their utilisation, and the memory that they needed."""

from dataclasses import dataclass

import jax
from jax.sharding import Mesh

from moi_jax.models.config import ModelConfig
from moi_jax.models.flops import step_flops, usual_flops
from moi_jax.parallel.chips import chip_of


@dataclass(frozen=True)
class Work:
    """What some steps have computed.

    Attributes:
      rows: batch rows with tokens.
      tokens: tokens in these rows.
      pairs: (query, key) pairs that attention uses among them.
      loss_tokens: those of the tokens that carry loss.
      seconds: how long the steps took.
    """

    rows: int
    tokens: int
    pairs: int
    loss_tokens: int
    seconds: float


class DeviceFigures:
    """The figures of the devices of a mesh. One that is not known has no key in the records."""

    def __init__(self, model: ModelConfig, sequence_length: int, mesh: Mesh):
        chip = chip_of(mesh.devices.flat[0].device_kind)
        self._peak = chip.bf16_flops * mesh.devices.size if chip else None
        self._model, self._sequence_length = model, sequence_length
        self._local = mesh.local_devices

    def record(self, work: Work) -> dict[str, float]:
        """The keys for a record of metrics.jsonl.

        mfu: the useful operations of `models/flops.py` over what the chips could do in that time,
          by their published bfloat16 peak.
        mfu_full_causal: the same for full rows, and causal attention over whole rows, which is how
          others publish it.
        peak_device_memory_bytes: the most that a device of this process has had in use so far.
        """
        record: dict[str, float] = {}
        if self._peak:
            most = self._peak * work.seconds
            full = usual_flops(self._model, work.rows, self._sequence_length).total
            useful = step_flops(self._model, work.tokens, work.pairs, work.loss_tokens).total
            record["mfu"] = useful / most
            record["mfu_full_causal"] = full / most
        if peak := max(map(_peak_memory, self._local), default=0):
            record["peak_device_memory_bytes"] = peak
        return record


def _peak_memory(device: jax.Device) -> int:
    """In bytes; 0 where the platform does not count it, as on a CPU."""
    return (device.memory_stats() or {}).get("peak_bytes_in_use", 0)
