"""A train step on 8 to 256 chips of a TPU v5p, one row a chip: the plan's figures and a picture.

    pip install '.[plan]'
    python benchmarks/growth.py docs/growth.json --plan
    python benchmarks/growth.py docs/growth.json --plot docs/growth.svg

No TPU is needed. Three lines of `--plan` are compiled, which takes minutes for each, and kept for
the next time; the others are arithmetic. The model is Qwen2.5-7B with rows of
4,096 tokens, `remat: full` and float32 state. The rows grow with the chips, so that every chip has
the same work. It is compiled without the flags of parallel/xla_flags.py, in half the time.
"""

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from moi_jax.accounting.topology import parse_topology, prepare_environment

ROOT = Path(__file__).resolve().parents[1]
GIB, MIB = 1 << 30, 1 << 20
ROW = 4096
SHOWN = 0.01  # MiB of a kind
COLOURS = {"fsdp": "#0072b2", "hybrid": "#d55e00", "slices": "#009e73"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh on a topology.

    Attributes:
      compiled: whether the compiler is asked; else the figures are arithmetic.
      kind: fsdp over all chips; hybrid, fsdp within groups of a slice and data across them; slices,
        fsdp within a slice and data across slices.
    """

    kind: str
    topology: str
    slices: int
    data: int
    fsdp: int
    compiled: bool = False

    @property
    def chips(self) -> int:
        return self.data * self.fsdp


CASES = (
    Case("fsdp", "v5p:2x2x2", 1, 1, 8, compiled=True),
    Case("fsdp", "v5p:2x4x4", 1, 1, 32),
    Case("fsdp", "v5p:4x4x8", 1, 1, 128),
    Case("fsdp", "v5p:4x8x8", 1, 1, 256, compiled=True),
    Case("hybrid", "v5p:2x4x4", 1, 4, 8),
    Case("hybrid", "v5p:4x4x8", 1, 4, 32),
    Case("hybrid", "v5p:4x8x8", 1, 8, 32, compiled=True),
    Case("slices", "v5p:2x4x4", 8, 8, 32),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("json", type=Path, help="the file of the figures")
    parser.add_argument("--plan", action="store_true", help="make the figures")
    parser.add_argument("--cache", default="~/.cache/moi_jax", help="where compilations are kept")
    parser.add_argument("--plot", type=Path, metavar="PICTURE", help="draw them")
    args = parser.parse_args()
    if args.plan:
        os.environ["MOI_JAX_XLA_FLAGS"] = "off"
        prepare_environment(compiles=True)
        records = [measure(case, args.cache) for case in CASES]
        args.json.write_text(json.dumps(records, indent=1) + "\n", encoding="utf-8")
    records = json.loads(args.json.read_text(encoding="utf-8"))
    print(table(records))
    if args.plot:
        plot(records, args.plot)


def measure(case: Case, cache: str) -> dict[str, Any]:
    """Returns the case and its plan, as `plan --json` has it."""
    from moi_jax.accounting.costs import plan_json
    from moi_jax.accounting.planner import Planner
    from moi_jax.accounting.work import full_rows
    from moi_jax.config.load import load_config

    settings = [
        "model.preset=qwen2.5-7b",
        f"data.cache_dir={cache}",
        f"mesh.data={case.data}",
        f"mesh.fsdp={case.fsdp}",
        f"train.global_batch_rows={case.chips}",
        f"train.microbatch_rows={case.chips}",
    ]
    config = load_config(ROOT / "configs" / "qwen_7b_moi.yaml", settings)
    planner = Planner(config, parse_topology(case.topology, case.slices), "train")
    planner.work = full_rows(config, "the same on every machine")
    planner.compiles = case.compiled
    return {"kind": case.kind, **plan_json(planner.plan())}


def table(records: list[dict[str, Any]]) -> str:
    """Returns the table of docs/benchmarks.md."""
    lines = [
        "| chips | mesh | arguments | temporaries | peak | sent for a token | by kind | compute | "
        "links | network |",
        f"|{' --- |' * 10}",
    ]
    for record in records:
        memory, line = record["per_chip"], record["roofline"]
        kinds = sorted(sent(record).items(), key=lambda item: -item[1])
        by_kind = ", ".join(f"{kind} {size:.2f}" for kind, size in kinds if size >= SHOWN)
        network = f"{line['network_s']:.3f}" if record["slices"] > 1 else ""
        lines.append(
            f"| {record['chips']} | {mesh_name(record)} "
            f"| {memory['arguments_bytes'] / GIB:.2f} | {memory['temporaries_bytes'] / GIB:.2f} "
            f"| {memory['peak_bytes'] / GIB:.2f} | {sum(sent(record).values()):.2f} | {by_kind} "
            f"| {line['compute_s']:.3f} | {line['ici_s']:.3f} | {network} |"
        )
    return "\n".join(lines)


def mesh_name(record: dict[str, Any]) -> str:
    """Returns such as fsdp 8, data 8 x fsdp 32, or 8 slices: data 8 x fsdp 32."""
    mesh = record["mesh"]
    name = f"fsdp {mesh['fsdp']}"
    name = f"data {mesh['data']} x {name}" if mesh["data"] > 1 else name
    name = f"{record['slices']} slices: {name}" if record["slices"] > 1 else name
    return name if record["source"] == "compiled" else f"{name}, by arithmetic"


def sent(record: dict[str, Any]) -> dict[str, float]:
    """Returns the MiB that a chip sends for each of its tokens, by kind of collective."""
    return {kind: values["bytes"] / MIB / ROW for kind, values in record["collectives"].items()}


def plot(records: list[dict[str, Any]], picture: Path) -> None:
    """Draws memory and traffic of a chip over the number of chips; arithmetic has hollow points."""
    import matplotlib.pyplot as plt

    plt.rcParams.update({"svg.hashsalt": "moi_jax", "svg.fonttype": "none", "font.size": 9})
    figure, (memory, traffic) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    for kind, colour in COLOURS.items():
        chosen = [record for record in records if record["kind"] == kind]
        chips = [record["chips"] for record in chosen]
        peaks = [record["per_chip"]["peak_bytes"] / GIB for record in chosen]
        totals = [sum(sent(record).values()) for record in chosen]
        for axis, values in ((memory, peaks), (traffic, totals)):
            axis.plot(chips, values, color=colour, label=kind, linewidth=1)
            for record, value in zip(chosen, values, strict=True):
                filled = colour if record["source"] == "compiled" else "white"
                axis.plot(record["chips"], value, "o", color=colour, markerfacecolor=filled)
    memory.set(title="memory at the peak", ylabel="GiB a chip", ylim=0)
    traffic.set(title="sent in collectives", ylabel="MiB a chip for each of its tokens", ylim=0)
    for axis in (memory, traffic):
        axis.set_xscale("log", base=2)
        axis.set(xlabel="chips", xticks=[8, 32, 128, 256], xticklabels=["8", "32", "128", "256"])
        axis.spines[["top", "right"]].set_visible(False)
    memory.legend(frameon=False)
    figure.savefig(picture, metadata={"Date": None})
    # matplotlib leaves spaces at the ends of lines.
    lines = picture.read_text(encoding="utf-8").splitlines()
    picture.write_text("".join(f"{line.rstrip()}\n" for line in lines), encoding="utf-8")


if __name__ == "__main__":
    main()
