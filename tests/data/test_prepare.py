"""Prepare by blocks: the same on any number of workers, cut short, sharded, or two at once."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moi_jax import config
from moi_jax.common.errors import UserError
from moi_jax.data.cache import blocks as cache_blocks
from moi_jax.data.cache.blocks import lines_beginning
from moi_jax.data.cache.digests import Digests
from moi_jax.data.cache.prepare import DomainCache, prepare_shard
from moi_jax.data.cache.selection import row_counts, select
from moi_jax.data.cache.writer import BlockWriter
from moi_jax.data.sources.readers import SourceFile

from support.hostile_matcher import hostile
from support.processes import start
from support.runs import SAMPLES
from support.sources import TOKENIZER, chat, run, section, texts, write

ROOT = Path(__file__).parents[2]
STEADY = settings(
    deadline=None,
    max_examples=60,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


@pytest.fixture
def tiny_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_blocks, "BLOCK_BYTES", 200)


def everything(cache: DomainCache) -> tuple:
    """All that must not depend on how the cache was made."""
    arrays = (cache.lengths, cache.hashes, cache.source_starts)
    return cache.key, cache.manifest, texts(cache), [array.tolist() for array in arrays]


def rows(count: int, name: str = "Question") -> list[dict]:
    return [chat(f"{name} {n}?", f"Answer {n}.") for n in range(count)]


LINES = st.lists(
    st.sampled_from(
        [
            b"",
            b"  \r",
            b"{oops",
            "7\u2028".encode(),
            json.dumps(chat("Hi", "")).encode(),
            json.dumps(chat("Hi", "Hello.", "Bye?")).encode() + b"\r",
            json.dumps(chat("Häßlich \u2028 ist", "gut.")).encode(),
            json.dumps(chat("Long", "words " * 30)).encode(),
        ]
    ),
    max_size=6,
)
ENDS = st.sampled_from([b"", b"\n", b"\n\n"])


@STEADY
@given(
    st.lists(st.tuples(LINES, ENDS, st.booleans()), min_size=1, max_size=3),
    st.integers(1, 150),
    st.none() | st.integers(1, 6),
)
def test_the_borders_of_blocks_change_nothing(
    tmp_path: Path, files: list, block_bytes: int, max_rows: int | None
) -> None:
    root = tmp_path / "data"
    start = json.dumps(chat("First", "row.")).encode()
    for number, (lines, end, bom) in enumerate(files):
        text = (b"\xef\xbb\xbf" if bom else b"") + b"\n".join([start, *lines]) + end
        (root / "a").mkdir(parents=True, exist_ok=True)
        (root / "a" / f"{number}.jsonl").write_bytes(text)
    for path in (root / "a").iterdir():
        if int(path.stem) >= len(files):
            path.unlink()
    found = []
    for size in (2**23, block_bytes):
        cache_dir = tmp_path / f"cache{size}"
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cache_blocks, "BLOCK_BYTES", size)
            data = section(root, "a", cache_dir=cache_dir, source={"max_rows": max_rows}, workers=1)
            found.append(everything(*run(data)))
    assert found[0] == found[1]


@STEADY
@given(st.lists(st.sampled_from([b"ab", b"\n", b"\r\n", b"c"])), st.data())
def test_lines_are_counted_by_their_first_byte(tmp_path: Path, parts: list, draw: Any) -> None:
    content = b"".join(parts)
    path = tmp_path / "file"
    path.write_bytes(content)
    start = draw.draw(st.integers(0, len(content)))
    end = draw.draw(st.integers(start, len(content)))
    begins = [0, *(n + 1 for n, byte in enumerate(content) if byte == 10)]
    begins = [n for n in begins if n < len(content)]
    assert lines_beginning(path, start, end) == sum(start <= n < end for n in begins)


def test_workers_make_the_same_cache(root: Path, tiny_blocks: None) -> None:
    write(root / "a" / "1.jsonl", *rows(20), b"{oops", *rows(20, "More"))
    write(root / "b" / "1.jsonl", *rows(9, "Other"), chat("Hi", ""))
    write(root / "b" / "2.jsonl", *rows(9, "Last"))
    alone = run(section(root, "a", "b", workers=1, cache_dir=root.parent / "alone"))
    together = run(section(root, "a", "b", workers=3))
    assert [*map(everything, alone)] == [*map(everything, together)]
    assert len(together[0].blocks) > 5


@pytest.mark.parametrize("workers", [1, 2])
def test_the_first_bad_row_is_named_by_its_line_in_the_file(
    root: Path, tiny_blocks: None, workers: int
) -> None:
    write(root / "a" / "1.jsonl", *rows(10), b"", b"{oops", *rows(10), b"{later")
    strict = section(root, "a", on_bad_row="error", workers=workers)
    with pytest.raises(UserError, match=r"a/1\.jsonl:12: invalid_json: .*; fix the row") as found:
        run(strict)
    assert "\n" not in str(found.value)


def test_a_worker_that_dies_is_one_line(
    root: Path, tiny_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "a" / "1.jsonl", *rows(10))
    deadly = hostile(monkeypatch, root, "kill")
    with pytest.raises(UserError, match=r"a worker process died.*set data\.workers below 2"):
        run(section(root, "a", workers=2, decontaminate=deadly))


QUESTION = "A baker sells nine loaves an hour and opens at six how many by noon"


def questions(root: Path, *texts: str) -> dict[str, str]:
    """The decontaminate section of a benchmark with these questions."""
    write(root.parent / "benchmarks" / "test.jsonl", *({"question": text} for text in texts))
    return {"path": str(root.parent / "benchmarks")}


def test_contaminated_rows_are_dropped_or_reported(root: Path, log_text: io.StringIO) -> None:
    found = questions(root, "Something else is asked here.", QUESTION)
    write(
        root / "a" / "1.jsonl",
        chat("Hi", "Hello."),
        chat(f"Tell me: {QUESTION.upper()}?", "54."),
        chat("Ask me.", f"Well, {QUESTION}?"),
        {**chat("Bye", "Bye."), "system": QUESTION},
    )
    plain, dropped, reported = (
        run(section(root, "a", on_bad_row="error", decontaminate=decontaminate))[0]
        for decontaminate in ({}, found, {**found, "on_hit": "report"})
    )
    assert len({plain.key, dropped.key, reported.key}) == 3
    assert dropped.manifest["dropped"] == {"contaminated": 2}
    assert dropped.manifest["contaminated"] == 0
    assert [row["line"] for row in dropped.manifest["examples"]] == [2, 3]
    assert dropped.manifest["examples"][0]["detail"].endswith("test.jsonl:2")
    assert reported.manifest["dropped"] == plain.manifest["dropped"] == {}
    assert reported.manifest["contaminated"] == 2
    assert texts(reported) == texts(plain)
    assert len(texts(dropped)) == 2
    report = row_counts([reported], select([reported], config.HeldOut(), "assistant"))
    assert report["a"]["contaminated"] == 2
    (root.parent / "benchmarks" / "README.md").write_text("no question")
    data = section(root, "a", decontaminate={**found, "on_hit": "report"})
    log_text.truncate(0)
    run(data)
    told = log_text.getvalue()
    assert "looking for copies of 2 benchmark questions" in told
    assert "found no question in README.md" in told
    assert "a keeps 2 rows" in told
    assert "a/1.jsonl:2: shares 13 words in a row with test.jsonl:2" in told
    questions(root, "Another question altogether is what is asked for in this benchmark.")
    assert run(section(root, "a", decontaminate=found))[0].key != dropped.key


def test_an_interrupted_prepare_goes_on_where_it_was(
    root: Path, tiny_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "a" / "1.jsonl", *rows(20))
    expected = everything(*run(section(root, "a", workers=1, cache_dir=root.parent / "other")))
    close, closed = BlockWriter.close, []

    def interrupt(writer: BlockWriter, lines: int) -> None:
        if len(closed) == 3:
            raise KeyboardInterrupt
        closed.append(writer.directory.name.split(".")[0])
        close(writer, lines)

    data = section(root, "a", workers=1)
    monkeypatch.setattr(BlockWriter, "close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(data)
    left = {path.name for path in (root.parent / "cache" / "blocks").iterdir()}
    assert left == set(closed)
    closed.clear()
    monkeypatch.setattr(
        BlockWriter, "close", lambda *arguments: (closed.append(arguments), close(*arguments))
    )
    (cache,) = run(data)
    assert everything(cache) == expected
    assert len(closed) == len(cache.blocks) - 3


SCRIPT = """
import sys
from pathlib import Path
import pytest
from moi_jax.data.cache import blocks as cache_blocks
from support.hostile_matcher import hostile
from support.sources import run, section
if __name__ == "__main__":
    root = Path(sys.argv[1])
    cache_blocks.BLOCK_BYTES = 200
    slow = hostile(pytest.MonkeyPatch(), root, "sleep")
    run(section(root, "a", workers=2, decontaminate=slow))
