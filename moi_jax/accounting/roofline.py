"""The roofline: the least time that a step can take on a chip, and what the run then costs.

Each of the three resources of a chip needs some time for its share of the step. If they overlap
perfectly the step takes as long as the slowest of them (Williams et al. 2009). No step is faster;
real ones are slower.
"""

import dataclasses

import jax.numpy as jnp
from jax.sharding import Mesh

from moi_jax.accounting.layers import repeated_flops, repeated_products
from moi_jax.accounting.memory import Arguments, microbatch_rows
from moi_jax.accounting.traffic import host_traffic
from moi_jax.accounting.work import Work
from moi_jax.config import Config
from moi_jax.models.config import ModelConfig
from moi_jax.models.flops import FROZEN_PASSES, PASSES, layer_matrix_size, step_flops, usual_flops
from moi_jax.parallel.chips import Chip
from moi_jax.parallel.placing import batch_shards


@dataclasses.dataclass(frozen=True)
class Roofline:
    """Seconds of a step by resource, and what they imply.

    Attributes:
      compute_s: of all matrix products, with those that rematerialisation repeats, at the chip's
        peak in bfloat16.
      hbm_s: of the bytes of `hbm_bytes`.
      ici_s: of the bytes in collectives, over the links within a slice or node.
      network_s: of those between slices or nodes; 0 for one.
      mfu: model FLOPs utilisation by the usual count, if the step took step_s.
      useful_mfu: the same by the useful count (models/flops.py).
    """

    compute_s: float
    hbm_s: float
    ici_s: float
    network_s: float
    mfu: float
    useful_mfu: float

    @property
    def step_s(self) -> float:
        return max(self.compute_s, self.hbm_s, self.ici_s, self.network_s)

    @property
    def serial_s(self) -> float:
        """The time of a step in which nothing overlaps."""
        return self.compute_s + self.hbm_s + self.ici_s + self.network_s

    @property
    def bound(self) -> str:
        """The slowest resource."""
        times = {
            "compute": self.compute_s, "memory": self.hbm_s, "links": self.ici_s,
            "network": self.network_s,
        }  # fmt: skip
        return max(times, key=lambda name: times[name])


@dataclasses.dataclass(frozen=True)
class Executed:
    """The FLOPs of one step over all devices.

    Attributes:
      useful, usual: see models/flops.py.
      executed: what at least runs. Padding and what rematerialisation repeats count, but not the
        pairs and logits that are skipped.
    """

    useful: int
    usual: int
    executed: int


def flops_of(config: Config, model: ModelConfig, work: Work, mesh: Mesh) -> Executed:
    """Counts the operations of a step of this config, whose batch has this work."""
    rows, length = config.train.global_batch_rows, config.data.sequence_length
    usual = usual_flops(model, rows, length)
    loss_tokens = work.tokens if work.loss_tokens is None else work.loss_tokens
    useful = step_flops(model, work.tokens, work.pairs, loss_tokens)
    repeated = repeated_flops(model, config.model, rows * length, work.pairs)
    logits = work.logit_tokens(rows, microbatch_rows(config), batch_shards(mesh))
    run = step_flops(model, rows * length, work.pairs, logits)
    return Executed(useful.total, usual.total, run.total + repeated)


def roofline(
    chip: Chip,
    devices: int,
    flops: Executed,
    hbm_bytes: float,
    sent_bytes: float,
    network_bytes: float = 0,
) -> Roofline:
    """Returns the least time of a step.

    Args:
      devices: over which the operations are split.
      hbm_bytes, sent_bytes, network_bytes: of one device.
    """
    compute = flops.executed / devices / chip.bf16_flops
    hbm = hbm_bytes / chip.hbm_bandwidth
    ici = sent_bytes / chip.link_bandwidth
    network = network_bytes / chip.network_bandwidth if chip.network_bandwidth else 0.0
    step = max(compute, hbm, ici, network)
    peak = step * devices * chip.bf16_flops
    return Roofline(compute, hbm, ici, network, flops.usual / peak, flops.useful / peak)


def hbm_traffic(
    config: Config,
    model: ModelConfig,
    mesh: Mesh,
    arguments: Arguments,
    temporaries: dict[str, int],
) -> float:
    """Adds up what a device at least reads and writes in its memory in a step, in bytes.

    What is trained of the state is read and written once. The gradients are written and read for
    every microbatch, and so is what the layers keep. The gathered weights of every layer are read
    in three passes, or in two where they are frozen beside adapters, and in one more where
    rematerialisation computes a product again. What is offloaded is read and written once, on its
    way to the host and back.

    Args:
      config: without `auto`, see `resolved.on_chip`.
    """
    microbatches = config.train.global_batch_rows // microbatch_rows(config)
    passes = FROZEN_PASSES if model.adapter else PASSES
    passes += bool(repeated_products(model, config.model))
    value = jnp.dtype(config.model.compute_dtype).itemsize
    weights = value * model.num_layers * layer_matrix_size(model) / mesh.shape["tensor"]
    each = 2 * (temporaries["gradients"] + temporaries["saved activations"]) + passes * weights
    state = 2 * (arguments.parameters - arguments.frozen + arguments.optimizer)
    return state + microbatches * each + host_traffic(config, model, mesh)
