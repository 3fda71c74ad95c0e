"""The cache: what is kept and counted, what the key depends on, and what is held out."""

import io
import multiprocessing
import os
import shutil
import time
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from moi_jax import config
from moi_jax.common.errors import UserError
from moi_jax.data.cache import blocks as cache_blocks
from moi_jax.data.cache import domain as domain_cache
from moi_jax.data.cache import leftovers
from moi_jax.data.cache.prepare import DomainCache
from moi_jax.data.cache.records import from_record, to_record
from moi_jax.data.cache.selection import row_counts, select
from moi_jax.data.cache.writer import BlockWriter
from moi_jax.text.conversations import Conversation, Message, content_hash
from moi_jax.text.instructions import Instruction, loss_tokens
from moi_jax.text.rendering import render
from moi_jax.text.tokenizer import Tokenizer

from support.runs import SAMPLES
from support.sources import TOKENIZER, chat, run, section, texts, write

# A slow machine is no failure.
STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "data"


def test_cache_holds_the_rendered_conversations(root: Path) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."), chat("1+1?", "2", "And 2+2?", "4"))
    write(root / "a" / "2.jsonl", {"question": "Why?", "answer": "Because."})
    (cache,) = run(section(root, "a"))
    expected = render(
        [
            Conversation((Message("user", "Hi"), Message("assistant", "Hello."))),
            Conversation(
                (
                    Message("user", "1+1?"),
                    Message("assistant", "2"),
                    Message("user", "And 2+2?"),
                    Message("assistant", "4"),
                )
            ),
            Conversation((Message("user", "Why?"), Message("assistant", "Because."))),
        ],
        TOKENIZER,
        "Be kind.",
        "append",
    )
    for index, (row,) in enumerate(expected):
        (found,) = cache.read([index])
        np.testing.assert_array_equal(found.tokens, row.tokens)
        np.testing.assert_array_equal(found.spans, row.spans)
        assert cache.lengths[index].tolist() == [len(row.tokens), *loss_tokens(row)]
    assert cache.lengths.dtype == np.int32
    assert cache.hashes.dtype == np.uint64
    assert cache.manifest["files"] == [
        {"name": "a/1.jsonl", "format": "messages", "read": 2, "kept": 2},
        {"name": "a/2.jsonl", "format": "question_answer", "read": 1, "kept": 1},
    ]


def test_samples_of_the_package_are_all_usable(tmp_path: Path) -> None:
    names = ("chat", "code", "maths", "tools")
    domains = [{"name": n, "sources": [{"path": f"{n}.jsonl"}]} for n in names]
    data = section(SAMPLES, *names, domains=domains, cache_dir=tmp_path, on_bad_row="error")
    caches = run(data)
    assert [cache.name for cache in caches] == list(names)
    for cache in caches:
        lines = (SAMPLES / f"{cache.name}.jsonl").read_bytes().splitlines()
        assert len(cache.lengths) == cache.manifest["read"] == len(lines)


def test_every_row_is_accounted_for(root: Path) -> None:
    write(
        root / "a" / "1.jsonl",
        chat("Hi", "Hello."),
        b"{oops",
        chat("Hi", ""),
        chat("Bye", ""),
        chat("Who?", "Me.", "Sure?"),
        chat("Hi", "Hello."),
        chat("Not", "this.", train=False),
    )
    write(root / "b" / "1.jsonl", chat(" Hi\n", "Hello."), chat("New", "text"))
    write(root / "b" / "2.jsonl")
    caches = run(section(root, "a", "b"))
    report = row_counts(caches, select(caches, config.HeldOut(), "assistant"))
    assert report["a"]["dropped"] == {
        "empty_assistant": 2, "invalid_json": 1, "duplicate": 1, "no_loss_tokens": 1,
        "unplaceable": 0,
    }  # fmt: skip
    assert report["a"]["trimmed_user_turn"] == 1
    assert report["b"]["dropped"] == {"duplicate": 1, "no_loss_tokens": 0, "unplaceable": 0}
    assert report["b"]["empty_files"] == ["b/2.jsonl"]
    for domain in report.values():
        used = domain["held_out"] + domain["train"]
        assert domain["read"] == sum(domain["dropped"].values()) + used
    examples = [(e["reason"], e["file"], e["line"]) for e in caches[0].manifest["examples"]]
    assert examples == [
        ("invalid_json", "a/1.jsonl", 2),
        ("empty_assistant", "a/1.jsonl", 3),
        ("empty_assistant", "a/1.jsonl", 4),
    ]


