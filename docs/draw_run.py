"""Draws the curves of a run: python docs/draw_run.py RUN_DIR OUT.svg"""

import json
import sys
from pathlib import Path

import matplotlib.pyplot as plt

COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]  # colour-blind readers can tell them apart


def main(run_dir: Path, out: Path) -> None:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    domains = list(json.loads((run_dir / "mixture.json").read_text(encoding="utf-8"))["domains"])
    plt.rcParams.update({"svg.hashsalt": "moi_jax", "svg.fonttype": "none", "font.size": 9})
    figure, (training, held_out) = plt.subplots(
        1, 2, figsize=(9, 3.2), sharey=True, layout="constrained"
    )
    for domain, colour in zip(domains, COLOURS, strict=True):
        for axis, key in ((training, f"domain/{domain}/loss"), (held_out, f"eval/{domain}/loss")):
            points = [(r["step"], r[key]) for r in records if key in r]
            axis.plot(*zip(*points, strict=True), color=colour, marker=".", label=domain)
    training.set(title="training", xlabel="step", ylabel="loss (nats a token)")
    held_out.set(title="held out", xlabel="step")
    training.legend(frameon=False)
    for axis in (training, held_out):
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(out, metadata={"Date": None})


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
