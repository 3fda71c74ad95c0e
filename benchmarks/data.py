"""Packing and preparing, compared: python benchmarks/data.py --root DIR --tokenizer DIR

Packing: fill and instructions/s on the lengths of the public sets in configs/public_sets.yaml.
Ours places whole balanced chunks. The peers get the instructions of the same epoch in random order
and place each instruction separately: TRL's pack_dataset (bfd), grain's BestFitPackIterDataset
(which also copies the tokens), seqpacker. The speed is also measured on about a million
instructions: the same lengths, repeated.

Preparing: conversations/s on GSM8K's rows, from JSONL to the cache on disk. The peer is the
tokenise step of TRL's SFTTrainer with assistant_only_loss; its reading of the JSONL is not counted.

All contenders take turns in one process. Install them with `pip install -e ".[test,peers]"`.
"""

# The peers are imported inside functions: the processes that prepare import this file anew.
import argparse
import itertools
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax.cli.command import run_command
from moi_jax.common.errors import UserError
from moi_jax.config import Data
from moi_jax.config.load import load_config, make_config
from moi_jax.data.cache.prepare import prepare
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.epoch import plan_epoch
from moi_jax.text.byte_level import QWEN_PATTERN
from moi_jax.text.tokenizer import QWEN_SPECIALS, load_tokenizer

PUBLIC_SETS = Path(__file__).parent.parent / "configs" / "public_sets.yaml"
PACKAGES = ("trl", "datasets", "transformers", "tokenizers", "grain", "seqpacker")
OURS, TRL, TRL_BEST = "moi_jax", "TRL bfd", "TRL bfd, one batch"
TOKENISE = "TRL apply_chat_template"
GRAIN_BINS = 128  # grain has no default

FILL_BARS = {2048: 0.99, 4096: 0.995, 8192: 0.995}
BEST_CASE_BAR = 0.003  # how far under the fill of TRL's best case
PLANNING_BAR, PREPARE_BAR = 5, 3  # times the speed of TRL

Contenders = dict[str, Callable[[], int]]
Figures = dict[str, dict[str, Any]]


def take_turns(contenders: Contenders, items: int, turns: int) -> Figures:
    """Returns each contender's result and items/s (median, lowest, highest); ours is first.

    The contenders take turns, so that a busy phase of the machine affects all of them.
    """
    figures: Figures = {name: {"seconds": []} for name in contenders}
    for _ in range(turns):
        for name, work in contenders.items():
            start = time.perf_counter()
            figures[name]["result"] = work()
            figures[name]["seconds"].append(time.perf_counter() - start)
    for figure in figures.values():
        rates = items / np.array(figure["seconds"])
        figure["rate"] = [float(of(rates)) for of in (np.median, np.min, np.max)]
        figure["ours_over_theirs"] = figures[OURS]["rate"][0] / figure["rate"][0]
    return figures


def public_corpus(root: Path, tokenizer: Path, cache_dir: str, row: int) -> tuple[Corpus, Data]:
    """Returns the lengths of the public sets for rows of this length, and their data section."""
    from moi_jax.checkpoints.experiment import open_experiment
    from moi_jax.data.dataset import open_dataset

    overrides = [
        "model.preset=qwen-7b", "model.allow_longer=true", f"tokenizer.path={tokenizer}",
        f"data.root={root}", f"data.cache_dir={cache_dir}", "data.strategy=moi",
        f"data.sequence_length={row}", "data.max_instruction_tokens=null",
    ]  # fmt: skip
    config = load_config(PUBLIC_SETS, overrides)
    experiment = open_experiment(config)
    dataset = open_dataset(experiment.config, experiment.tokenizer)
    return dataset.corpus, dataset.config.data


def tiled(corpus: Corpus, instructions: int) -> Corpus:
    """Repeats every domain until an epoch holds about this many instructions."""
    times = max(1, round(instructions / (len(corpus.counts) * max(corpus.counts))))
    lengths, loss_lengths = (
        [np.tile(domain, times) for domain in np.split(values, corpus.offsets[1:-1])]
        for values in (corpus.lengths, corpus.loss_lengths)
    )
    return Corpus.of(corpus.names, lengths, loss_lengths)


