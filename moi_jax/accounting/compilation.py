"""Compiles a step for a topology without the hardware, and reads what the compiler made of it."""

import dataclasses
import logging
import re
import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from moi_jax.accounting.collectives import count_collectives
from moi_jax.accounting.hlo import Module, largest_array, parse_module
from moi_jax.accounting.memory import abstract_step
from moi_jax.accounting.topology import Topology, described_devices
from moi_jax.config import Config
from moi_jax.data.loader import Batch
from moi_jax.evaluation.row_sums import row_sums_step
from moi_jax.models.compute import resolve_dtypes
from moi_jax.models.config import ModelConfig
from moi_jax.parallel.chips import GIB
from moi_jax.training.optimizer import make_optimizer, make_schedule
from moi_jax.training.step import make_train_step
from moi_jax.training.train import model_on_mesh

log = logging.getLogger(__name__)

# As libtpu 0.0.42 says it; it names no buffers. The figure holds the arguments too.
REFUSED = re.compile(r"required for HLO temporaries \(([\d.]+)G\) exceeds available HBM")
LISTED = 8  # largest buffers
STEPS = 1000  # of the schedule; the program is the same for any number
# Instructions that have no buffer of their own.
NO_BUFFER = (
    "parameter", "tuple", "get-tuple-element", "bitcast", "while", "conditional", "constant",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler says of a step on one device. Plain values, so that it can be kept.

    Attributes:
      arguments: bytes of what goes in.
      peak: the most bytes that are in use at once, arguments included. The compiler refuses a
        program by this figure. jax's `temp_size_in_bytes` is larger: programs compile whose
        arguments and `temp_size_in_bytes` are more than the memory (tried with libtpu 0.0.42).
        None: it refused without a figure.
      refused: the compiler found no room. Then no more than `peak` is known.
      buffers: the largest results that the program computes, as (name, bytes).
      seconds: how long it took to compile.
      temp_size: jax's `temp_size_in_bytes`; None if the compiler refused.
    """

    arguments: int
    peak: int | None
    refused: bool
    collectives: dict[str, dict[str, float]]
    unknown_loops: int
    buffers: list[tuple[str, int]]
    seconds: float
    temp_size: int | None = None


def compile_step(config: Config, model: ModelConfig, topology: Topology, step: str) -> Compiled:
    """Compiles the train or eval step of a config for a TPU.

    Raises:
      UserError: config and topology do not fit together.
    """
    lowered = lower_step(config, model, described_devices(topology), step)
    begin = time.monotonic()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        found = REFUSED.search(str(error))
        peak = int(float(found[1]) * GIB) if found else None
        return Compiled(0, peak, True, {}, 0, [], time.monotonic() - begin)
    return read_compiled(compiled, time.monotonic() - begin)


def lower_step(config: Config, model: ModelConfig, devices: list[jax.Device], step: str) -> Any:
    """Traces the train step, or a batch of the held-out eval ("eval"), for these devices."""
    config = resolve_dtypes(config, devices[0].platform)
    mesh, bind, _ = model_on_mesh(config, model, devices)
    state, batch = abstract_step(config, model, mesh)
    if step == "eval":
        with jax.set_mesh(mesh):
            return row_sums_step(bind, mesh).lower(state.parameters, _one(batch, mesh))  # type: ignore[attr-defined]
    optimizer = make_optimizer(config.optimizer, model)
    schedule = make_schedule(config.optimizer, STEPS)
    domains = max(1, len(config.data.domains))
    train_step = make_train_step(
        model, bind, optimizer, schedule, domains, mesh, config.optimizer.gradient_dtype
    )
    with jax.set_mesh(mesh):
        return train_step.lower(state, batch, jax.ShapeDtypeStruct((), jnp.float32))  # type: ignore[attr-defined]


def _one(batch: Batch, mesh: Mesh) -> Batch:
    """Returns one microbatch [M, S] of an abstract batch [A, M, S]."""
    sharding = NamedSharding(mesh, PartitionSpec(*batch.tokens.sharding.spec[1:]))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype, sharding=sharding), batch
    )


def read_compiled(compiled: Any, seconds: float) -> Compiled:
    """Reads memory and collectives of a compiled program, which took so long to compile."""
    memory, text = compiled.memory_analysis(), compiled.as_text()
    traffic = count_collectives(text)
    return Compiled(
        arguments=memory.argument_size_in_bytes,
        peak=memory.peak_memory_in_bytes,
        refused=False,
        collectives={kind: dataclasses.asdict(c) for kind, c in traffic.kinds.items()},
        unknown_loops=traffic.unknown_loops,
        buffers=largest_buffers(text),
        seconds=seconds,
        temp_size=memory.temp_size_in_bytes,
    )


def largest_buffers(text: str) -> list[tuple[str, int]]:
    """Returns the largest results of a compiled program, outside of fusions, as (name, bytes).

    The name is the shape, and the operation of jax that it comes from. Not all of them need to
    live at the same time.
    """
    module = parse_module(text)
    found: dict[str, int] = {}
    for name in _outside_fusions(module):
        for instruction in module.computations[name].values():
            if instruction.opcode in NO_BUFFER or instruction.opcode.endswith("-done"):
                continue
            origin = re.search(r'op_name="[^"]*?([^"/]*/[^"/]*)"', instruction.attributes)
            label = f"{instruction.shape.split('{')[0].lstrip('(')} {origin[1] if origin else ''}"
            found[label.strip()] = largest_array(instruction.shape)
    return sorted(found.items(), key=lambda item: -item[1])[:LISTED]


def _outside_fusions(module: Module) -> list[str]:
    """The computations that run by themselves: the entry, bodies of loops, and branches."""
    names, todo = [], [module.entry]
    while todo:
        names.append(todo.pop())
        for instruction in module.computations[names[-1]].values():
            if instruction.opcode == "while":
                todo.append(instruction.computation("body"))
            elif instruction.opcode == "conditional":
                todo += instruction.called
    return names