def test_on_bad_row_error_names_file_line_and_reason_cached_or_not(root: Path) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."), chat("Hi", " "))
    strict = section(root, "a", on_bad_row="error")
    message = r"a/1\.jsonl:2: empty_assistant: .*; fix the row or set data\.on_bad_row: drop"
    with pytest.raises(UserError, match=message):
        run(strict)
    (dropped,) = run(section(root, "a"))
    assert len(dropped.lengths) == 1
    with pytest.raises(UserError, match=message):
        run(strict)


def test_on_bad_row_error_refuses_an_empty_file_cached_or_not(root: Path) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."))
    write(root / "a" / "2.jsonl")
    strict = section(root, "a", on_bad_row="error")
    with pytest.raises(UserError, match=r"a/2\.jsonl is empty"):
        run(strict)
    run(section(root, "a"))
    with pytest.raises(UserError, match=r"a/2\.jsonl is empty"):
        run(strict)


def test_domain_without_usable_rows_is_refused_with_counts(root: Path) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", ""), b"7")
    for _ in ("made", "cached"):
        with pytest.raises(
            UserError, match=r"domain a .* a/1\.jsonl: 2 read, .*empty_assistant 1, not_an_object 1"
        ):
            run(section(root, "a"))


def test_domain_of_empty_files_alone_is_refused(root: Path) -> None:
    write(root / "a" / "1.jsonl")
    with pytest.raises(UserError, match=r"domain a has no usable row in a/1\.jsonl: 0 read"):
        run(section(root, "a"))


def test_mixture_without_domains_is_refused(root: Path) -> None:
    with pytest.raises(UserError, match=r"data\.domains is empty"):
        run(config.Data(root=root))


def test_file_in_two_domains_is_refused(root: Path) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."))
    (root / "b").mkdir()
    (root / "b" / "1.jsonl").symlink_to(root / "a" / "1.jsonl")
    with pytest.raises(UserError, match=r"b/1\.jsonl is listed twice, in domain a and in domain b"):
        run(section(root, "a", "b"))


LONG = [f"{word} text of some length, in words" for word in "abcdef"]


def tokens_of(*turns: str) -> int:
    messages = [Message(m["role"], m["content"]) for m in chat(*turns)["messages"]]
    ((row,),) = render([Conversation(tuple(messages))], TOKENIZER, "Be kind.", "append")
    return len(row.tokens)


def test_truncated_conversation_equals_the_shorter_one(root: Path) -> None:
    write(root / "a" / "1.jsonl", chat(*LONG), chat("short", "one"), chat(*["x" * 500] * 2))
    write(root / "b" / "1.jsonl", chat(*LONG[:4]), chat("other", "one"))
    limit = tokens_of(*LONG) - 1
    long, short = run(section(root, "a", "b", max_instruction_tokens=limit))
    assert texts(long) == [texts(short)[0], texts(long)[1]]
    assert long.hashes[0].tolist() == short.hashes[0].tolist()
    assert long.manifest["truncated_turns"] == 1
    assert long.manifest["dropped"] == {"too_long": 1}
    assert long.lengths[0].tolist() == short.lengths[0].tolist()


def test_too_long_drops_or_refuses_and_an_exact_fit_stays(root: Path) -> None:
    write(root / "a" / "1.jsonl", chat("short", "one"), chat(*LONG))
    length = tokens_of(*LONG)
    (fits,) = run(section(root, "a", too_long="error", max_instruction_tokens=length))
    assert fits.lengths[1, 0] == length
    (dropped,) = run(section(root, "a", too_long="drop", max_instruction_tokens=length - 1))
    assert dropped.manifest["dropped"] == {"too_long": 1}
    with pytest.raises(UserError, match=rf"a/1\.jsonl:2: {length} tokens, at most {length - 1}"):
        run(section(root, "a", too_long="error", sequence_length=length - 1))


def test_drop_row_drops_rows_with_a_system_turn_of_their_own(root: Path) -> None:
    own = chat("Hi", "Hello.")
    own["messages"].insert(0, {"role": "system", "content": "Mine."})
    write(root / "a" / "1.jsonl", own, chat("Bye", "Bye."))
    (kept,) = run(section(root, "a"))
    assert kept.manifest["own_system"] == 1
    assert [row.row_system for row in kept.read([0, 1])] == ["Mine.", ""]
    (dropped,) = run(section(root, "a", row_system="drop_row", on_bad_row="error"))
    assert dropped.manifest["dropped"] == {"has_system": 1}


