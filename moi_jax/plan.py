"""python -m moi_jax.plan --config FILE --topology NAME: memory, time and price before renting."""

import argparse
import json
import shlex
from typing import TYPE_CHECKING

from moi_jax.cli.arguments import MONEY, POSITIVE, add_config
from moi_jax.cli.command import run_command
from moi_jax.common.errors import UserError

if TYPE_CHECKING:
    from moi_jax.accounting.planner import Planner
    from moi_jax.accounting.sweep import Found

COMPILES = 6


def main() -> int:
    args = _arguments()

    from moi_jax.accounting.topology import parse_topology, prepare_environment
    from moi_jax.common.log import show_logs
    from moi_jax.config.load import load_config

    config = load_config(args.config, args.overrides)
    topology = parse_topology(args.topology, args.slices)
    if args.sweep and args.step != "train":
        raise UserError(f"--sweep searches settings of training; leave out --step {args.step}")
    if args.price_list and (args.sweep or args.step != "train"):
        raise UserError("--price-list plans the train step; leave out --sweep and --step")
    prepare_environment(topology.compiles and args.step != "generate" and not args.price_list)
    show_logs(stderr=True)  # standard output is for the plan

    from moi_jax.accounting.planner import Planner
    from moi_jax.accounting.sweep import parse_dimensions

    names = parse_dimensions(args.sweep) if args.sweep else ()
    planner = Planner(config, topology, args.step)
    if args.price_list:
        _show_price_list(planner, args.json)
    elif names:
        train = ["python", "-m", "moi_jax.train", "--config", args.config, *args.overrides]
        found, left = planner.sweep(names, args.max_compiles)
        _show_sweep(found, left, shlex.join(train), args.price, args.json)
    else:
        _show_plan(planner, args.price, args.json)
    return 0


def _show_plan(planner: "Planner", price: float | None, as_json: bool) -> None:
    from moi_jax.accounting.costs import plan_json
    from moi_jax.accounting.show import describe_faster, describe_plan

    plan = planner.plan()
    if as_json:
        print(json.dumps(plan_json(plan, price), indent=2))
        return
    print(describe_plan(plan, price))
    if plan.step == "train" and plan.fits and (found := planner.faster_remat(plan)):
        print(f"\n{describe_faster(*found)}")


def _show_price_list(planner: "Planner", as_json: bool) -> None:
    from moi_jax.accounting.price_list import describe_offers, offers_json, price_list

    offers = price_list(planner.config, planner.model, planner.topology, planner.work)
    print(json.dumps(offers_json(offers), indent=2) if as_json else describe_offers(offers))


def _show_sweep(
    found: "list[Found]", left: int, command: str, price: float | None, as_json: bool
) -> None:
    from moi_jax.accounting.costs import plan_json
    from moi_jax.accounting.show import describe_plan, describe_sweep

    if as_json:
        plans = [
            {"overrides": one.overrides, "failure": one.failure}
            if one.failure
            else {"overrides": one.overrides, **plan_json(one.plan, price)}
            for one in found
        ]
        print(json.dumps({"command": command, "not_compiled": left, "sweep": plans}, indent=2))
        return
    if found[0].fits:
        print(describe_plan(found[0].plan, price), end="\n\n")
    print(describe_sweep(found, left, command))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m moi_jax.plan",
        description="Tells what a config needs on chips that you do not have: memory, FLOPs, "
        "collectives, the least time of a step, hours and price of the run. For a TPU it compiles "
        "the real train step (minutes for a 7B model); for GPUs it is arithmetic.",
        epilog="See docs/plan.md. Exit status: 0 done, 2 your mistake (one line says which), 1 a "
        "fault of ours.",
    )
    add_config(parser)
    parser.add_argument(
        "--topology", required=True, metavar="NAME", help="v5p:2x2x2, v5e:4x8, h100:8 and so on"
    )
    parser.add_argument(
        "--slices",
        type=POSITIVE,
        default=1,
        metavar="N",
        help="TPU slices, or GPU nodes, connected by the network (default: 1)",
    )
    parser.add_argument(
        "--step",
        choices=("train", "eval", "generate"),
        default="train",
        help="train, the held-out eval, or generate (arithmetic) (default: train)",
    )
    parser.add_argument(
        "--sweep",
        metavar="NAMES",
        help="search settings that fit: some of remat,mesh,rows,attention",
    )
    parser.add_argument(
        "--max-compiles",
        type=POSITIVE,
        default=COMPILES,
        metavar="N",
        help=f"with --sweep: how many settings are compiled at most (default: {COMPILES})",
    )
    parser.add_argument(
        "--price-list",
        action="store_true",
        help="full fine-tuning beside LoRA, by arithmetic: memory, time, the smallest that fits",
    )
    parser.add_argument("--price", type=MONEY, metavar="USD", help="dollars for a chip and an hour")
    parser.add_argument(
        "--json", action="store_true", help="only the plan on standard output, as JSON"
    )
    return parser.parse_intermixed_args()


if __name__ == "__main__":
    run_command(main)
