"""A plan and a sweep as text for a terminal."""

import shlex
from collections.abc import Sequence

from moi_jax.accounting.costs import batch_shards_of, cost_of
from moi_jax.accounting.plan import Plan
from moi_jax.accounting.sweep import Candidate, Found
from moi_jax.accounting.topology import GPU_FRACTION, gpu_fraction
from moi_jax.parallel.chips import GIB

MIB = 1 << 20
SHOWN = 5  # largest buffers
# What the temporaries are, by step.
TEMPORARIES = {"train": "gradients, activations", "eval": "activations", "generate": ""}

FROZEN = (
    "optimizer.frozen: operations, and collectives by arithmetic, count all parameters as trained; "
    "time and price are upper figures and no bounds"
)


def describe_plan(plan: Plan, price: float | None) -> str:
    """Returns the plan as lines of text."""
    lines = [*_head(plan), "", *_memory(plan)]
    if plan.kv_cache is not None:
        lines += ["", *_cache(plan)]
    if plan.collectives:
        lines += ["", *_collectives(plan)]
    if plan.host_bytes:
        lines.append(f"to the host and back: {plan.host_bytes / GIB:.3f}")
    if plan.roofline and plan.config.optimizer.frozen:
        lines += ["", FROZEN]
    if plan.roofline:
        lines += ["", *_time(plan), "", *_run(plan, price)]
    return "\n".join(lines)


def describe_faster(now: Plan, faster: Candidate) -> str:
    """Returns the line that names settings which take less time than those of the config."""
    assert now.roofline is not None
    assert faster.estimate.roofline is not None
    return (
        f"by arithmetic {' '.join(faster.overrides)} fits too and takes at least "
        f"{faster.estimate.roofline.step_s:.3g} s a step instead of {now.roofline.step_s:.3g}: try "
        f"--sweep remat"
    )


def describe_sweep(found: Sequence[Found], left: int, command: str) -> str:
    """Returns the table of a sweep, best first, and the command that trains the best.

    Args:
      left: the number of settings that were not compiled and may fit.
      command: that trains the config without the settings of the sweep.
    """
    lines = [f"{'fits':5}{'GiB':>7}{'of':>7}{'step s':>9}{'MFU':>7}  settings"]
    for one in found:
        plan = one.plan
        if one.failure:
            lines.append(f"{'?':37}{' '.join(one.overrides)}: {one.failure}")
            continue
        assert plan.roofline is not None
        lines.append(
            f"{'yes' if plan.fits else 'no':5}{plan.peak_bytes / GIB:7.1f}"
            f"{plan.hbm_bytes / GIB:7.1f}{plan.roofline.step_s:9.3g}{plan.roofline.mfu:7.1%}  "
            f"{' '.join(one.overrides)}"
        )
    if found[0].fits:
        lines += ["", f"{command} {shlex.join(found[0].overrides)}"]
    elif left:
        lines += [
            "",
            f"none of the {len(found)} compiled fits; {left} others were not compiled "
            f"(--max-compiles)",
        ]
    else:
        lines += ["", "nothing fits; take more chips, or shorter rows"]
    return "\n".join(lines)


def _head(plan: Plan) -> list[str]:
    axes = " x ".join(f"{axis} {size}" for axis, size in plan.mesh.items() if size > 1) or "1"
    slices = f", {plan.topology.slices} slices" if plan.topology.slices > 1 else ""
    source = "by arithmetic, no compiler is asked"
    if plan.compiled:
        source = f"compiled in {plan.compiled.seconds:.0f} s"
    return [
        f"{plan.step} step on {plan.topology.name}{slices}: {plan.topology.chips} chips, "
        f"mesh {axes}; {source}"
    ]


