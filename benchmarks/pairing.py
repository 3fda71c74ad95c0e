"""How random the pairs are after filling rows: python benchmarks/pairing.py CONFIG [KEY=VALUE]

Plans the first epoch of a balanced config for twenty seeds and prints

* the fill, and the share of instructions that moved to another chunk to fill rows;
* the total variation distance from independence of the lengths of two partners in a chunk, in
  fifths of their domain (the largest over pairs of domains), and the same for the chunks as
  drawn, which is pure chance;
* the correlation between the length of an instruction and the place of its chunk among those of
  its row, counted from the middle. (The tokens before the chunk would not do: a long chunk leaves
  less room for others before it, in whatever order they stand.)
"""

import argparse
from itertools import combinations

import numpy as np

from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.cli.command import run_command
from moi_jax.config.load import load_config
from moi_jax.data.dataset import open_dataset
from moi_jax.data.planning import mixture
from moi_jax.data.planning.epoch import EpochPlan, plan_epoch

SEEDS = 20
FIFTHS = (0.2, 0.4, 0.6, 0.8)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    config = load_config(args.config, [*args.overrides, "data.order=config"])
    experiment = open_experiment(config)
    dataset = open_dataset(experiment.config, experiment.tokenizer)
    corpus, data = dataset.corpus, dataset.config.data
    width = len(corpus.names)
    planned, drawn, fills, moved, places = [], [], [], [], []
    for seed in range(SEEDS):
        plan = plan_epoch(corpus, data, seed, 0)
        planned.append(corpus.lengths[plan.instructions.reshape(-1, width)])
        drawn.append(corpus.lengths[mixture.draw_groups(corpus, data, seed, 0)])
        fills.append(plan.fill)
        moved.append(plan.moved_instructions / len(plan.instructions))
        places.append(place_correlations(plan, planned[-1]))
    print(f"{data.sequence_length} tokens a row, {SEEDS} seeds, {len(planned[0]):,} chunks each")
    print(f"fill {np.mean(fills):.2%} ({min(fills):.2%} to {max(fills):.2%})")
    print(f"changed chunk: {np.mean(moved):.2%} of the instructions")
    print(f"partners: distance {distance(planned):.4f}, as drawn {distance(drawn):.4f}")
    for name, correlation in zip(corpus.names, np.mean(places, axis=0), strict=True):
        print(f"place in the row against length, {name}: correlation {correlation:+.3f}")


def distance(lengths: list[np.ndarray]) -> float:
    """Returns the largest total variation distance from independence over pairs of columns."""
    table = np.concatenate(lengths)
    fifths = [np.searchsorted(np.quantile(c, FIFTHS), c, side="right") for c in table.T]
    worst = 0.0
    for a, b in combinations(range(table.shape[1]), 2):
        joint = np.bincount(fifths[a] * 5 + fifths[b], minlength=25).reshape(5, 5) / len(table)
        independent = joint.sum(1, keepdims=True) * joint.sum(0, keepdims=True)
        worst = max(worst, float(np.abs(joint - independent).sum() / 2))
    return worst


def place_correlations(plan: EpochPlan, lengths: np.ndarray) -> list[float]:
    """Returns by column the correlation of lengths with the place of the chunk in its row."""
    chunks = np.diff(plan.row_starts)
    places = np.arange(len(lengths)) - np.repeat(plan.row_starts[:-1], chunks)
    from_middle = places - np.repeat((chunks - 1) / 2, chunks)
    return [float(np.corrcoef(from_middle, column)[0, 1]) for column in lengths.T]


if __name__ == "__main__":
    run_command(main)
