"""Notices: what the user should know about the rows of a prepared domain, in one line each."""

import logging
from collections.abc import Mapping, Sequence
from itertools import chain
from typing import Any

from moi_jax import config
from moi_jax.common.errors import UserError
from moi_jax.data.sources.diagnosis import likely_cause, shown_row
from moi_jax.data.sources.readers import SourceFile
from moi_jax.data.sources.tables import LOST

log = logging.getLogger(__name__)

MOST = 20  # files that are told of


def log_notices(domain: str, manifest: Mapping[str, Any]) -> None:
    """Logs what stands in the kept rows and may be a mistake, and what is not read."""
    examples = {row["reason"]: row for row in reversed(manifest["examples"])}
    if count := manifest["contaminated"]:
        log.warning(
            f"domain {domain} keeps {count:,} rows that hold a benchmark question, for example "
            f"{_place(examples['contaminated'])}"
        )
    if count := manifest["unfilled"]:
        log.info(
            f"{domain}: {count:,} kept rows hold what may be an unfilled variable of a template, "
            f"for example {_place(examples['unfilled'])}"
        )
    if count := manifest["trained_observations"]:
        log.warning(
            f"{domain}: {count:,} kept rows may train on what a tool wrote: an answer looks like a "
            f"ReAct trajectory and is not recognised as one, for example "
            f"{_place(examples['trained_observations'])}"
        )
    if count := manifest.get("unlisted_tool", 0):
        log.warning(
            f"{domain}: {count:,} kept rows call a tool that they do not list, for example "
            f"{_place(examples['unlisted_tool'])}"
        )
    for row in manifest["examples"]:
        if row["detail"].endswith(LOST):
            log.warning(f"{domain}: {_place(row)}")
    files = [file for file in manifest["files"] if "ignored" in file]
    for file in files[:MOST]:
        log.info(f"{domain}: {file['name']}: {_ignored(file)}")
    if len(files) > MOST:
        log.info(f"{domain}: {len(files) - MOST} more files have keys that are not read")


def _place(example: Mapping[str, Any]) -> str:
    return f"{example['file']}:{example['line']}: {example['detail']}"


def _ignored(file: Mapping[str, Any]) -> str:
    keys = [
        f"{key!r} (rows: {found['rows']:,}; line {found['line']}: {found['example']})"
        for key, found in file["ignored"].items()
    ]
    return f"the format {file['format']} does not read {', '.join(keys)}"


def counts_text(dropped: Mapping[str, int]) -> str:
    """The counts of dropped rows by reason."""
    return ", ".join(f"{reason} {count:,}" for reason, count in dropped.items()) or "none"


def no_usable_row(
    domain: config.Domain, files: Sequence[Sequence[SourceFile]], manifest: Mapping[str, Any]
) -> UserError:
    """The error for a domain without a usable row: its first bad row, and the likely cause.

    Args:
      files: of each source.
    """
    names = [file.name for file in chain(*files)]
    listed = ", ".join(names[:3]) + (f" and {len(names) - 3} more files" if names[3:] else "")
    text = (
        f"domain {domain.name} has no usable row in {listed}: {manifest['read']:,} read, dropped "
        f"{counts_text(manifest['dropped'])}"
    )
    if not manifest["examples"]:
        return UserError(text)
    first = manifest["examples"][0]
    source, file = next(
        (source, file)
        for source, part in zip(domain.sources, files, strict=True)
        for file in part
        if file.name == first["file"]
    )
    row = shown_row(file, first["line"])
    text += f"; the first is {file.path}:{first['line']}: {first['detail']}"
    cause = likely_cause(file, source.format)
    return UserError(text + (f": {row}" if row else "") + (f"; {cause}" if cause else ""))
