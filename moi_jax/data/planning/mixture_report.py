"""The report on a mixture: what an epoch uses of each domain, how often, and how full rows are."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.table import Table

from moi_jax.common.log import LogTable
from moi_jax.config import Data
from moi_jax.data.cache.domain import DomainCache
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.epoch import EpochPlan
from moi_jax.data.planning.mixture import asked_shares

log = logging.getLogger(__name__)


def mixture_statistics(
    plan: EpochPlan, report: Mapping[str, Mapping[str, Any]], data: Data, batch_rows: int
) -> dict[str, Any]:
    """The figures of one epoch, as `preview --stats --json` prints them.

    For every domain, read = sum of dropped + held_out + used + unplaced + not_drawn. `used` counts
    the training conversations that occur in the plan, `unplaced` those that were drawn only for
    groups that fit no row. A conversation of several samples counts once, and occurs whenever one
    of them does. Tokens count every occurrence. `asked` is the share that the config asks for, in
    data.unit.

    Args:
      report: by domain name, with the keys read, dropped ({reason: n}) and held_out; see
        `cache.selection.row_counts`.
      data: the config section with the sampling of the plan's stage.
      batch_rows: rows of a global batch.
    """
    corpus = plan.corpus
    occurrences = np.bincount(plan.instructions, minlength=len(corpus.lengths))
    token_sums = occurrences * corpus.lengths
    left_out = np.zeros(len(corpus.lengths), bool)
    left_out[plan.unplaced] = True
    # From here on by conversation.
    occurrences = _by_conversation(corpus, occurrences)
    left_out = (_by_conversation(corpus, left_out) > 0) & (occurrences == 0)
    asked = asked_shares(corpus, data)
    domains = {}
    for domain, name in enumerate(corpus.names):
        samples = slice(*corpus.offsets[domain : domain + 2])
        mine = slice(*corpus.conversation_offsets[domain : domain + 2])
        counts = occurrences[mine]
        used, unplaced = int(np.count_nonzero(counts)), int(left_out[mine].sum())
        domains[name] = {
            "read": report[name]["read"],
            "dropped": dict(report[name]["dropped"]),
            "held_out": report[name]["held_out"],
            "used": used,
            "unplaced": unplaced,
            "not_drawn": len(counts) - used - unplaced,
            "asked": float(asked[domain]),
            "occurrences": int(counts.sum()),
            "mean_repeats": float(counts.sum() / max(used, 1)),
            "max_repeats": int(counts.max(initial=0)),
            "tokens": int(token_sums[samples].sum()),
            "loss_tokens": int(plan.domain_loss_tokens[domain]),
        }
    return {
        "unit": data.unit.replace("_", " "),
        "fill": plan.fill,
        "groups": len(plan.group_starts) - 1,
        "rows": plan.rows,
        "steps_per_epoch": -(-plan.rows // batch_rows),
        "tokens": plan.tokens,
        "loss_tokens": plan.loss_tokens,
        "moved_share": plan.moved_instructions / len(plan.instructions),
        "unplaced_groups": plan.unplaced_groups,
        "unplaced_instructions": len(plan.unplaced),
        "copies_left_out": int(plan.draws.sum()) - len(plan.instructions) - len(plan.unplaced),
        "domains_per_row": domains_per_row(plan),
        "domains": domains,
    }


def _by_conversation(corpus: Corpus, values: np.ndarray) -> np.ndarray:
    """int64[conversations]: the sums of the values of each conversation's instructions."""
    sums = np.append(0, np.cumsum(values, dtype=np.int64))
    return np.diff(sums[corpus.conversation_starts])


def domains_per_row(plan: EpochPlan) -> float:
    """The mean number of distinct domains in a row."""
    row_of = np.repeat(np.arange(plan.rows), np.diff(plan.instruction_starts))
    domains = len(plan.corpus.names)
    pairs = np.bincount(row_of * domains + plan.corpus.domain_of(plan.instructions))
    return float(np.count_nonzero(pairs) / plan.rows)


