"""From the time of a step to hours, price and throughput of a run, and the plan as JSON."""

import dataclasses
from typing import Any

from moi_jax.accounting.plan import Plan

SECONDS_AN_HOUR = 3600


@dataclasses.dataclass(frozen=True)
class Cost:
    """The least that a run takes, by the roofline. None where the data or the price is unknown.

    Attributes:
      hours: of the whole run, all chips at once.
      usd: of the whole run.
      usd_per_million_loss_tokens: loss tokens, counted as often as they are trained on.
      tokens_per_second_per_chip: real tokens, without padding.
    """

    hours: float | None
    usd: float | None
    usd_per_million_loss_tokens: float | None
    tokens_per_second_per_chip: float


def cost_of(plan: Plan, price: float | None) -> Cost:
    """Computes what the run of a train plan takes.

    Args:
      price: dollars for a chip and an hour.
    """
    assert plan.roofline is not None
    seconds, work, chips = plan.roofline.step_s, plan.work, plan.topology.chips
    hours = None if work.steps is None else work.steps * seconds / SECONDS_AN_HOUR
    step_usd = None if price is None else price * chips * seconds / SECONDS_AN_HOUR
    return Cost(
        hours=hours,
        usd=None if hours is None or price is None else hours * chips * price,
        usd_per_million_loss_tokens=(
            step_usd / work.loss_tokens * 1e6 if step_usd is not None and work.loss_tokens else None
        ),
        tokens_per_second_per_chip=work.tokens / seconds / chips,
    )


def plan_json(plan: Plan, price: float | None = None) -> dict[str, Any]:
    """Returns the plan as JSON; docs/plan.md tells what each key means."""
    values: dict[str, Any] = {
        "topology": plan.topology.name,
        "slices": plan.topology.slices,
        "chips": plan.topology.chips,
        "chip": plan.topology.chip.name,
        "step": plan.step,
        "source": "compiled" if plan.compiled else "arithmetic",
        "mesh": plan.mesh,
        "per_chip": {
            "parameters_bytes": plan.arguments.parameters,
            "optimizer_bytes": plan.arguments.optimizer,
            "batch_bytes": plan.arguments.batch,
            "arguments_bytes": plan.arguments_bytes,
            "temporaries_bytes": plan.temporaries_bytes,
            "peak_bytes": plan.peak_bytes,
            "hbm_bytes": plan.hbm_bytes,
            "headroom_bytes": plan.hbm_bytes - plan.peak_bytes,
            "fits": plan.fits,
            "largest": [{"name": name, "bytes": size} for name, size in plan.largest],
        },
        "work": {k: v for k, v in vars(plan.work).items() if k != "row_loss_tokens"},
        "collectives": plan.collectives,
        "host_bytes": plan.host_bytes,
    }
    if plan.kv_cache is not None:
        free = plan.hbm_bytes - plan.peak_bytes
        values["kv_cache"] = {
            "bytes_per_row": plan.kv_cache,
            "rows_that_fit": max(0, free // plan.kv_cache) * batch_shards_of(plan),
        }
    if plan.compiled:
        values["compile_seconds"] = round(plan.compiled.seconds, 1)
        values["unknown_loops"] = plan.compiled.unknown_loops
        values["per_chip"]["temp_size_in_bytes"] = plan.compiled.temp_size
    if plan.flops and plan.roofline:
        values["flops_per_step"] = plan.flops.useful
        values["flops"] = dataclasses.asdict(plan.flops)
        values["roofline"] = {
            **dataclasses.asdict(plan.roofline),
            "step_s": plan.roofline.step_s,
            "bound": plan.roofline.bound,
        }
        values["run"] = dataclasses.asdict(cost_of(plan, price))
    return values


def batch_shards_of(plan: Plan) -> int:
    """Returns over how many parts of the mesh the rows are split."""
    return plan.mesh["data"] * plan.mesh["fsdp"]
