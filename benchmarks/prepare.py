"""Speed and memory of prepare: python benchmarks/prepare.py DIR TOKENIZER [--jinja FILE ...]

Measures conversations/s on the GSM8K-sized rows of the JSONL files in DIR; they are repeated with a
running number, so that no two are equal. With --jinja, also through each of these chat templates as
the tokenizer's own, and on conversations of ten turns with calls of tools. Measures the peak memory
of all processes on a million synthetic conversations. All sets are written as JSONL and prepared
into an empty cache in a temporary folder, each in a fresh process. The figures are in
docs/benchmarks.md.
"""

import argparse
import json
import multiprocessing
import random
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from moi_jax.config.load import make_config
from moi_jax.data.cache.prepare import prepare
from moi_jax.text.tokenizer import TiktokenTokenizer, load_tokenizer

WORDS = "the of a to and in is it you that he was for on are with as they be at".split()  # noqa: SIM905


def real_rows(directory: Path, count: int) -> Iterator[dict[str, Any]]:
    """Yields `count` rows: those of the files, again and again, each with its own number."""
    paths = sorted(directory.glob("*.jsonl"))
    rows = [json.loads(line) for path in paths for line in path.read_bytes().splitlines()]
    rows = [row for row in rows if {"question", "answer"} <= row.keys()]
    if not rows:
        raise SystemExit(f"no rows of question and answer in {directory}")
    for number, row in enumerate(islice(cycle(rows), count)):
        yield {"question": f"{row['question']} ({number})", "answer": row["answer"]}


def made_up_rows(count: int) -> Iterator[dict[str, str]]:
    """Yields short synthetic conversations of about 60 tokens each."""
    words = random.Random(0)
    for number in range(count):
        question, answer = (" ".join(words.choices(WORDS, k=size)) for size in (15, 30))
        yield {"question": f"{number}: {question}", "answer": answer}


def tool_rows(count: int) -> Iterator[dict[str, Any]]:
    """Yields conversations of ten turns: two questions, each with two calls and their results."""
    city = {"type": "string", "description": "The city, with its country."}
    parameters = {"type": "object", "properties": {"city": city}, "required": ["city"]}
    tools = [
        {
            "type": "function",
            "function": {
                "name": f"get_{kind}",
                "description": f"Gets the {kind} of a city for today.",
                "parameters": parameters,
            },
        }
        for kind in ("weather", "news", "events")
    ]
    for number in range(count):
        messages: list[dict[str, Any]] = []
        for question in range(2):
            messages.append({"role": "user", "content": f"What is up in city {number}?"})
            for kind in ("weather", "news")[: 2 - question]:
                call = {"name": f"get_{kind}", "arguments": {"city": f"City {number}"}}
                identity = f"call{question}{kind[:4]}"
                messages += [
                    {
                        "role": "assistant",
                        "content": "",
                        "tool_calls": [{"id": identity, "type": "function", "function": call}],
                    },
                    {
                        "role": "tool",
                        "tool_call_id": identity,
                        "content": f"The {kind} of city {number}: rain, {number % 30} degrees.",
                    },
                ]
            messages.append({"role": "assistant", "content": f"Rain, {number % 30} degrees."})
        yield {"messages": messages, "tools": tools}


def with_template(tokenizer: Path, source: Path, folder: Path) -> Path:
    """Writes the tokenizer with that chat template as its own into a folder."""
    files = load_tokenizer(tokenizer)
    text = (
        files.to_json() if isinstance(files, TiktokenTokenizer) else files.files["tokenizer.json"]
    )
    folder.mkdir()
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    (folder / "chat_template.jinja").write_text(source.read_text(encoding="utf-8"))
    return folder


def memory_of(pid: int) -> int:
    """Returns the proportional bytes in memory of a process tree: shared pages count once."""
    try:
        pss = Path(f"/proc/{pid}/smaps_rollup").read_text()
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:  # it has ended
        return 0
    mine = next(int(line.split()[1]) for line in pss.splitlines() if line.startswith("Pss:"))
    return mine * 1024 + sum(memory_of(int(child)) for child in children)


def run(folder: Path, tokenizer: Path, workers: int | None, figures: Any) -> None:
    """Prepares the rows in `folder`, in this fresh process."""
    domains = [{"name": "maths", "sources": [{"path": "*.jsonl"}]}]
    data = make_config(
        {
            "data": {
                "root": str(folder),
                "cache_dir": str(folder / "cache"),
                "default_domain": "maths",
                "default_system_prompt": "You are a helpful assistant.",
                "workers": workers,
                "domains": domains,
            }
        }
    ).data
    loaded = load_tokenizer(tokenizer)
    begin = time.perf_counter()
    (cache,) = prepare(data, loaded)
    figures.put((len(cache.lengths), time.perf_counter() - begin))


def measure(rows: Iterator[dict[str, Any]], tokenizer: Path, workers: int | None) -> dict[str, Any]:
    """Writes the rows, prepares them, and returns the figures."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        with open(folder / "rows.jsonl", "w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        figures = context.Queue()
        process = context.Process(target=run, args=(folder, tokenizer, workers, figures))
        process.start()
        peak = _watch(process.is_alive, lambda: memory_of(process.pid or 0))
        process.join()
        kept, seconds = figures.get(timeout=1)
    return {
        "workers": workers or "one a core",
        "conversations": kept,
        "seconds": round(seconds, 2),
        "per_second": round(kept / seconds),
        "peak_mb": round(peak / 1e6),
    }


def _watch(alive: Callable[[], bool], value: Callable[[], int]) -> int:
    peak, pause = 0, threading.Event()
    while alive():
        peak = max(peak, value())
        pause.wait(0.2)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR", help="of GSM8K's training rows")
    parser.add_argument("tokenizer", type=Path, metavar="TOKENIZER", help="its directory")
    parser.add_argument("--rows", type=int, default=50_000, help="for speed")
    parser.add_argument("--made-up-rows", type=int, default=1_000_000, help="for memory; 0: none")
    parser.add_argument("--jinja", type=Path, nargs="*", default=[], metavar="FILE")
    args = parser.parse_args()
    for workers in (1, None):
        rows = real_rows(args.directory, args.rows)
        print(json.dumps({"rows": "real", **measure(rows, args.tokenizer, workers)}))
    with tempfile.TemporaryDirectory() as name:
        for source in args.jinja:
            tokenizer = with_template(args.tokenizer, source, Path(name) / source.stem)
            sets = {
                "real": real_rows(args.directory, args.rows),
                "with tools": tool_rows(args.rows // 5),
            }
            for kind, rows in sets.items():
                told = {"rows": kind, "template": source.stem}
                print(json.dumps(told | measure(rows, tokenizer, None)), flush=True)
    if not args.made_up_rows:
        return
    rows = made_up_rows(args.made_up_rows)
    print(json.dumps({"rows": "made up", **measure(rows, args.tokenizer, None)}))


if __name__ == "__main__":
    main()