def log_mixture_table(statistics: Mapping[str, Any], data: Data) -> None:
    """Logs the mixture table, and warnings: rows that are not full, groups left out, repeats."""
    domains = statistics["domains"]
    rows = figures_table(
        "Rows", "read", "dropped", "held out", "used", "not used", "repeats", "most"
    )
    for name, d in domains.items():
        not_used = d["unplaced"] + d["not_drawn"]
        counts = (d["read"], sum(d["dropped"].values()), d["held_out"], d["used"], not_used)
        repeats = (f"{d['mean_repeats']:.2f}", str(d["max_repeats"]))
        rows.add_row(name, *(f"{count:,}" for count in counts), *repeats)
    log.info(LogTable(rows))
    title = f"Mixture of one epoch, asked as shares of {statistics['unit']}"
    mixture = figures_table(title, "asked", "instructions", "tokens", "loss tokens")
    for name, d in domains.items():
        shares = (_with_share(domains, name, k) for k in ("occurrences", "tokens", "loss_tokens"))
        mixture.add_row(name, f"{d['asked']:.1%}", *shares)
    log.info(LogTable(mixture))
    log.info(
        f"{statistics['rows']:,} rows, {statistics['steps_per_epoch']:,} steps an epoch, "
        f"fill {statistics['fill']:.2%}, {statistics['domains_per_row']:.2f} domains a row, "
        f"{statistics['moved_share']:.2%} of the instructions changed group to fill rows",
    )
    if statistics["fill"] < FULL:
        why = _why_not_full(statistics, data)
        log.warning(f"rows are only {statistics['fill']:.1%} full: {why}")
    if copies := statistics["copies_left_out"]:
        log.warning(
            f"{copies:,} draws are left out, because their groups hold the instruction already; "
            f"lower data.chunk_size, add data, or set data.repeat_in_row: allow"
        )
    if statistics["unplaced_groups"]:
        log.warning(
            f"{statistics['unplaced_groups']:,} groups "
            f"({statistics['unplaced_instructions']:,} instructions) fit no row and are not used; "
            f"raise data.sequence_length or lower data.max_instruction_tokens",
        )
    for name, d in domains.items():
        if d["max_repeats"] > data.max_repeats:
            log.warning(
                f"domain {name} repeats an instruction {d['max_repeats']} times in an epoch, more "
                f"than data.max_repeats {data.max_repeats}; add data or set data.epoch_end: "
                f"shortest",
            )


BOUND = 0.6  # of the rows: a domain whose instructions stand in so many is too small for more
FULL = 0.9  # rows that are fuller are not worth a warning


def _why_not_full(statistics: Mapping[str, Any], data: Data) -> str:
    """What keeps the rows of a plan from being full, and what to do about it."""
    if data.packing == "none":
        return "data.packing: none gives each group a row of its own; best_fit fills the rows"
    rows, domains = statistics["rows"], statistics["domains"]
    name = max(domains, key=lambda name: domains[name]["max_repeats"])
    repeats, used = domains[name]["max_repeats"], domains[name]["used"]
    if data.repeat_in_row == "forbid" and repeats > max(1, BOUND * rows):
        what = "chunks" if data.sampling == "balanced" else "of them"
        tokens = statistics["tokens"] // rows
        return (
            f"domain {name} has only {used:,} instructions, and none stands twice in a row, so a "
            f"row holds at most {used:,} {what}, here {tokens:,} of {data.sequence_length:,} "
            f"tokens; set data.repeat_in_row: allow, data.sequence_length to about {tokens:,} or "
            f"another data.sampling, or add data to {name}"
        )
    if data.packing == "sequential":
        return "data.packing: sequential ends a row at a group that does not fit; best_fit does not"
    mean = statistics["tokens"] // statistics["groups"]
    return (
        f"an epoch has {statistics['groups']:,} groups of {mean:,} tokens on average, which leave "
        f"gaps in {rows:,} rows; choose another data.sequence_length"
    )


def figures_table(title: str, *figures: str) -> Table:
    """An empty table with one line for each domain and a column for each figure."""
    table = Table(title=title, title_justify="left")
    table.add_column("domain", overflow="fold")
    for figure in figures:
        table.add_column(figure, justify="right")
    return table


def _with_share(domains: Mapping[str, Mapping[str, Any]], name: str, key: str) -> str:
    total = sum(d[key] for d in domains.values())
    return f"{domains[name][key]:,} ({domains[name][key] / max(total, 1):.1%})"


# How many files of a domain are listed.
FILES_SHOWN = 20


def log_source_table(caches: Sequence[DomainCache]) -> None:
    """Logs the format and the rows of each file, and an example of every reason to drop a row."""
    table = Table(title="Sources", title_justify="left")
    for header in ("domain", "file", "format"):
        table.add_column(header, overflow="fold")
    for header in ("rows", "kept"):
        table.add_column(header, justify="right")
    for cache in caches:
        files = cache.manifest["files"]
        for file in files[:FILES_SHOWN]:
            figures = (f"{file['read']:,}", f"{file['kept']:,}")
            table.add_row(cache.name, file["name"], file["format"] or "empty", *figures)
        if len(files) > FILES_SHOWN:
            table.add_row(cache.name, f"and {len(files) - FILES_SHOWN} more files", "", "", "")
    log.info(LogTable(table))
    for cache in caches:
        examples = {row["reason"]: row for row in reversed(cache.manifest["examples"])}
        for reason, count in cache.manifest["dropped"].items():
            example = examples[reason]
            log.info(
                f"{cache.name}: dropped {count:,} {reason}, for example "
                f"{example['file']}:{example['line']}: {example['detail']}",
            )
