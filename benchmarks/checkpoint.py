"""What checkpoints, checksums and local copies cost: python benchmarks/checkpoint.py [--dir DIR]

Saves and restores the state of a model with 119 million parameters: random float32 parameters and
two random moments, 1.4 GB, on one device. Prints the time of the checksums and of the search for
NaN beside the whole, then that of local copies (checkpoint.local_every). The files are in the page
cache, so no disk hides the cost. The figures are in docs/benchmarks.md.
"""

import argparse
import dataclasses
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moi_jax.checkpoints.checksums import verify_arrays, write_checksums
from moi_jax.checkpoints.finite import check_finite
from moi_jax.checkpoints.items import ModelItems
from moi_jax.checkpoints.local_copies import LocalCopies
from moi_jax.checkpoints.local_saves import LocalSaves
from moi_jax.checkpoints.run_checkpoints import RunCheckpoints
from moi_jax.config.load import make_config
from moi_jax.models.presets import preset
from moi_jax.parallel.mesh import make_mesh
from moi_jax.training.optimizer import make_optimizer
from moi_jax.training.state import TrainState, abstract_state

SIZES = {"vocab_size": 32_768, "hidden_size": 1024, "num_heads": 16, "num_kv_heads": 16}
ROUNDS = 3


def random_state(abstract: TrainState) -> TrainState:
    """A state of random numbers: moments of zeros would be compressed to nothing."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> jax.Array:
        values = 0.02 * rng.standard_normal(leaf.shape, np.float32)
        return jax.device_put(values.astype(leaf.dtype), leaf.sharding)

    return jax.tree.map(draw, abstract)


def seconds(work: Callable[[], Any]) -> tuple[float, float]:
    """Seconds on the clock, and of all cores."""
    start, cpu = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - start, time.process_time() - cpu


def measure(
    checkpoints: RunCheckpoints, number: int, state: TrainState, abstract: TrainState
) -> dict[str, tuple[float, float]]:
    """The seconds of a save and a restore, and of what checksums and NaN take of them."""
    step = checkpoints.directory / str(number)

    def save() -> None:
        checkpoints.save(number, *state.items(), {}, {}, {})
        checkpoints.wait()

    return {
        "save, with checksums": seconds(save),
        "- the checksums alone": seconds(lambda: write_checksums(step)),
        "verify": seconds(lambda: verify_arrays(step)),
        "restore, with the search for NaN": seconds(
            lambda: checkpoints.restore(number, *abstract.items())
        ),
        "- the search for NaN alone": seconds(lambda: check_finite(step, state.items(), "state")),
    }


def measure_local(
    saves: LocalSaves, number: int, state: TrainState, abstract: TrainState
) -> dict[str, tuple[float, float]]:
    """The seconds of a local copy; the run waits only until the values are copied."""
    newest = []

    def search() -> None:
        newest.append(saves.newest(number - 1, number, lambda _: abstract))

    return {
        "local copy, until the run goes on": seconds(
            lambda: saves.save(number, state, {}, {}, None)
        ),
        "local copy, the rest in the background": seconds(saves.wait),
        "search for the newest local copy, with checksums": seconds(search),
        "restore of the local copy": seconds(lambda: saves.restore(newest[0], abstract)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dir", type=Path, help="where there is room for 8 GB")
    args = parser.parse_args()
    config = make_config({"checkpoint": {"keep_last": 1}})
    model = dataclasses.replace(preset("tiny"), mlp_width=2816, **SIZES)
    optimizer = make_optimizer(config.optimizer, model)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    abstract = abstract_state(model, optimizer, "float32", mesh)
    state = random_state(abstract)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(state))
    with tempfile.TemporaryDirectory(dir=args.dir) as folder:
        items = ModelItems(model, {}, {})
        opened = RunCheckpoints(Path(folder) / "checkpoints", config.checkpoint, items)
        local = LocalSaves(LocalCopies(Path(folder) / "local"), "run", ["start"], "start", mesh)
        with closing(opened) as checkpoints, closing(local):
            rounds = [
                measure(checkpoints, n + 1, state, abstract)
                | measure_local(local, n + 1, state, abstract)
                for n in range(ROUNDS)
            ]
    print(f"{size / 1e9:.2f} GB, median of {ROUNDS}\n")
    print("| what | seconds | CPU seconds | GB/s |\n| --- | --- | --- | --- |")
    for what in rounds[0]:
        clock, cpu = map(statistics.median, zip(*(each[what] for each in rounds), strict=True))
        print(f"| {what} | {clock:.2f} | {cpu:.2f} | {size / 1e9 / clock:.2f} |")


if __name__ == "__main__":
    main()
