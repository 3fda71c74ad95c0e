"""Rows and fill where a domain is small: python benchmarks/small_domains.py

Lengths are log-normal with the medians of the public sets of configs/public_sets.yaml. "fewest" is
what the tokens and the rule that no row holds an instruction twice ask for. The figures are in
docs/benchmarks.md.
"""

import argparse

import numpy as np

from moi_jax.config.load import make_config
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.epoch import EpochPlan, plan_epoch

ROWS = (2048, 4096, 8192, 16384)
# By case: (median length, instructions) of each domain.
CASES = {
    "21 of code": ((60, 600), (110, 21), (200, 424), (160, 300)),
    "21 of code, large sets": ((60, 1745), (110, 21), (200, 6940), (160, 978)),
    "3,000 short and 30": ((45, 3000), (45, 30)),
    "two small ones": ((60, 40), (110, 21), (200, 424), (160, 30)),
    "none small": ((60, 1745), (110, 1029), (200, 6940), (160, 978)),
}


def planned(domains: tuple[tuple[int, int], ...], row: int, packing: str) -> EpochPlan:
    rng = np.random.default_rng(0)
    lengths = [
        np.clip(rng.lognormal(np.log(median), 0.6, count), 16, 500).astype(np.int32)
        for median, count in domains
    ]
    names = [f"domain_{number}" for number in range(len(domains))]
    section = {
        "sequence_length": row,
        "packing": packing,
        "default_domain": names[0],
        "domains": [{"name": name, "sources": [{"path": name}]} for name in names],
    }
    data = make_config({"data": section}).data
    return plan_epoch(Corpus.of(names, lengths, lengths), data, seed=0, epoch=0)


def main() -> None:
    argparse.ArgumentParser(description=__doc__.split("\n")[0]).parse_args()
    print("| case | row | fewest rows | best_fit | sequential |")
    print("| --- | --- | --- | --- | --- |")
    for case, domains in CASES.items():
        for row in ROWS:
            plan, in_order = (planned(domains, row, p) for p in ("best_fit", "sequential"))
            counts = [count for _, count in domains]
            fewest = max(-(-plan.tokens // row), -(-max(counts) // min(counts)))
            print(
                f"| {case} | {row:,} | {fewest:,} | {plan.rows:,} ({plan.fill:.1%}) "
                f"| {in_order.rows:,} ({in_order.fill:.1%}) |"
            )


if __name__ == "__main__":
    main()