"""


def start_prepare(root: Path, text: str = SCRIPT) -> subprocess.Popen:
    """A slow prepare in a process with two workers."""
    script = root.parent / "script.py"
    script.write_text(text)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tests")])}
    return start(
        [sys.executable, str(script), str(root)],
        env=environment, stderr=subprocess.PIPE, start_new_session=True,
    )  # fmt: skip


def blocks_of(root: Path) -> dict[str, int]:
    folder = root.parent / "cache" / "blocks"
    found = [path for path in folder.glob("*") if not path.name.endswith(".part")]
    return {path.name: path.stat().st_ino for path in found}


def wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def children(pid: int) -> list[int]:
    return [int(n) for n in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_a_killed_prepare_takes_its_workers_along_and_goes_on(
    root: Path, tiny_blocks: None, monkeypatch: pytest.MonkeyPatch, how: signal.Signals
) -> None:
    write(root / "a" / "1.jsonl", *rows(80))
    process = start_prepare(root)
    wait_for(lambda: len(blocks_of(root)) >= 3)
    workers = children(process.pid)
    assert len(workers) >= 2
    process.send_signal(how)
    process.communicate(timeout=60)
    wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in workers))
    if how == signal.SIGINT:
        assert not list((root.parent / "cache" / "blocks").glob("*.part"))
    finished = blocks_of(root)
    slow = hostile(monkeypatch, root, "sleep")
    (cache,) = run(section(root, "a", workers=1, decontaminate=slow))
    assert 3 <= len(finished) < len(cache.blocks)
    assert finished.items() <= blocks_of(root).items()
    assert len(cache.lengths) == 80
    assert not [*(root.parent / "cache").rglob("*.part"), *(root.parent / "cache").rglob("*.alive")]


def test_two_at_once_end_well(
    root: Path, tiny_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "a" / "1.jsonl", *rows(30))
    processes = [start_prepare(root) for _ in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    slow = hostile(monkeypatch, root, "sleep")
    monkeypatch.setattr(BlockWriter, "add", None)  # all is there
    (cache,) = run(section(root, "a", decontaminate=slow))
    assert len(texts(cache)) == 30
    assert not list((root.parent / "cache").rglob("*.part"))


def test_a_script_without_a_guard_is_told_and_does_not_hang(root: Path) -> None:
    write(root / "a" / "1.jsonl", *rows(30))
    process = start_prepare(root, SCRIPT.replace('__name__ == "__main__"', "True"))
    _, errors = process.communicate(timeout=120)
    assert b"UserError: a worker process died" in errors
    assert b"(your own script needs `if __name__" in errors


def test_shards_prepare_all_blocks_and_a_plain_prepare_assembles(
    root: Path, tiny_blocks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "a" / "1.jsonl", *rows(20))
    write(root / "b" / "1.jsonl", *rows(9, "Other"))
    whole = section(root, "a", "b", workers=1, cache_dir=root.parent / "other")
    expected = [*map(everything, run(whole))]
    data = section(root, "a", "b", workers=1)
    counts = []
    for shard in (2, 1, 3):
        prepare_shard(data, TOKENIZER, shard, 3)
        counts.append(len(blocks_of(root)))
    assert 0 < counts[0] < counts[1] < counts[2]
    monkeypatch.setattr(BlockWriter, "add", None)
    assert [*map(everything, run(data))] == expected


def test_blocks_are_shared_by_domains_and_configs(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(root / "a" / "1.jsonl", *rows(3))
    write(root / "a" / "2.jsonl", *rows(3, "More"))
    (first,) = run(section(root, "a"))
    (root / "a" / "2.jsonl").rename(root / "a" / "0.jsonl")
    write(root / "a" / "3.jsonl", *rows(3, "New"))
    add, added = BlockWriter.add, []

    def count(writer: BlockWriter, *arguments: Any) -> None:
        added.append(writer)
        add(writer, *arguments)

    monkeypatch.setattr(BlockWriter, "add", count)
    (second,) = run(section(root, "a"))
    assert len(added) == 1
    assert set(first.blocks) < set(second.blocks)
    assert texts(second) == [*texts(first)[3:], *texts(first)[:3], *texts(second)[6:]]


def two_sources(root: Path, **second: Any) -> config.Data:
    write(root / "a" / "1.jsonl", *rows(100))
    write(root / "a" / "2.jsonl", *rows(60, "More"), *rows(3))
    domain = {"name": "a", "sources": [{"path": "a/1.jsonl"}, {"path": "a/2.jsonl", **second}]}
    return section(root, "a", domains=[domain])


def test_each_source_holds_out_its_own_share(root: Path) -> None:
    data = two_sources(root, held_out={"fraction": 0.1, "min": 0})
    (cache,) = run(data)
    assert cache.source_starts.tolist() == [0, 100, 163]
    assert cache.source_starts.dtype == np.int64
    share = config.HeldOut(fraction=0.05, min=0)
    (selection,) = select([cache], share, "assistant", data.domains)
    assert [(selection.held_out < 100).sum(), (selection.held_out >= 100).sum()] == [5, 6]
    (selection,) = select([cache], share, "assistant")
    assert [(selection.held_out < 100).sum(), (selection.held_out >= 100).sum()] == [5, 3]
    assert selection.duplicates == 3


def test_max_rows_is_of_each_source(root: Path, tiny_blocks: None) -> None:
    (cache,) = run(two_sources(root, max_rows=7))
    assert cache.source_starts.tolist() == [0, 100, 107]
    assert texts(cache)[100:] == texts(run(two_sources(root))[0])[100:107]


def test_a_large_file_is_hashed_again_only_when_it_changed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("moi_jax.data.cache.digests.REMEMBERED_BYTES", 1)
    monkeypatch.setattr("moi_jax.data.cache.digests.STILL_SECONDS", 0.1)
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"one")
    hashed = []
    digest = SourceFile.digest
    monkeypatch.setattr(SourceFile, "digest", lambda file: (hashed.append(1), digest(file))[1])

    def look() -> str:
        digests = Digests(tmp_path / "cache")
        found = digests.of(SourceFile("rows.jsonl", path))
        digests.save()
        return found

    first = look()  # just written, so it is not remembered
    look()
    assert len(hashed) == 2
    time.sleep(0.2)
    assert [look(), look()] == [first] * 2
    assert len(hashed) == 3
    status = path.stat()
    path.write_bytes(b"two")
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert look() != first
    (tmp_path / "cache" / "digests.json").write_text("{")
    assert look() != first


def command(root: Path, *arguments: str) -> subprocess.CompletedProcess:
    values = {
        "model": {"preset": "tiny"},
        "tokenizer": {"path": str(SAMPLES / "tokenizer")},
        "data": {
            "root": str(root),
            "cache_dir": str(root.parent / "cache"),
            "sequence_length": 256,
            "domains": [{"name": "chat", "sources": [{"path": "a/*.jsonl"}]}],
        },
        "train": {"global_batch_rows": 1},
    }
    path = root.parent / "config.json"
    path.write_text(json.dumps(values))
    return subprocess.run(
        [sys.executable, "-m", "moi_jax.prepare", "--config", str(path), *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip


def test_the_command_shards_and_reports(root: Path) -> None:
    write(root / "a" / "1.jsonl", *rows(40), b"{oops")
    done = command(root, "--shard", "1/1", "--workers", "1")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == "shard 1 of 1: 1 of 1 blocks are prepared\n"
    report = root.parent / "report.json"
    done = command(root, "--report", str(report))
    assert done.returncode == 0, done.stderr
    found = json.loads(report.read_text())
    assert found["domains"]["chat"]["read"] == 41
    assert found["domains"]["chat"]["dropped"]["invalid_json"] == 1
    assert found["mixture"]["domains"]["chat"]["used"] == 36
    assert found["seconds"].keys() == {"prepare", "plan"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--shard", "0/4"], "argument --shard: invalid"),
        (["--shard", "5/4"], "argument --shard: invalid"),
        (
            ["--shard", "1/2", "--report", "r.json"],
            "a --shard does not know the mixture, which --report",
        ),
        (["--report", "nowhere/r.json"], "there is no such directory"),
        (["--workers", "0"], "workers"),
    ],
)
def test_wrong_arguments_are_named(root: Path, arguments: list[str], message: str) -> None:
    root.mkdir()
    done = command(root, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_tfds_set_is_built_and_prepared_like_a_file(root: Path) -> None:
    pairs = [
        {"question": f"{n} + 1?", "answer": f"It is {n + 1}.\n#### {n + 1}"} for n in range(20)
    ]
    write(root / "copies" / "train.jsonl", *pairs)
    write(root / "copies" / "test.jsonl", *pairs[:1])
    write(root / "a" / "1.jsonl", *pairs)
    source = {"path": None, "tfds": "gsm8k", "manual_dir": "copies"}
    (built,) = run(section(root, "a", source=source))
    (plain,) = run(section(root, "a"))
    assert texts(built) == texts(plain)
    assert built.manifest["files"][0]["format"] == "question_answer"