def peer_packers(lengths: np.ndarray, row: int, with_grain: bool) -> Contenders:
    """Returns the peers as functions of int64[M] lengths that return their number of rows."""
    import datasets
    import grain
    import pyarrow
    import seqpacker
    import trl

    # One column, a byte a token, nothing written: TRL's time is that of its packing.
    tokens = np.zeros(lengths.sum(), np.uint8)
    offsets = np.append(0, np.cumsum(lengths)).astype(np.int32)
    column = pyarrow.ListArray.from_arrays(offsets, tokens)
    dataset = datasets.Dataset(pyarrow.table({"input_ids": column}))

    def trl_rows(**options: int) -> int:
        return len(trl.pack_dataset(dataset, row, "bfd", {"keep_in_memory": True, **options}))

    packers: Contenders = {
        TRL: trl_rows,
        TRL_BEST: lambda: trl_rows(batch_size=len(dataset)),
        "seqpacker": lambda: len(seqpacker.Packer(row).pack_flat(lengths)[1]) + 1,
    }
    if with_grain:
        source = grain.MapDataset.source([{"tokens": tokens[:length]} for length in lengths])
        packed = grain.experimental.BestFitPackIterDataset(
            source.to_iter_dataset(), length_struct={"tokens": row}, num_packing_bins=GRAIN_BINS
        )
        packers[f"grain, {GRAIN_BINS} bins"] = lambda: sum(1 for _ in packed)
    return packers


def compare_packing(corpus: Corpus, data: Data, turns: int, with_grain: bool) -> dict[str, Any]:
    """Compares fill and speed on an epoch of the corpus."""
    row = data.sequence_length
    plan = plan_epoch(corpus, data, seed=0, epoch=0)
    lengths = corpus.lengths[plan.instructions].astype(np.int64)
    np.random.default_rng(0).shuffle(lengths)
    contenders: Contenders = {OURS: lambda: plan_epoch(corpus, data, seed=0, epoch=0).rows}
    contenders |= peer_packers(lengths, row, with_grain)
    figures = take_turns(contenders, len(lengths), turns)
    for figure in figures.values():
        figure["fill"] = plan.tokens / (figure["result"] * row)
    return {
        "row": row,
        "instructions": len(lengths),
        "unplaced": len(plan.unplaced),
        "moved_share": plan.moved_instructions / len(lengths),
        "figures": figures,
    }


def conversations(root: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yields GSM8K's rows again and again, numbered so that no two are equal."""
    files = sorted(root.glob("math/gsm8k_train_*.jsonl"))
    if not files:
        raise UserError(f"--root {root} holds no math/gsm8k_train_*.jsonl, GSM8K's rows")
    lines = [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
    for number, line in enumerate(itertools.islice(itertools.cycle(lines), count)):
        row = json.loads(line)
        turns = ("You are a mathematician.", f"{number}. {row['question']}", row["answer"])
        roles = ("system", "user", "assistant")
        yield {"messages": [{"role": r, "content": c} for r, c in zip(roles, turns, strict=True)]}


def our_prepare(rows: Path, tokenizer: Path, workers: int) -> Callable[[], int]:
    """Returns our prepare into an empty cache; it returns the number of tokens."""
    section = {
        "root": rows.parent, "row_system": "keep", "workers": workers, "default_domain": "maths",
        "domains": [{"name": "maths", "sources": [{"path": rows.name}]}],
    }  # fmt: skip
    data, ids = make_config({"data": section}).data, load_tokenizer(tokenizer)

    def work() -> int:
        empty = Path(tempfile.mkdtemp(dir=rows.parent))
        caches = prepare(data.model_copy(update={"cache_dir": empty}), ids)
        return int(caches[0].lengths[:, 0].sum(dtype=np.int64))

    return work


def trl_tokenise(rows: Path, tokenizer: Path, workers: int) -> Callable[[], int]:
    """Returns SFTTrainer's tokenise step, with its template; it returns the number of tokens."""
    import datasets
    import pyarrow.compute
    from tokenizers.normalizers import NFC
    from transformers import PreTrainedTokenizerFast
    from transformers.convert_slow_tokenizer import TikTokenConverter
    from trl.chat_template_utils import get_training_chat_template, qwen2_5_chat_template

    ranks, specials = str(tokenizer / "qwen.tiktoken"), list(QWEN_SPECIALS)
    backend = TikTokenConverter(ranks, QWEN_PATTERN, extra_special_tokens=specials).converted()
    backend.normalizer = NFC()
    fast = PreTrainedTokenizerFast(tokenizer_object=backend)
    fast.chat_template = qwen2_5_chat_template
    template = get_training_chat_template(fast)
    dataset = datasets.Dataset.from_json(str(rows), cache_dir=str(rows.parent / "datasets"))

    def tokenise(example: dict[str, Any]) -> dict[str, Any]:
        made = fast.apply_chat_template(
            example["messages"], tokenize=True, return_dict=True, chat_template=template,
            return_assistant_tokens_mask=True,
        )  # fmt: skip
        return {key: made[key] for key in ("input_ids", "assistant_masks")}

    def work() -> int:
        made = dataset.map(tokenise, num_proc=workers).data["input_ids"]
        return pyarrow.compute.sum(pyarrow.compute.list_value_length(made)).as_py()

    return work


def compare_preparing(args: argparse.Namespace, directory: Path) -> dict[str, Any]:
    rows = directory / "rows.jsonl"
    with rows.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row) + "\n" for row in conversations(args.root, args.prepare))
    contenders = {
        OURS: our_prepare(rows, args.tokenizer, args.workers),
        TOKENISE: trl_tokenise(rows, args.tokenizer, args.workers),
    }
    made = take_turns(contenders, args.prepare, args.turns)
    return {"conversations": args.prepare, "workers": args.workers, "figures": made}