def test_max_rows_keeps_the_first_usable_rows_of_a_source(root: Path) -> None:
    rows = [chat(f"Question {n}", f"Answer {n}") for n in range(5)]
    write(root / "a" / "1.jsonl", rows[0], b"{oops", rows[1])
    write(root / "a" / "2.jsonl", rows[2], chat("Hi", ""), rows[3], rows[4])
    (cache,) = run(section(root, "a", source={"max_rows": 3}))
    assert [f"Question {n}" in text for n, text in enumerate(texts(cache))] == [True] * 3
    assert cache.manifest["read"] == 4
    assert cache.manifest["dropped"] == {"invalid_json": 1}


def change(data: config.Data, **keys: Any) -> config.Data:
    return config.Data(**{**data.model_dump(), **keys})


def test_key_depends_on_what_decides_the_content_alone(root: Path) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."), chat("Bye", "Bye."))
    base = section(root, "a")

    def key(data: config.Data, tokenizer: Tokenizer = TOKENIZER) -> str:
        return run(data, tokenizer)[0].key

    domain = base.domains[0].model_dump()
    other_tokenizer = Tokenizer.from_files(
        {"tokenizer.json": TOKENIZER.files["tokenizer.json"] + "\n"}
    )
    moved = root.parent / "moved"
    shutil.copytree(root, moved)
    (moved / "a" / "1.jsonl").rename(moved / "a" / "renamed.jsonl")
    assert run(base)[0].manifest["files"][0]["name"] == "a/1.jsonl"
    assert run(change(base, root=moved))[0].manifest["files"][0]["name"] == "a/renamed.jsonl"
    same = [
        change(base, held_out={"fraction": 0.1}, max_repeats=2, on_bad_row="error"),
        change(base, strategy="sequence", sampling="proportional", packing="none"),
        change(base, domains=[{**domain, "name": "b"}], default_domain="b"),
        change(base, root=moved),
        change(base, max_instruction_tokens=base.sequence_length),
    ]
    different = [
        change(base, default_system_prompt="Be rude."),
        change(base, system_prompts="none"),
        change(base, row_system="keep"),
        change(base, too_long="drop"),
        change(base, sequence_length=512),
        change(base, domains=[{**domain, "prompt": "Mine."}]),
        section(root, "a", source={"max_rows": 1}),
        section(root, "a", source={"format": "messages"}),
    ]
    assert {key(data) for data in same} == {key(base)}
    keys = [key(base), *map(key, different), key(base, other_tokenizer)]
    write(root / "a" / "1.jsonl", chat("Hi", "Hello!"))
    keys.append(key(base))
    assert len(set(keys)) == len(different) + 3


def test_second_prepare_reads_the_cache_and_says_so(
    root: Path, monkeypatch: pytest.MonkeyPatch, log_text: io.StringIO
) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."), chat("Hi", ""))
    (first,) = run(section(root, "a"))
    monkeypatch.setattr(BlockWriter, "add", None)
    log_text.truncate(0)
    (second,) = run(section(root, "a"))
    assert "a: cached, 1 of 2 rows kept" in log_text.getvalue()
    assert texts(first) == texts(second)
    assert first.manifest == second.manifest