def _memory(plan: Plan) -> list[str]:
    arguments = plan.arguments
    verdict = "fits" if plan.fits else "DOES NOT FIT"
    lines = [
        "a chip holds, in GiB" if plan.topology.chip.devices_per_chip == 1 else
        "half a chip (a device of jax) holds, in GiB",
        f"  parameters      {arguments.parameters / GIB:8.2f}",
        f"  optimizer       {arguments.optimizer / GIB:8.2f}",
        f"  batch           {arguments.batch / GIB:8.2f}",
        f"  temporaries     {plan.temporaries_bytes / GIB:8.2f}  {TEMPORARIES[plan.step]}".rstrip(),
        f"  peak            {plan.peak_bytes / GIB:8.2f}  of {plan.hbm_bytes / GIB:.2f}: "
        f"{verdict}, {(plan.hbm_bytes - plan.peak_bytes) / GIB:+.2f}",
    ]  # fmt: skip
    if plan.topology.chip.platform == "gpu":
        lines.append(f"  XLA takes {gpu_fraction():.0%} of the card; {GPU_FRACTION} changes that")
    if not plan.fits or not plan.compiled:
        lines.append("  the largest, by arithmetic" if not plan.program else "  the largest")
        lines += [f"    {size / GIB:8.2f}  {name}" for name, size in plan.largest[:SHOWN]]
    return lines


def _cache(plan: Plan) -> list[str]:
    assert plan.kv_cache is not None
    length = plan.config.data.sequence_length
    rows = max(0, plan.hbm_bytes - plan.peak_bytes) // plan.kv_cache
    return [
        f"KV cache in bfloat16: {plan.kv_cache / MIB:.1f} MiB for a row of {length} tokens; "
        f"{rows * batch_shards_of(plan)} rows fit beside the parameters"
    ]


def _collectives(plan: Plan) -> list[str]:
    lines = ["a chip sends in a step, in GiB"]
    for kind, values in sorted(plan.collectives.items(), key=lambda x: -(x[1]["bytes"] or 0)):
        count = "" if values["count"] is None else f"  in {values['count']:,.0f}"
        lines.append(f"  {kind:20}{(values['bytes'] or 0) / GIB:8.3f}{count}")
    if plan.compiled and plan.compiled.unknown_loops:
        lines.append(f"  {plan.compiled.unknown_loops} loops of unknown length count once")
    return lines


def _bound(plan: Plan, words: str) -> str:
    """Returns "at least " or "at most " where the figure is a bound: all is trained."""
    return "" if plan.config.optimizer.frozen else words


def _time(plan: Plan) -> list[str]:
    flops, line = plan.flops, plan.roofline
    assert flops is not None
    assert line is not None
    network = f", network {line.network_s:.3g}" if line.network_s else ""
    return [
        f"FLOPs of a step: useful {flops.useful:.4g}, usual {flops.usual:.4g}, "
        f"executed {flops.executed:.4g}",
        f"  {plan.work.source}",
        f"{_bound(plan, 'at least ')}{line.step_s:.3g} s a step, bound by {line.bound}: "
        f"compute {line.compute_s:.3g}, memory {line.hbm_s:.3g}, links {line.ici_s:.3g}{network}",
        f"MFU {_bound(plan, 'at most ')}{line.mfu:.1%} by the usual count, "
        f"{line.useful_mfu:.1%} useful",
    ]


def _run(plan: Plan, price: float | None) -> list[str]:
    cost = cost_of(plan, price)
    lines = [f"{_bound(plan, 'at most ')}{cost.tokens_per_second_per_chip:,.0f} tokens/s a chip"]
    if cost.hours is None:
        lines.append("hours of the run: unknown without the data; prepare it, or set train.steps")
    else:
        usd = "" if cost.usd is None else f", ${cost.usd:,.2f}"
        hours = f"{_bound(plan, 'at least ')}{cost.hours:,.3g} hours"
        lines.append(f"{hours} for {plan.work.steps:,} steps{usd}")
    if cost.usd_per_million_loss_tokens is not None:
        lines.append(f"${cost.usd_per_million_loss_tokens:,.4f} for a million loss tokens")
    return lines
