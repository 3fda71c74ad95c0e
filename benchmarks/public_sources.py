"""How each file below a directory is read: python benchmarks/public_sources.py DIR [GLOB ...]

Prints a Markdown table: the detected format, the rows read and kept, the rows dropped by reason.
docs/data_format.md shows it for a collection of public sets.
"""

import argparse
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from moi_jax.common.errors import UserError
from moi_jax.config import Source
from moi_jax.data.sources.readers import SourceFile
from moi_jax.data.sources.rows import detect_format, expand, source_rows
from moi_jax.text.conversations import BadRow, content_hash

PATTERNS = (
    "**/*.json",
    "**/*.jsonl",
    "**/*.csv",
    "**/*.tsv",
    "**/*.gz",
    "**/*.zst",
    "**/*.parquet",
    "**/*array_record*",
)


def table_row(file: SourceFile, seen: set[int]) -> str:
    """Returns the row of a file; `seen` holds the hashes of the conversations kept so far."""
    try:
        form = detect_format(file)
    except UserError as error:
        return f"| {file.name} | refused | | | {str(error).split(': ', 1)[1].split(';')[0]} |"
    read = trimmed = 0
    dropped: Counter[str] = Counter()
    for row in source_rows(file, form):
        read += 1
        trimmed += row.trimmed
        if isinstance(row.conversation, BadRow):
            dropped[row.conversation.reason] += 1
        elif (key := content_hash(row.conversation.messages)) in seen:
            dropped["duplicate"] += 1
        else:
            seen.add(key)
    reasons = ", ".join(f"{reason} {count}" for reason, count in sorted(dropped.items()))
    note = f"{reasons or '-'}{f'; {trimmed} trimmed' if trimmed else ''}"
    return f"| {file.name} | {form} | {read:,} | {read - dropped.total():,} | {note} |"


def files_below(directory: Path, patterns: Sequence[str]) -> list[SourceFile]:
    """Returns the files that match any of the patterns, sorted by name."""
    found: dict[str, SourceFile] = {}
    for pattern in patterns:
        try:
            (files,) = expand(directory, [Source(path=pattern)], directory)
        except UserError:
            continue  # nothing of this kind is there
        found |= {file.name: file for file in files}
    return [found[name] for name in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path)
    parser.add_argument("patterns", nargs="*", default=PATTERNS)
    args = parser.parse_args()
    seen: set[int] = set()
    print("| file | format | read | kept | dropped |\n| --- | --- | ---: | ---: | --- |")
    for file in files_below(args.directory, args.patterns):
        print(table_row(file, seen))


if __name__ == "__main__":
    main()