def test_interrupted_prepare_leaves_nothing(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."))

    def interrupt(writer: BlockWriter, lines: int) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(BlockWriter, "close", interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(section(root, "a"))
    assert list((root.parent / "cache" / "blocks").iterdir()) == []
    monkeypatch.undo()
    assert len(run(section(root, "a"))[0].lengths) == 1


@pytest.mark.parametrize("module", [cache_blocks, domain_cache])
def test_prepare_that_comes_second_takes_the_first_ones_cache(
    root: Path, monkeypatch: pytest.MonkeyPatch, module: ModuleType
) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."))
    move = cache_blocks.move_into_place
    others: list[DomainCache] = []

    def be_overtaken(part: Path, directory: Path) -> None:
        monkeypatch.undo()
        others.extend(run(section(root, "a")))
        move(part, directory)

    monkeypatch.setattr(module, "move_into_place", be_overtaken)
    (cache,) = run(section(root, "a"))
    assert texts(cache) == texts(others[0])
    (block,) = cache.blocks
    found = {path for path in (root.parent / "cache").rglob("*") if path.is_dir()}
    assert found == {cache.directory, block.parent, block}


def test_cache_is_read_from_threads_and_a_spawned_process(root: Path) -> None:
    write(root / "a" / "1.jsonl", *(chat(f"Question {n}", f"Answer {n}") for n in range(200)))
    (cache,) = run(section(root, "a"))
    expected = texts(cache)
    orders = [np.random.default_rng(n).permutation(200) for n in range(40)]
    with ThreadPoolExecutor(8) as threads:
        for order, found in zip(
            orders, threads.map(lambda order: texts(cache, order), orders), strict=True
        ):
            assert found == [expected[n] for n in order]
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as child:
        assert child.submit(texts, cache).result() == expected
    assert cache.read([]) == []


@STEADY
@given(
    hnp.arrays(np.int32, st.integers(0, 20)),
    st.integers(0, 1000),
    hnp.arrays(np.int32, st.tuples(st.integers(0, 5), st.just(3))),
    st.sampled_from(["", "\0"]).flatmap(lambda begin: st.text(max_size=10).map(begin.__add__)),
    st.none() | st.lists(st.floats(0, 9, width=32)),
    st.text(max_size=10),
)
def test_record_round_trip(
    tokens: np.ndarray,
    system_length: int,
    spans: np.ndarray,
    text: str,
    weights: list[float] | None,
    conversation: str,
) -> None:
    of_spans = None if weights is None else np.array(weights, np.float32)
    back = from_record(
        to_record(Instruction(tokens, system_length, spans, text, of_spans, conversation))
    )
    assert (None if back.weights is None else back.weights.tolist()) == weights
    assert back.conversation == conversation
    np.testing.assert_array_equal(back.tokens, tokens)
    np.testing.assert_array_equal(back.spans, spans)
    assert (back.system_length, back.row_system) == (system_length, text)
    assert back.tokens.dtype == back.spans.dtype == np.int32


@pytest.mark.parametrize(
    ("rows", "fraction", "least", "expected"),
    [
        (9, 0.02, 16, 0),  # 10 % of 9
        (100, 0.02, 16, 10),
        (160, 0.02, 16, 16),
        (1000, 0.02, 16, 20),
        (1001, 0.02, 16, 21),
        (100, 0.07, 0, 7),
        (150, 0.02, 0, 3),
        (100, 0.0, 0, 0),
        (100, 0.0, 3, 3),
    ],
)
def test_number_held_out(
    tmp_path: Path, rows: int, fraction: float, least: int, expected: int
) -> None:
    cache = memory_cache("a", range(1, rows + 1))
    (selection,) = select([cache], config.HeldOut(fraction=fraction, min=least), "assistant")
    assert len(selection.held_out) == expected
    together = np.concatenate([selection.train, selection.held_out])
    assert sorted(together.tolist()) == list(range(rows))
    for indices in (selection.train, selection.held_out):
        assert indices.dtype == np.int64
        assert (np.diff(indices) > 0).all()


def memory_cache(name: str, hashes: Any, losses: tuple[int, int] = (4, 6)) -> DomainCache:
    hashes = np.array([[h, h] for h in hashes], np.uint64)
    lengths = np.tile(np.array([10, *losses], np.int32), (len(hashes), 1))
    starts = np.array([0, len(hashes)])
    return DomainCache(name, Path(), "", lengths, hashes, {}, starts, (Path(),), starts)


HASHES = st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=60)


@STEADY
@given(HASHES, HASHES, st.randoms())
def test_selection_depends_on_content_and_shares_nothing(
    first: list[int], second: list[int], random: Any
) -> None:
    second = [*second, *first[:5], 2**63 + 1, *second[:3]]
    first = [h for h in first if h != 2**63 + 1] or [1]
    caches = [memory_cache("a", first), memory_cache("b", second)]
    a, b = select(caches, config.HeldOut(fraction=0.1, min=2), "assistant")
    parts = [set(caches[0].hashes[part, 0]) for part in (a.train, a.held_out)]
    parts += [set(caches[1].hashes[part, 0]) for part in (b.train, b.held_out)]
    assert sum(map(len, parts)) == len(set().union(*parts)) == len({*first, *second})
    assert parts[0] | parts[1] == set(first)
    assert len(a.train) + len(a.held_out) + a.duplicates == len(first)
    assert len(b.train) + len(b.held_out) + b.duplicates == len(second)
    random.shuffle(first)
    shuffled = memory_cache("a", first)
    again, _ = select([shuffled, caches[1]], config.HeldOut(fraction=0.1, min=2), "assistant")
    assert set(shuffled.hashes[again.held_out, 0]) == parts[1]


def test_rows_without_loss_tokens_are_counted_by_targets() -> None:
    caches = [memory_cache("a", range(20), losses=(0, 3)), memory_cache("b", range(20, 40))]
    official = select(caches, config.HeldOut(), "qwen_official")
    assert [len(s.train) for s in official] == [18, 18]
    with pytest.raises(UserError, match="domain a has nothing to train on: 20 rows without loss"):
        select(caches, config.HeldOut(), "assistant")


def test_row_without_loss_does_not_displace_its_trainable_twin(root: Path) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello.", train=False), chat("Hi", "Hello."))
    caches = run(section(root, "a"))
    (selection,) = select(caches, config.HeldOut(), "assistant")
    assert selection.train.tolist() == [1]
    assert (selection.no_loss_tokens, selection.duplicates) == (1, 0)


def test_of_equal_conversations_the_one_with_most_labels_stays(root: Path) -> None:
    turns = ("Hi", "Hello.", "And?", "Well.", "Bye", "Bye.")
    half = chat(*turns)
    half["messages"][1]["weight"] = 0
    write(root / "a" / "1.jsonl", half, chat("Other", "text"))
    write(root / "b" / "1.jsonl", half, chat(*turns), chat(*turns), chat("Other", "text"))
    caches = run(section(root, "a", "b"))
    first, second = select(caches, config.HeldOut(), "assistant")
    assert (first.train.tolist(), first.duplicates) == ([1], 1)
    assert (second.train.tolist(), second.duplicates) == ([1], 3)


def test_cached_hash_is_the_content_hash(root: Path) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."))
    (cache,) = run(section(root, "a"))
    same = Conversation((Message("user", "Hi"), Message("assistant", "Hello.")))
    assert cache.hashes.tolist() == [[content_hash(same.messages)] * 2]


def with_system(row: dict, text: str) -> dict:
    return {**row, "system": text}


def test_no_turns_of_a_held_out_conversation_are_in_training(root: Path) -> None:
    """Neither under another system text of the row's own, nor in another domain."""
    pairs = [chat(f"Question {n}?", f"Answer {n}.") for n in range(60)]
    write(root / "a" / "1.jsonl", *pairs, *(with_system(row, "Be short.") for row in pairs))
    write(root / "b" / "1.jsonl", *(with_system(row, "Be long.") for row in pairs[:40]))
    caches = run(section(root, "a", "b"))
    selections = select(caches, config.HeldOut(), "assistant")
    both = list(zip(caches, selections, strict=True))
    held = {text for cache, s in both for text in texts(cache, s.held_out)}
    trained = {text for cache, s in both for text in texts(cache, s.train)}
    assert len(selections[0].held_out) >= 10
    assert not held & trained
    assert len(held | trained) == 60
    for cache, s in both:
        assert sorted([*s.train, *s.held_out]) == list(range(len(cache.lengths)))


def test_a_replaced_system_text_does_not_tell_two_rows_apart(root: Path) -> None:
    rows = [with_system(chat("Hi", "Hello."), text) for text in ("One.", "Two.")]
    write(root / "a" / "1.jsonl", *rows)
    counts = {}
    for mode in ("append", "replace"):
        caches = run(section(root, "a", row_system=mode))
        (selection,) = select(caches, config.HeldOut(), "assistant")
        counts[mode] = len(selection.train), selection.duplicates
    assert counts == {"append": (2, 0), "replace": (1, 1)}


@pytest.mark.parametrize(
    "name",
    [
        "{domain}/manifest.json",
        "{domain}/blocks.json",
        "{domain}/lengths.npy",
        "{domain}/hashes.npy",
        "{block}/counts.json",
        "{block}/lengths.npy",
        "{block}/instructions.array_record",
    ],
)
def test_a_cache_that_was_cut_short_is_made_anew(root: Path, name: str) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."), chat("Bye", "Bye."))
    (first,) = run(section(root, "a"))
    expected = texts(first)
    path = Path(name.format(domain=first.directory, block=first.blocks[0]))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (again,) = run(section(root, "a"))
    assert texts(again) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("{domain}/manifest.json", "{domain}/blocks.json", "{domain}/lengths.npy"),
        *("{domain}/hashes.npy", "{domain}/SHA256SUMS", "{block}/counts.json"),
        *("{block}/lengths.npy", "{block}/hashes.npy", "{block}/SHA256SUMS"),
    ],
)
def test_one_flipped_bit_anywhere_is_noticed_and_mended(
    root: Path, log_text: io.StringIO, name: str
) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."), chat("Bye", "Bye."))
    (first,) = run(section(root, "a"))
    path = Path(name.format(domain=first.directory, block=first.blocks[0]))
    right = path.read_bytes()
    for place in range(0, len(right), 7):
        wrong = bytearray(right)
        wrong[place] ^= 1 << place % 8
        path.write_bytes(wrong)
        if "{block}" in name:  # its arrays are looked at where a domain is put together
            shutil.rmtree(first.directory)
        log_text.truncate(0)
        (again,) = run(section(root, "a"))
        assert "is damaged and is made anew" in log_text.getvalue().replace("\n", " "), place
        assert path.read_bytes() == right, place
        assert texts(again) == texts(first)


