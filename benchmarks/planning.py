"""Time, memory and fill of planning an epoch: python benchmarks/planning.py [key=value ...]

Plans in a fresh process, on synthetic lengths (log-normal, mean about 300 tokens, cut at 4096), for
domains of equal and of very different sizes. The figures are in docs/benchmarks.md.
"""

import argparse
import json
import multiprocessing
import resource
import time
from typing import Any

import numpy as np

from moi_jax.config.load import make_config
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.epoch import plan_epoch
from moi_jax.data.planning.placeable import placeable

NAMES = ("chat", "code", "maths", "tools")
SEQUENCE_LENGTH = 4096
# Shares of the instructions an epoch places: with unequal sets the smaller ones are cycled.
SIZES = {"equal": (1.0, 1.0, 1.0, 1.0), "unequal": (1.0, 0.4, 0.12, 0.08)}


def made_up_lengths(rng: np.random.Generator, count: int) -> np.ndarray:
    return np.clip(rng.lognormal(5.4, 0.8, count), 16, SEQUENCE_LENGTH).astype(np.int32)


def measure(instructions: int, sizes: str, switches: dict[str, str]) -> dict[str, Any]:
    """Plans one epoch and returns the figures."""
    rng = np.random.default_rng(0)
    domains = [{"name": name, "sources": [{"path": name}]} for name in NAMES]
    section = {"sequence_length": SEQUENCE_LENGTH, "domains": domains, **switches}
    data = make_config({"data": section}).data
    lengths = [made_up_lengths(rng, int(instructions * s / len(NAMES))) for s in SIZES[sizes]]
    start, cpu = time.perf_counter(), time.process_time()
    corpus = Corpus.of(NAMES, lengths, [domain // 2 for domain in lengths])
    kept = np.split(placeable(corpus, data), corpus.offsets[1:-1])
    lengths = [domain[mine] for domain, mine in zip(lengths, kept, strict=True)]
    unplaceable = len(corpus.lengths) - sum(map(len, lengths))
    corpus = Corpus.of(NAMES, lengths, [domain // 2 for domain in lengths])
    plan = plan_epoch(corpus, data, seed=0, epoch=0)
    return {
        "sizes": sizes,
        "seconds": round(time.perf_counter() - start, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "peak_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2),
        "instructions": len(plan.instructions),
        "groups": len(plan.group_starts) - 1,
        "rows": plan.rows,
        "mean_length": round(plan.tokens / len(plan.instructions), 1),
        "fill": round(plan.fill, 5),
        "moved_share": round(plan.moved_instructions / len(plan.instructions), 5),
        "unplaceable": unplaceable,
        "unplaced_groups": plan.unplaced_groups,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("switches", nargs="*", help="keys of the data section: key=value")
    parser.add_argument("--instructions", type=int, default=10_000_000)
    args = parser.parse_args()
    switches = dict(switch.split("=", 1) for switch in args.switches)
    context = multiprocessing.get_context("spawn")  # the peak memory of each case is its own
    for sizes in SIZES:
        with context.Pool(1) as pool:
            print(json.dumps(pool.apply(measure, (args.instructions, sizes, switches))))


if __name__ == "__main__":
    main()
