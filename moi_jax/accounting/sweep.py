"""Searches settings that fit a topology: many by arithmetic, the best of them by the compiler."""

import dataclasses
import itertools
import logging
import typing
from collections.abc import Callable, Iterator, Sequence

import jax

from moi_jax.accounting.memory import filled_mesh
from moi_jax.accounting.plan import Plan, make_plan
from moi_jax.accounting.topology import Topology
from moi_jax.accounting.work import Work
from moi_jax.common.errors import UserError
from moi_jax.config import Config, Model
from moi_jax.config.load import apply_override, make_config
from moi_jax.models.config import ModelConfig

log = logging.getLogger(__name__)

DIMENSIONS = ("remat", "mesh", "rows", "attention")
ROWS = (1, 2, 4, 8, 16, 32)  # of a microbatch, for each part of the mesh that splits the rows
TENSOR = (1, 2, 4, 8)  # within a host
ATTENTION = {"tpu": ("splash", "blockwise"), "gpu": ("mosaic_gpu", "blockwise")}

MakePlan = Callable[[Config], Plan]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """Settings and their plan.

    Attributes:
      overrides: section.key=value, as the train command takes them.
      estimate: the plan by arithmetic.
    """

    overrides: tuple[str, ...]
    config: Config
    estimate: Plan

    @property
    def speed(self) -> tuple[float, float]:
        """Sorts by the time of a step; of equal ones, what has less to overlap comes first."""
        return _speed(self.estimate)


@dataclasses.dataclass(frozen=True)
class Found:
    """A candidate with its final plan.

    Attributes:
      plan: compiled where there is a compiler; the estimate if that failed.
      failure: why it could not be compiled.
    """

    overrides: tuple[str, ...]
    plan: Plan
    failure: str | None = None

    @property
    def fits(self) -> bool:
        return self.failure is None and self.plan.fits


def parse_dimensions(text: str) -> tuple[str, ...]:
    """Reads --sweep, such as "remat,rows".

    Raises:
      UserError: a name is unknown.
    """
    names = tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in DIMENSIONS:
            raise UserError(f"--sweep {name!r} is unknown; use some of {','.join(DIMENSIONS)}")
    return names


def candidates(
    config: Config, model: ModelConfig, topology: Topology, work: Work, names: Sequence[str]
) -> list[Candidate]:
    """Returns the settings that may fit, fastest first by arithmetic.

    Left out is what cannot fit: its arguments, gradients and kept activations alone are more than
    the memory. Settings that are estimated to fit come before those that may.

    Raises:
      UserError: none of the settings is valid; it says why the first is not.
    """
    valid, mistakes = [], []
    for overrides in _combinations(config, model, topology, names):
        try:
            changed = _with(config, overrides)
            estimate = make_plan(changed, model, topology, work)
        except UserError as error:  # such as rows that do not divide over the mesh
            mistakes.append(error)
            continue
        valid.append(Candidate(overrides, changed, estimate))
    if mistakes and not valid:
        raise mistakes[0]
    found = [one for one in valid if _least(one.estimate) <= one.estimate.hbm_bytes]
    return sorted(found, key=lambda one: (not one.estimate.fits, one.speed))


def sweep(
    found: Sequence[Candidate], make: MakePlan, compiles: bool, limit: int
) -> tuple[list[Found], int]:
    """Plans the best candidates.

    The last compilation goes to what needs least memory, if nothing has fitted before.

    Args:
      found: in the order in which they are tried.
      make: config -> its plan; it compiles where `compiles`.
      limit: how many are planned at most.

    Returns:
      What it planned, best first; the number of candidates that `limit` left out and that may fit.
    """
    if not compiles:
        # All are planned, and those that fit stand first.
        return [Found(one.overrides, one.estimate) for one in found[:limit]], 0
    planned: list[Found] = []
    left = list(found)
    while left and len(planned) < limit:
        one = left[0]
        if planned and len(planned) == limit - 1 and not any(other.fits for other in planned):
            one = min(left, key=lambda other: other.estimate.peak_bytes)
        log.info(f"{len(planned) + 1} of at most {limit}: {' '.join(one.overrides)}")
        planned.append(_planned(one, make))
        left.remove(one)
        if planned[-1].failure is None and not planned[-1].fits:
            left = [other for other in left if not _needs_as_much(other.estimate, one.estimate)]
    return sorted(planned, key=_order), len(left)


def _planned(one: Candidate, make: MakePlan) -> Found:
    """Plans a candidate; one that the compiler cannot take must not end the search."""
    try:
        return Found(one.overrides, make(one.config))
    except (UserError, jax.errors.JaxRuntimeError) as error:
        return Found(one.overrides, one.estimate, str(error).splitlines()[0])


def _order(one: Found) -> tuple[bool, bool, tuple[float, float]]:
    return not one.fits, one.failure is not None, _speed(one.plan)


def _combinations(
    config: Config, model: ModelConfig, topology: Topology, names: Sequence[str]
) -> Iterator[tuple[str, ...]]:
    """Yields the overrides of every combination of the settings that are swept."""
    annotation = Model.model_fields["remat"].annotation
    remats = [f"model.remat={name}" for name in typing.get_args(annotation)]
    kernels = [f"model.attention={name}" for name in ATTENTION[topology.chip.platform]]
    for remat, kernel, mesh in itertools.product(
        remats if "remat" in names else [None],
        kernels if "attention" in names else [None],
        _meshes(config, model, topology) if "mesh" in names else [()],
    ):
        chosen = (*mesh, *(text for text in (remat, kernel) if text))
        if "rows" not in names:
            yield chosen
            continue
        shards = _batch_shards(config, topology, mesh)
        for rows in ROWS:
            if rows == 1 or rows * shards <= config.train.global_batch_rows:
                yield (*chosen, f"train.microbatch_rows={rows * shards}")


def _meshes(config: Config, model: ModelConfig, topology: Topology) -> Iterator[tuple[str, ...]]:
    """Yields the meshes: data over slices, tensor within a host, fsdp takes the rest.

    The context axis stays as it is in the config; of -1 nothing is left.
    """
    context = max(1, config.mesh.context)
    for tensor in TENSOR:
        fsdp, rest = divmod(topology.devices, topology.slices * tensor * context)
        if rest == 0 and fsdp and model.num_heads % tensor == 0:
            yield f"mesh.data={topology.slices}", f"mesh.fsdp={fsdp}", f"mesh.tensor={tensor}"


def _batch_shards(config: Config, topology: Topology, mesh: Sequence[str]) -> int:
    """Returns over how many parts a mesh splits the rows."""
    sizes = filled_mesh(_with(config, mesh).mesh, topology.devices, topology.name)
    return sizes["data"] * sizes["fsdp"]


def _with(config: Config, overrides: Sequence[str]) -> Config:
    values = config.model_dump(mode="json")
    for override in overrides:
        apply_override(values, override)
    return make_config(values)


def _least(plan: Plan) -> int:
    parts = plan.temporaries
    return plan.arguments.total + parts["gradients"] + parts["saved activations"]


def _needs_as_much(plan: Plan, refused: Plan) -> bool:
    """Whether a plan on the same mesh needs as much memory as one that does not fit."""
    return plan.mesh == refused.mesh and plan.peak_bytes >= refused.peak_bytes


def _speed(plan: Plan) -> tuple[float, float]:
    assert plan.roofline is not None
    return plan.roofline.step_s, plan.roofline.serial_s
