"""Statistics of the preview beside the mixture: the count of every row read, and lengths."""

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np

from moi_jax.common.log import LogTable
from moi_jax.data.cache.writer import changes
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.mixture_report import figures_table

log = logging.getLogger(__name__)


def accounts(statistics: Mapping[str, Any]) -> dict[str, str]:
    """For each domain, what became of the rows that were read, as a sum.

        {"code": "70 read = 2 dropped (too_long 2) + 7 held out + 61 used + 0 unplaced + 0 not ..."}

    Args:
      statistics: see `mixture_statistics`.

    Raises:
      RuntimeError: a sum differs from the number of rows read.
    """
    lines = {}
    for name, d in statistics["domains"].items():
        reasons = {reason: count for reason, count in d["dropped"].items() if count}
        dropped = sum(reasons.values())
        total = dropped + d["held_out"] + d["used"] + d["unplaced"] + d["not_drawn"]
        if total != d["read"]:
            raise RuntimeError(f"domain {name}: {d['read']} rows read, {total} accounted for")
        shown = ", ".join(f"{reason} {count:,}" for reason, count in reasons.items())
        lines[name] = (
            f"{d['read']:,} read = {dropped:,} dropped{f' ({shown})' if shown else ''} "
            f"+ {d['held_out']:,} held out + {d['used']:,} used + {d['unplaced']:,} unplaced "
            f"+ {d['not_drawn']:,} not drawn"
        )
    return lines


def log_accounts(statistics: Mapping[str, Any]) -> None:
    """Logs the `accounts`, one line for each domain, and what the rows kept have lost."""
    for name, line in accounts(statistics).items():
        log.info(f"{name}: {line}")
        if changed := changes(statistics["domains"][name]):
            log.info(f"{name}: rows kept: {changed}")


def length_statistics(corpus: Corpus) -> dict[str, dict[str, float]]:
    """For each domain, how many tokens its training instructions have, counting each once."""
    found = {}
    for domain, name in enumerate(corpus.names):
        lengths = corpus.lengths[corpus.offsets[domain] : corpus.offsets[domain + 1]]
        if len(lengths):
            least, median, p95, most = np.percentile(lengths, [0, 50, 95, 100]).tolist()
            mean = float(lengths.mean())
            found[name] = {"min": least, "median": median, "mean": mean, "p95": p95, "max": most}
        else:
            found[name] = {}
    return found


def log_lengths(lengths: Mapping[str, Mapping[str, float]]) -> None:
    """Logs the table of `length_statistics`."""
    table = figures_table("Tokens of an instruction", "min", "median", "mean", "95 %", "max")
    for name, of_domain in lengths.items():
        table.add_row(name, *(f"{tokens:,.0f}" for tokens in of_domain.values()))
    log.info(LogTable(table))
