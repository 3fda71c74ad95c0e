"""The mixture table: what of each domain an epoch's plan uses, how often, and how full rows are."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from moi_jax.data.plan import EpochPlan


def mixture_statistics(
    plan: EpochPlan, report: Mapping[str, Mapping[str, Any]], batch_rows: int
) -> dict[str, Any]:
    """The figures of one epoch, as `preview --stats --json` prints them.

    For every domain: read = sum of dropped + held_out + used + not_drawn, where `used` counts
    training instructions that stand in the plan at least once. Tokens count every occurrence.

    Args:
      report: by domain name, with the keys read, dropped ({reason: n}) and held_out
        (`cache.domain_report`).
      batch_rows: rows of a global batch.
    """
    corpus = plan.corpus
    occurrences = np.bincount(plan.instructions, minlength=len(corpus.lengths))
    token_sums = occurrences * corpus.lengths
    domains = {}
    for domain, name in enumerate(corpus.names):
        mine = slice(corpus.offsets[domain], corpus.offsets[domain + 1])
        counts = occurrences[mine]
        used = int(np.count_nonzero(counts))
        domains[name] = {
            "read": report[name]["read"],
            "dropped": dict(report[name]["dropped"]),
            "held_out": report[name]["held_out"],
            "used": used,
            "not_drawn": len(counts) - used,
            "occurrences": int(counts.sum()),
            "mean_repeats": float(counts.sum() / max(used, 1)),
            "max_repeats": int(counts.max(initial=0)),
            "tokens": int(token_sums[mine].sum()),
            "loss_tokens": int(plan.domain_loss_tokens[domain]),
        }
    return {
        "fill": plan.fill,
        "rows": plan.rows,
        "steps_per_epoch": -(-plan.rows // batch_rows),
        "tokens": plan.tokens,
        "loss_tokens": plan.loss_tokens,
        "moved_share": plan.moved / len(plan.instructions),
        "unplaced_groups": plan.unplaced_groups,
        "unplaced_instructions": plan.unplaced_instructions,
        "domains_per_row": domains_per_row(plan),
        "domains": domains,
    }


def domains_per_row(plan: EpochPlan) -> float:
    """The mean number of distinct domains in a row."""
    row_of = np.repeat(np.arange(plan.rows), np.diff(plan.instruction_starts))
    domains = len(plan.corpus.names)
    pairs = np.bincount(row_of * domains + plan.corpus.domain_of(plan.instructions))
    return float(np.count_nonzero(pairs) / plan.rows)


def print_mixture(statistics: Mapping[str, Any], console: Console, max_repeats: int) -> None:
    """Prints the mixture table, and a warning for every domain over data.max_repeats."""
    table = Table(title="Mixture of one epoch")
    table.add_column("domain")
    for header in (
        *("read", "dropped", "held out", "used", "not drawn", "repeats mean / max"),
        *("instructions", "tokens", "loss tokens"),
    ):
        table.add_column(header, justify="right")
    domains = statistics["domains"]
    for name, d in domains.items():
        table.add_row(
            name,
            *(f"{n:,}" for n in (d["read"], sum(d["dropped"].values()), d["held_out"], d["used"])),
            f"{d['not_drawn']:,}",
            f"{d['mean_repeats']:.2f} / {d['max_repeats']}",
            *(_with_share(domains, name, key) for key in ("occurrences", "tokens", "loss_tokens")),
        )
    console.print(table)
    console.print(
        f"{statistics['rows']:,} rows, {statistics['steps_per_epoch']:,} steps an epoch, "
        f"fill {statistics['fill']:.2%}, {statistics['domains_per_row']:.2f} domains a row, "
        f"{statistics['moved_share']:.2%} of the instructions moved to fit",
        highlight=False,
    )
    if statistics["unplaced_groups"]:
        console.print(
            f"warning: {statistics['unplaced_groups']:,} groups "
            f"({statistics['unplaced_instructions']:,} instructions) fit no row and are left out; "
            f"raise data.sequence_length or lower data.max_instruction_tokens",
            style="yellow",
            highlight=False,
        )
    for name, d in domains.items():
        if d["max_repeats"] > max_repeats:
            console.print(
                f"warning: domain {name} repeats an instruction {d['max_repeats']} times an epoch, "
                f"over data.max_repeats {max_repeats}; add data or set data.epoch_end: shortest",
                style="yellow",
                highlight=False,
            )


def _with_share(domains: Mapping[str, Mapping[str, Any]], name: str, key: str) -> str:
    total = sum(d[key] for d in domains.values())
    return f"{domains[name][key]:,} ({domains[name][key] / max(total, 1):.1%})"
