"""Draws the picture of the README, a real MoI row of the quickstart: python docs/draw_row.py"""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.colors import ListedColormap

import moi_jax

HERE = Path(__file__).parent
COLOURS = ["#0072b2", "#d55e00", "#009e73", "#cc79a7"]  # told apart by colour-blind readers too
NAMES = ["chat", "code", "maths", "tools"]


def main() -> None:
    batch = next(moi_jax.batches(HERE.parent / "configs" / "quickstart.yaml"))
    # The row with the most padding shows it best.
    row = int(np.argmax((batch.segment_ids == 0).sum(axis=1)))
    domains, segments = batch.domain_ids[row], batch.segment_ids[row]
    labels = batch.loss_weights[row] > 0
    length = len(domains)

    plt.rcParams.update({"svg.hashsalt": "moi_jax", "svg.fonttype": "none", "font.size": 9})
    figure, (lanes, mask) = plt.subplots(
        1, 2, figsize=(9, 3.4), width_ratios=[1.9, 1], layout="constrained"
    )
    palette = ListedColormap(["#ffffff", *COLOURS])
    lanes.imshow(
        np.repeat((domains + 1)[None], 2, axis=0), aspect="auto", cmap=palette, vmin=0, vmax=4,
        extent=(0, length, 2.0, 2.8), interpolation="nearest",
    )  # fmt: skip
    chunk_palette = ListedColormap(["#ffffff", "#bbbbbb", "#888888"])
    lanes.imshow(
        segments[None], aspect="auto", cmap=chunk_palette, vmin=0, vmax=2,
        extent=(0, length, 1.0, 1.8), interpolation="nearest",
    )  # fmt: skip
    lanes.imshow(
        labels[None], aspect="auto", cmap=ListedColormap(["#ffffff", "#222222"]),
        extent=(0, length, 0.0, 0.8), interpolation="nearest",
    )  # fmt: skip
    lanes.set(
        xlim=(0, length), ylim=(-0.1, 3.2), yticks=[0.4, 1.4, 2.4], xlabel="token of the row",
        yticklabels=["loss", "chunk", "domain"],
    )  # fmt: skip
    lanes.spines[["top", "right"]].set_visible(False)
    handles = [plt.Rectangle((0, 0), 1, 1, color=colour) for colour in COLOURS]
    lanes.legend(handles, NAMES, ncols=4, loc="upper left", frameon=False)
    lanes.set_title("A row: whole chunks, one conversation of each domain in each")

    same = (segments[:, None] == segments[None, :]) & (segments[:, None] > 0)
    visible = np.tril(same) * (domains[None, :] + 1)
    mask.imshow(visible[::2, ::2], cmap=palette, vmin=0, vmax=4, extent=(0, length, length, 0))
    mask.set(xlabel="token attended to", ylabel="token", title="Attention: inside a chunk")
    figure.savefig(HERE / "row.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