def test_one_flipped_bit_of_a_record_is_noticed_when_it_is_read(root: Path) -> None:
    write(root / "a" / "1.jsonl", *(chat(f"Question {n}", f"Answer {n}") for n in range(5)))
    (cache,) = run(section(root, "a"))
    expected = texts(cache)
    path = cache.blocks[0] / "instructions.array_record"
    right = path.read_bytes()
    noticed = 0
    for place in range(0, len(right), 501):  # most of the file is padding that nobody reads
        wrong = bytearray(right)
        wrong[place] ^= 1
        path.write_bytes(wrong)
        domain_cache._reader.cache_clear()
        try:
            assert texts(cache) == expected
        except UserError as error:
            noticed += "is damaged" in str(error)
    assert noticed > 1


def test_a_cache_damaged_inside_is_named_when_it_is_read(root: Path) -> None:
    write(root / "a" / "1.jsonl", *(chat(f"Question {n}", f"Answer {n}") for n in range(200)))
    (cache,) = run(section(root, "a"))
    path = cache.blocks[0] / "instructions.array_record"
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 2000] = bytes(2000)
    path.write_bytes(content)
    domain_cache._reader.cache_clear()
    with pytest.raises(UserError, match=f"cache of domain a is damaged.*delete {cache.blocks[0]}"):
        cache.read(range(200))