def bars(report: dict[str, Any]) -> Iterator[tuple[str, str, str, bool]]:
    """Yields for each promise: its text, the figure, the bar, and whether the figure meets it."""
    for packing in report["packing"]:
        fill = {name: figure["fill"] for name, figure in packing["figures"].items()}
        what, ours, shown = f"fill at {packing['row']}", fill[OURS], f"{fill[OURS]:.2%}"
        bar, best = FILL_BARS[packing["row"]], fill[TRL_BEST] - BEST_CASE_BAR
        yield what, shown, f">= {bar:.1%}", ours >= bar
        yield what, shown, f"> {fill[TRL]:.2%}, {TRL}", ours > fill[TRL]
        yield what, shown, f">= {best:.2%}, {TRL_BEST}, less {BEST_CASE_BAR:.1%}", ours >= best
    for packing in report["tiled"]:
        times = min(packing["figures"][name]["ours_over_theirs"] for name in (TRL, TRL_BEST))
        what = f"planning at {packing['row']}, tiled, over TRL's faster"
        yield what, f"{times:.1f} x", f">= {PLANNING_BAR} x", times >= PLANNING_BAR
    times = report["preparing"]["figures"][TOKENISE]["ours_over_theirs"]
    yield "prepare over TRL", f"{times:.1f} x", f">= {PREPARE_BAR} x", times >= PREPARE_BAR


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n{title}\n")
    for cells in (columns, ["---"] * len(columns), *rows):
        print(f"| {' | '.join(cells)} |")


def show(report: dict[str, Any]) -> None:
    def compared(title: str, result: str, items: str, figures: Figures) -> None:
        columns = ["", result, f"{items}/s: median", "min - max", "ours / theirs"]
        lines = []
        for name, figure in figures.items():
            fill = f", {figure['fill']:.2%} full" if "fill" in figure else ""
            median, low, high = (f"{rate:,.0f}" for rate in figure["rate"])
            times = f"{figure['ours_over_theirs']:.2f}"
            lines.append([name, f"{figure['result']:,}{fill}", median, f"{low} - {high}", times])
        table(title, columns, lines)

    for packing in (*report["packing"], *report["tiled"]):
        title = (
            f"Packing {packing['instructions']:,} instructions into rows of {packing['row']:,} "
            f"({packing['unplaced']} unplaced, {packing['moved_share']:.2%} moved)"
        )
        compared(title, "rows", "instructions", packing["figures"])
    one = report["preparing"]
    title = f"Preparing {one['conversations']:,} conversations in {one['workers']} processes"
    compared(title, "tokens", "conversations", one["figures"])
    table("Bars", ["what", "figure", "bar", ""], report["bars"])
    packages = ", ".join(f"{name} {number}" for name, number in report["versions"].items())
    print(f"\n{report['cores']} cores, {packages}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--root", type=Path, required=True, help="the public sets, as data.root")
    parser.add_argument("--tokenizer", type=Path, required=True, help="holds qwen.tiktoken")
    parser.add_argument("--rows", type=int, nargs="+", choices=FILL_BARS, default=list(FILL_BARS))
    parser.add_argument("--tile", type=int, default=1_000_000, help="to so many instructions")
    parser.add_argument("--prepare", type=int, default=30_000, help="so many conversations")
    parser.add_argument("--workers", type=int, default=2, help="processes that prepare")
    parser.add_argument("--turns", type=int, default=3, help="of each contender")
    parser.add_argument("--json", action="store_true", help="one JSON object, no tables")
    args = parser.parse_args()

    import datasets

    datasets.disable_progress_bars()
    datasets.disable_caching()  # else the second turn is read from disk
    report: dict[str, Any] = {"packing": [], "tiled": [], "cores": os.cpu_count()}
    report["versions"] = {name: version(name) for name in PACKAGES}
    with tempfile.TemporaryDirectory() as directory:
        # First: TRL's processes are forked, which the threads of jax, still to be loaded, forbid.
        report["preparing"] = compare_preparing(args, Path(directory))
        for row in args.rows:
            corpus, data = public_corpus(args.root, args.tokenizer, f"{directory}/cache", row)
            larger = tiled(corpus, args.tile)
            report["packing"].append(compare_packing(corpus, data, args.turns, with_grain=True))
            report["tiled"].append(compare_packing(larger, data, args.turns, with_grain=False))
    report["bars"] = [(*bar, "held" if held else "missed") for *bar, held in bars(report)]
    if args.json:
        print(json.dumps(report))
    else:
        show(report)


if __name__ == "__main__":
    run_command(main)
