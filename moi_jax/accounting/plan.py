"""The plan of a config on a topology: memory, operations, collectives, time and price."""

import dataclasses
from typing import cast

from jax.sharding import AbstractMesh, Mesh

from moi_jax.accounting.compilation import Compiled
from moi_jax.accounting.memory import (
    Arguments,
    abstract_step,
    argument_bytes,
    filled_mesh,
    kv_cache_bytes,
    microbatch_rows,
    temporary_bytes,
)
from moi_jax.accounting.resolved import on_chip
from moi_jax.accounting.roofline import Executed, Roofline, flops_of, hbm_traffic, roofline
from moi_jax.accounting.topology import Topology
from moi_jax.accounting.traffic import host_traffic, network_traffic, step_traffic
from moi_jax.accounting.work import Work
from moi_jax.config import Config
from moi_jax.models.config import ModelConfig
from moi_jax.parallel.context import check_sequence
from moi_jax.parallel.placing import check_rows
from moi_jax.training.optimizer import make_optimizer
from moi_jax.training.state import abstract_state

# Of the temporaries, what a forward pass has too.
FORWARD = (
    "one layer's activations",
    "attention scores of a layer",
    "gathered weights of two layers",
    "logits of a chunk",
)


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one step of a config needs on each device of a topology.

    Attributes:
      config: with the dtype and the attention that `auto` is on the chip.
      step: train, eval or generate.
      mesh: the size of each axis.
      arguments: by what they are, without padding.
      temporaries: by arithmetic, by name.
      compiled: what the compiler says; None where the plan is arithmetic alone.
      flops, roofline: of the train step; None for the others.
      kv_cache: bytes of the cache of one row of data.sequence_length tokens, for generate.
    """

    config: Config
    model: ModelConfig
    topology: Topology
    step: str
    mesh: dict[str, int]
    arguments: Arguments
    temporaries: dict[str, int]
    compiled: Compiled | None
    work: Work
    flops: Executed | None = None
    roofline: Roofline | None = None
    kv_cache: int | None = None

    @property
    def arguments_bytes(self) -> int:
        return self.program.arguments if self.program else self.arguments.total

    @property
    def temporaries_bytes(self) -> int:
        if self.compiled and self.compiled.peak is not None:
            return self.compiled.peak - self.arguments_bytes
        return sum(self.temporaries.values())

    @property
    def peak_bytes(self) -> int:
        return self.arguments_bytes + self.temporaries_bytes

    @property
    def hbm_bytes(self) -> int:
        return self.topology.chip.hbm_bytes

    @property
    def fits(self) -> bool:
        refused = self.compiled is not None and self.compiled.refused
        return not refused and self.peak_bytes <= self.hbm_bytes

    @property
    def largest(self) -> list[tuple[str, int]]:
        """The largest buffers by name: those of the compiled program, else by arithmetic."""
        if self.program:
            return self.program.buffers
        parts = {
            "parameters": self.arguments.parameters,
            "optimizer": self.arguments.optimizer,
            **self.temporaries,
        }
        return sorted(((n, size) for n, size in parts.items() if size), key=lambda x: -x[1])

    @property
    def collectives(self) -> dict[str, dict[str, float | None]]:
        """Kind -> count (None by arithmetic) and bytes that a device sends in a step."""
        if self.program:
            return {
                kind: {"count": values["count"], "bytes": round(values["bytes"])}
                for kind, values in self.program.collectives.items()
            }
        if self.step != "train":
            return {}
        sent = step_traffic(self.config, self.model, _abstract(self.mesh))
        return {k: {"count": None, "bytes": round(size)} for k, size in sent.items() if size}

    @property
    def host_bytes(self) -> int:
        """Bytes that a device sends to its host and fetches again in a train step: offloading."""
        if self.step != "train":
            return 0
        return round(host_traffic(self.config, self.model, _abstract(self.mesh)))

    @property
    def program(self) -> Compiled | None:
        """The compiled program, if there is one."""
        return None if self.compiled is None or self.compiled.refused else self.compiled


def make_plan(
    config: Config,
    model: ModelConfig,
    topology: Topology,
    work: Work,
    step: str = "train",
    compiled: Compiled | None = None,
) -> Plan:
    """Makes the plan of a step; without `compiled` by arithmetic alone.

    Raises:
      UserError: mesh, rows, their length or attention do not fit the topology.
    """
    sizes = filled_mesh(config.mesh, topology.devices, topology.name)
    mesh = _abstract(sizes)
    if step == "generate":
        return _generating(config, model, topology, work, sizes)
    config = on_chip(config, model, topology.chip, mesh)
    key = "microbatch_rows" if config.train.microbatch_rows else "global_batch_rows"
    check_rows(microbatch_rows(config), mesh, f"train.{key}")
    check_sequence(config.data.sequence_length, mesh, "data.sequence_length")
    state, batch = abstract_step(config, model, mesh)
    arguments = argument_bytes(state, batch)
    temporaries = temporary_bytes(config, model, mesh, state)
    plan = Plan(config, model, topology, step, sizes, arguments, temporaries, compiled, work)
    if step == "eval":
        microbatch = arguments.batch * microbatch_rows(config) // config.train.global_batch_rows
        return dataclasses.replace(
            plan,
            arguments=Arguments(arguments.parameters, 0, microbatch),
            temporaries={name: temporaries[name] for name in FORWARD},
        )
    flops = flops_of(config, model, work, mesh)
    sent = sum(values["bytes"] or 0 for values in plan.collectives.values())
    return dataclasses.replace(
        plan,
        flops=flops,
        roofline=roofline(
            topology.chip,
            topology.devices,
            flops,
            hbm_traffic(config, model, mesh, arguments, temporaries),
            sent,
            network_traffic(config, model, mesh, topology.slices),
        ),
    )


def _generating(
    config: Config, model: ModelConfig, topology: Topology, work: Work, sizes: dict[str, int]
) -> Plan:
    """Returns the plan of a sampler: parameters in bfloat16, and the cache beside them."""
    optimizer = make_optimizer(config.optimizer, model)
    state = abstract_state(model, optimizer, "bfloat16", _abstract(sizes))
    arguments = Arguments(argument_bytes(state).parameters, 0, 0)
    cache = kv_cache_bytes(model, 1, config.data.sequence_length, sizes["tensor"])
    return Plan(
        config, model, topology, "generate", sizes, arguments, {}, None, work, kv_cache=cache
    )


def _abstract(sizes: dict[str, int]) -> Mesh:
    # It has all that is read here of a mesh: its shape.
    return cast(Mesh, AbstractMesh(tuple(sizes.values()), tuple(sizes)))
