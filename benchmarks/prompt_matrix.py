"""The prompt matrix of moi against packing: python benchmarks/prompt_matrix.py RUNS OUT.png

Trains configs/quickstart.yaml with both strategies and three seeds, at equal loss tokens. Measures
the held-out losses of each model under all prompts. Prints a Markdown table and draws the means
over the seeds. Then prints the loss of the same conversations under their own prompt when each
follows a held-out chat in its chunk, as in MoI training. Runs that are already finished in the
directory RUNS are not trained again.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.checkpoints.opener import OpenCheckpoint, open_checkpoint
from moi_jax.common.log import show_logs
from moi_jax.config.load import load_config
from moi_jax.data.dataset import Dataset, open_dataset
from moi_jax.data.loader import PackedInstruction, assemble
from moi_jax.evaluation.options import HeldOutOptions
from moi_jax.evaluation.prompt_matrix.gaps import interval, resampled_means, summarize
from moi_jax.evaluation.prompt_matrix.matrix import ItemSums
from moi_jax.evaluation.prompt_matrix.measure import measure_held_out
from moi_jax.evaluation.prompt_matrix.prompts import DEFAULT, OWN
from moi_jax.evaluation.prompt_matrix.report import draw_matrix, interval_text
from moi_jax.evaluation.row_sums import make_row_sums

ROOT = Path(__file__).parent.parent
STRATEGIES = ("moi", "packing")
SEEDS = (0, 1, 2)


def main() -> None:
    show_logs(stderr=True)
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("runs", type=Path)
    parser.add_argument("picture", type=Path)
    parser.add_argument("--loss-tokens", type=int, default=100_000)
    args = parser.parse_args()
    measured = {
        (strategy, seed): measure(args.runs.resolve(), strategy, seed, args.loss_tokens)
        for strategy in STRATEGIES
        for seed in SEEDS
    }
    layout = next(iter(measured.values()))[0]
    sums = {name: [item_sums(layout, *one) for one in of(measured, name)] for name in STRATEGIES}
    domain_of = np.repeat(
        np.arange(len(layout["domains"])), [d["items"] for d in layout["domains"].values()]
    )
    print_table(layout, sums, domain_of, args.loss_tokens)
    means = {}
    for name, of_seeds in sums.items():
        mean = ItemSums(
            np.mean([one.nll for one in of_seeds], axis=0),
            of_seeds[0].loss_tokens,
            np.mean([one.correct for one in of_seeds], axis=0),
        )
        means[f"{name}, mean of {len(SEEDS)} seeds"] = summarize(
            mean, domain_of, list(layout["domains"]), layout["columns"]
        )
    draw_matrix(means, layout["columns"], args.picture)
    print_after_chat(args.runs.resolve(), args.loss_tokens)


def measure(runs: Path, strategy: str, seed: int, loss_tokens: int) -> tuple[dict, list[dict]]:
    """Reads held_out.json and held_out_items.jsonl of one run; trains the run if it is new."""
    run = run_of(runs, strategy, seed, loss_tokens)
    overrides = [
        f"data.strategy={strategy}",
        f"train.seed={seed}",
        "train.steps=null",
        f"train.loss_tokens={loss_tokens}",
        "train.sample_prompts=[]",
        f"data.cache_dir={runs / 'cache'}",
        f"logging.run_dir={run}",
    ]
    out = run / "held_out"
    if not (out / "held_out.json").exists():
        config = ROOT / "configs" / "quickstart.yaml"
        command = [sys.executable, "-m", "moi_jax.train", "--config", str(config), *overrides]
        subprocess.run(command, cwd=ROOT, check=True, stdout=sys.stderr)
        measure_held_out(open_checkpoint(run, devices=jax.devices()), HeldOutOptions(), out)
    lines = (out / "held_out_items.jsonl").read_text(encoding="utf-8").splitlines()
    return json.loads((out / "held_out.json").read_text(encoding="utf-8")), list(
        map(json.loads, lines)
    )


def run_of(runs: Path, strategy: str, seed: int, loss_tokens: int) -> Path:
    return runs / f"{strategy}_{loss_tokens}_{seed}"


def print_after_chat(runs: Path, loss_tokens: int) -> None:
    """Prints in Markdown each domain's loss, except chat's: alone in a row, and after a chat."""
    print("\n| domain | strategy | own loss alone | after a chat in its chunk |\n|" + " --- |" * 4)
    found = {
        strategy: np.array([after_chat(run_of(runs, strategy, s, loss_tokens)) for s in SEEDS])
        for strategy in STRATEGIES
    }
    for number, domain in enumerate(("code", "maths", "tools")):
        for strategy, losses in found.items():  # [seeds, domains, (alone, after a chat)]
            alone, after = losses[:, number].T
            print(f"| {domain} | {strategy} | {spread(alone)} | {spread(after)} |")


def after_chat(run: Path) -> list[tuple[float, float]]:
    """Returns each domain's loss under its own prompt, except chat's: alone, and after a chat."""
    opened = open_checkpoint(run, devices=jax.devices())
    experiment = open_experiment(load_config(run / "config.yaml"), run)
    dataset = open_dataset(experiment.config, experiment.tokenizer)
    row_sums = make_row_sums(opened.bind, opened.mesh)
    chats, *others = (
        list(cache.read(selection.held_out))
        for cache, selection in zip(dataset.caches, dataset.selections, strict=True)
    )
    losses = []
    for domain, items in enumerate(others, 1):
        alone = [[[PackedInstruction(item, domain, 1.0)]] for item in items]
        # Weight 0: the chat is read, and no label of it counts.
        before = [PackedInstruction(chats[n % len(chats)], 0, 0.0) for n in range(len(items))]
        after = [[[chat, *row[0]]] for chat, row in zip(before, alone, strict=True)]
        losses.append(tuple(loss(rows, row_sums, opened, dataset) for rows in (alone, after)))
    return losses


def loss(rows: list, row_sums: Callable, opened: OpenCheckpoint, dataset: Dataset) -> float:
    width = max(sum(len(placed.instruction.tokens) for placed in row[0]) for row in rows)
    pad = opened.tokenizer.template.pad
    batch = assemble(rows, width, pad, "chunk", dataset.config.loss.targets)
    sums = row_sums(opened.parameters, batch)
    return float(np.sum(sums.nll) / np.sum(sums.loss_tokens))


def of(measured: dict, strategy: str) -> list[tuple[dict, list[dict]]]:
    return [one for (name, _), one in measured.items() if name == strategy]


def item_sums(layout: dict, results: dict, lines: list[dict]) -> ItemSums:
    """Returns the trained model's sums in the order of the items, which all runs share."""
    assert results["columns"] == layout["columns"]
    assert results["domains"] == layout["domains"]
    trained = [line for line in lines if line["model"] == "trained"]
    items = list(dict.fromkeys((line["domain"], line["item"]) for line in trained))
    shape = len(items), len(layout["columns"])
    nll, tokens, correct = np.full(shape, np.nan), np.zeros(shape), np.zeros(shape)
    for line in trained:
        place = items.index((line["domain"], line["item"])), layout["columns"].index(line["prompt"])
        nll[place], tokens[place] = line["nll"], line["loss_tokens"]
        correct[place] = line["correct"]
    return ItemSums(nll, tokens, correct)