@pytest.mark.skipif(not leftovers.BOOT_ID.exists(), reason="only Linux tells which machine it is")
def test_folders_of_a_killed_run_are_swept_at_once_and_those_of_a_living_one_stay(
    root: Path,
) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."))
    cache, blocks = root.parent / "cache", root.parent / "cache" / "blocks"
    living = leftovers.running([cache, blocks], "living")
    with living:
        for folder in (cache, blocks):
            for name in ("living", "dead", "elsewhere"):
                (folder / f"key.1.{name}.part").mkdir()
        (cache / f"dead.{leftovers._boot()}.alive").touch()
        (cache / "elsewhere.another-boot.alive").touch()
        run(section(root, "a"))
        left = sorted(path.name for path in cache.rglob("*.part"))
        assert left == [f"key.1.{name}.part" for name in ("elsewhere", "living") for _ in "12"]
    assert {path.name.split(".")[0] for path in cache.glob("*.alive")} == {"elsewhere"}
    assert len([*cache.rglob("*.part")]) == 2


def test_a_folder_left_by_a_killed_process_is_swept_after_a_day(root: Path) -> None:
    write(root / "a" / "1.jsonl", chat("Hi", "Hello."))
    for folder in (root.parent / "cache", root.parent / "cache" / "blocks"):
        old, young = (folder / f"{name}.part" for name in ("old", "young"))
        for part in (old, young):
            part.mkdir(parents=True)
        os.utime(old, times=(time.time() - 2 * 24 * 3600,) * 2)
    run(section(root, "a"))
    found = [path.name for path in (root.parent / "cache").rglob("*.part")]
    assert found == ["young.part", "young.part"]
