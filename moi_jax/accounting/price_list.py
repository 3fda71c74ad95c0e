"""The price list of a config: full fine-tuning beside LoRA, by arithmetic, and what each needs."""

import dataclasses
from collections.abc import Iterator
from typing import Any

from moi_jax.accounting.plan import Plan, make_plan
from moi_jax.accounting.topology import Topology, parse_topology
from moi_jax.accounting.work import Work, full_rows
from moi_jax.common.errors import UserError
from moi_jax.config import Config, LoRA
from moi_jax.config.load import make_config
from moi_jax.models.config import ModelConfig
from moi_jax.models.lora import adapted
from moi_jax.parallel.chips import GIB

RANK = 16  # of the LoRA row, where the config has no adapters
# Slices that are sold, from the smallest; of a GPU, the cards of a node.
FLAT = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
DEEP = ("2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8")
SHAPES = {"v5e": FLAT, "v6e": FLAT, "v4": DEEP, "v5p": DEEP, "tpu7x": DEEP}
NODE = ("1", "2", "4", "8")
SMALLEST_GPU = "h100"


@dataclasses.dataclass(frozen=True)
class Offer:
    """One way to train the model.

    Attributes:
      method: full, or LoRA or QLoRA with its rank.
      plan: on the topology that was asked for.
      smallest: chip -> the smallest topology that fits, None where none in the list does. The
        parameters are split over all chips there, and each has one row at a time.
    """

    method: str
    plan: Plan
    smallest: dict[str, str | None]


def price_list(config: Config, model: ModelConfig, topology: Topology, work: Work) -> list[Offer]:
    """Plans full fine-tuning and LoRA on a topology, by arithmetic; and QLoRA, if the config is so.

    Args:
      model: of the config, with or without adapters.

    Raises:
      UserError: the config does not fit the topology.
    """
    chips = dict.fromkeys((topology.chip.name, SMALLEST_GPU))
    offers = []
    own_lora = config.lora if config.lora.rank else LoRA(rank=RANK)
    sections = [LoRA(), own_lora]
    if own_lora.quantization:
        sections.insert(1, own_lora.model_copy(update={"base_dtype": "auto"}))
    for lora in sections:
        changed = _with(config, lora=lora.model_dump(mode="json"))
        own = adapted(model.base, lora)
        offers.append(
            Offer(
                _method(lora),
                make_plan(changed, own, topology, work),
                {chip: _smallest(changed, own, chip) for chip in chips},
            )
        )
    return offers


def _method(lora: LoRA) -> str:
    if not lora.rank:
        return "full"
    kind = f"QLoRA {lora.base_dtype}" if lora.quantization else "LoRA"
    return f"{kind}, rank {lora.rank}"


def _smallest(config: Config, model: ModelConfig, chip: str) -> str | None:
    for topology in _topologies(chip):
        rows = topology.devices
        alone = _with(
            config,
            mesh={"data": 1, "fsdp": -1, "tensor": 1, "context": 1},
            train={"microbatch_rows": rows, "global_batch_rows": rows},
        )
        try:
            if make_plan(alone, model, topology, full_rows(alone, "one row a chip")).fits:
                return topology.name
        except UserError:  # such as an attention that the chip does not have
            continue
    return None


def _topologies(chip: str) -> Iterator[Topology]:
    for shape in SHAPES.get(chip, NODE):
        yield parse_topology(f"{chip}:{shape}", 1)


def _with(config: Config, **sections: dict[str, Any]) -> Config:
    values = config.model_dump(mode="json")
    for name, keys in sections.items():
        values[name] |= keys
    if not values["lora"]["rank"]:
        values["checkpoint"]["save_base"] = False
    else:
        values["model"]["param_dtype"] = "float32"
    return make_config(values)


def describe_offers(offers: list[Offer]) -> str:
    """Returns the price list as a table; sizes are GiB on a chip."""
    first = offers[0].plan
    columns = ["method", "params", "optimizer", "temporaries", "peak", "fits", "FLOPs", "step s"]
    rows = [[*columns, *(f"smallest {chip}" for chip in offers[0].smallest)]]
    for offer in offers:
        plan = offer.plan
        assert plan.flops is not None
        assert plan.roofline is not None
        assert first.flops is not None
        sizes = (
            plan.arguments.parameters, plan.arguments.optimizer, plan.temporaries_bytes,
            plan.peak_bytes,
        )  # fmt: skip
        rows.append(
            [
                offer.method,
                *(f"{size / GIB:.2f}" for size in sizes),
                "yes" if plan.fits else "no",
                f"{plan.flops.executed / first.flops.executed:.0%}",
                f"{plan.roofline.step_s:.3g}",
                *(name or "none" for name in offer.smallest.values()),
            ]
        )
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    table = ["  ".join(f"{cell:>{w}}" for cell, w in zip(row, widths, strict=True)) for row in rows]
    return "\n".join(
        [
            f"price list on {first.topology.name}, {first.hbm_bytes / GIB:.2f} GiB a chip; by "
            f"arithmetic, in GiB on a chip",
            *table,
            "the smallest that fits: parameters split over all its chips, one row a chip",
        ]
    )


def offers_json(offers: list[Offer]) -> list[dict[str, Any]]:
    """Returns the price list as JSON; docs/plan.md tells what each key means."""
    return [
        {
            "method": offer.method,
            "parameters_bytes": offer.plan.arguments.parameters,
            "optimizer_bytes": offer.plan.arguments.optimizer,
            "temporaries_bytes": offer.plan.temporaries_bytes,
            "peak_bytes": offer.plan.peak_bytes,
            "hbm_bytes": offer.plan.hbm_bytes,
            "fits": offer.plan.fits,
            "flops": offer.plan.flops.executed if offer.plan.flops else None,
            "step_s": offer.plan.roofline.step_s if offer.plan.roofline else None,
            "smallest": offer.smallest,
        }
        for offer in offers
    ]