def print_table(
    layout: dict, sums: dict[str, list[ItemSums]], domain_of: np.ndarray, loss_tokens: int
) -> None:
    """Prints in Markdown own and default loss, and the gap, with interval over items and range."""
    columns = layout["columns"]
    own, default = columns.index(OWN), columns.index(DEFAULT)
    print(f"{loss_tokens:,} loss tokens, seeds {', '.join(map(str, SEEDS))}\n")
    print(
        "| domain (items) | strategy | own loss, mean (least to most over seeds) | default loss | "
        "gap, mean (over seeds) | its 95 % interval (over items) |\n|" + " --- |" * 6
    )
    for number, (domain, told) in enumerate(layout["domains"].items()):
        here = domain_of == number
        tokens = sums[STRATEGIES[0]][0].loss_tokens[here, own]
        same = told["prompts"][OWN] == told["prompts"][DEFAULT]
        gaps = []  # of each item the mean over the seeds, in nats
        for strategy, of_seeds in sums.items():
            nll = np.array([one.nll[here] for one in of_seeds])  # [seeds, items, columns]
            losses = nll.sum(axis=1) / tokens.sum()
            gap = losses[:, default] - losses[:, own]
            gaps.append((nll[:, :, default] - nll[:, :, own]).mean(axis=0))
            figures = f"{spread(gap, '+')} | {interval_of(gaps[-1], tokens)}"
            print(
                f"| {domain} ({told['items']}) | {strategy} | {spread(losses[:, own])} | "
                f"{losses[:, default].mean():.3f} | {'own is default | ' if same else figures} |"
            )
        if not same:
            between = gaps[0] - gaps[1]
            print(
                f"| {domain} | {' - '.join(STRATEGIES)} | | | "
                f"{between.sum() / tokens.sum():+.3f} | {interval_of(between, tokens)} |"
            )


def interval_of(values: np.ndarray, tokens: np.ndarray) -> str:
    return interval_text(interval(resampled_means(values[:, None], tokens))[0])


def spread(values: np.ndarray, sign: str = "") -> str:
    low, high = values.min(), values.max()
    return f"{values.mean():{sign}.3f} ({low:{sign}.3f} to {high:{sign}.3f})"


if __name__ == "__main__":
    main()
