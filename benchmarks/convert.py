"""Time and peak memory of import and export at full size: python benchmarks/convert.py --dir DIR

Makes a random bfloat16 checkpoint with the shapes of a preset in DIR (Qwen-7B needs 46 GB of free
space). Imports and exports it, each in its own process, and compares every tensor bit by bit.
Deletes the files at the end. The figures are in docs/benchmarks.md.
"""

import argparse
import json
import math
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np

from moi_jax.checkpoints.hf.safetensors_reader import TensorFiles
from moi_jax.checkpoints.hf.safetensors_writer import write_tensors
from moi_jax.checkpoints.hf.weights import published_shapes
from moi_jax.models.config import ModelConfig, to_hf_config
from moi_jax.models.parameters import parameter_specs
from moi_jax.models.presets import preset

ROOT = Path(__file__).parent.parent
TOKENIZER = ROOT / "moi_jax" / "data" / "samples" / "tokenizer"
BFLOAT16 = np.dtype(ml_dtypes.bfloat16)


def random_tensors(config: ModelConfig) -> Iterator[tuple[str, np.ndarray]]:
    rng = np.random.default_rng(0)
    for name, shape in published_shapes(config).items():
        yield name, (0.02 * rng.standard_normal(shape, np.float32)).astype(BFLOAT16)


def measure(what: str, *arguments: str) -> None:
    """Runs a conversion and prints its row of the table."""
    start = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-m", "moi_jax.convert", what, *arguments],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    )
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - start
    if status:
        sys.exit(f"{what} failed")
    cpu = usage.ru_utime + usage.ru_stime
    peak = usage.ru_maxrss * 1024 / 1e9
    print(f"| {what} | {seconds:.0f} | {cpu:.0f} | {peak:.2f} |", flush=True)


def unequal_tensors(left: Path, right: Path) -> list[str]:
    ours, theirs = TensorFiles(left), TensorFiles(right)
    assert ours.headers.keys() == theirs.headers.keys()
    return [
        name
        for name in ours.headers
        if not np.array_equal(ours.read(name).view(np.uint16), theirs.read(name).view(np.uint16))
    ]


def make_published(source: Path, config: ModelConfig) -> None:
    shutil.copytree(TOKENIZER, source)
    (source / "config.json").write_text(json.dumps(to_hf_config(config)), encoding="utf-8")
    shapes = published_shapes(config)
    write_tensors(source, shapes, BFLOAT16, random_tensors(config), 2 * 10**9, lambda _: None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, required=True, help="where there is room")
    parser.add_argument("--preset", default="qwen-7b")
    args = parser.parse_args()
    config = preset(args.preset)
    count = len(published_shapes(config))
    sizes = [2 * math.prod(p.shape) for p in parameter_specs(config).values()]
    if shutil.disk_usage(args.dir).free < 3 * sum(sizes):
        sys.exit(f"{args.dir} has less than {3 * sum(sizes) / 1e9:.0f} GB free")
    folder = Path(tempfile.mkdtemp(prefix="convert-", dir=args.dir))
    source, exported = folder / "published", folder / "exported"
    # The system counts a process's memory from its parent's on: this one stays small.
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        try:
            pool.apply(make_published, (source, config))
            print(f"{args.preset}: {count} tensors, {sum(sizes) / 1e9:.1f} GB in bfloat16,")
            print(f"the largest stacked parameter {max(sizes) / 1e9:.2f} GB\n")
            print(
                "| what | seconds | CPU seconds | peak GB |\n| --- | --- | --- | --- |", flush=True
            )
            measure("import", str(source), "--out", str(folder / "ckpt"))
            measure("export", str(folder / "ckpt"), "--out", str(exported))
            unequal = pool.apply(unequal_tensors, (source, exported))
            print(f"\n{count - len(unequal)} of {count} tensors equal bit by bit")
            if unequal:
                sys.exit(f"unequal: {', '.join(unequal)}")
        finally:
            shutil.rmtree(folder)


if __name__ == "__main__":
    main()
