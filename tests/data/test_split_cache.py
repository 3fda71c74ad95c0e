"""The cache of conversations that a chat template splits into samples, and weights of messages."""

from pathlib import Path

import numpy as np
import pytest

from moi_jax import config
from moi_jax.common.errors import UserError
from moi_jax.data.cache import blocks
from moi_jax.data.cache.domain import DomainCache
from moi_jax.data.cache.prepare import prepare
from moi_jax.data.cache.selection import row_counts, select
from moi_jax.data.cache.writer import changes
from moi_jax.data.loader import PackedInstruction, assemble
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.sources.rows import SourceRow
from moi_jax.text.conversations import Conversation, Message
from moi_jax.text.tokenizer import Tokenizer

from support.sources import TOKENIZER, section, write

# ChatML that shows the thinking of an answer only while no later question follows, as Qwen3 does.
TEMPLATE = """
{%- set at = namespace(last=0) -%}
{%- for m in messages if m.role == 'user' -%}{%- set at.last = at.last + 1 -%}{%- endfor -%}
{%- set at.question = 0 -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set at.question = at.question + 1 -%}{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.reasoning_content and at.question == at.last -%}
{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
SPLITTING = Tokenizer.from_files(
    {**TOKENIZER.files, "chat_template.jinja": TEMPLATE}, "from_checkpoint"
)


def thoughtful(name: str, turns: int, weight: float = 1.0) -> Conversation:
    """A conversation that thinks in every turn, so that each turn is a sample."""
    messages = []
    for turn in range(turns):
        messages.append(Message("user", f"{name} asks {turn}"))
        messages.append(
            Message("assistant", f"Answer {turn}", thinking=f"Thought {turn}", weight=weight)
        )
    return Conversation(tuple(messages))


def plain(name: str, *answers: str) -> Conversation:
    return Conversation(
        tuple(m for a in answers for m in (Message("user", name), Message("assistant", a)))
    )


@pytest.fixture
def prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Prepares one domain whose rows are these conversations."""

    def prepare_rows(*conversations: Conversation, **switches) -> DomainCache:
        write(tmp_path / "data" / "a" / "1.jsonl", {"question": "?", "answer": "!"})
        rows = [SourceRow(n, 1, c) for n, c in enumerate(conversations, 1)]
        monkeypatch.setattr(blocks, "source_rows", lambda *arguments: iter(rows))
        data = section(tmp_path / "data", "a", **{"system_prompts": "none", **switches})
        return prepare(data, SPLITTING)[0]

    return prepare_rows


def text_of(cache: DomainCache, index: int) -> str:
    return SPLITTING.decode(cache.read([index])[0].tokens.tolist())


def test_each_turn_of_a_rewritten_history_is_a_sample(prepared):
    cache = prepared(plain("hello", "hi"), thoughtful("Ann", 3), plain("bye", "ciao"))
    assert cache.samples.tolist() == [0, 0, 1, 2, 0]
    assert cache.conversation_of.tolist() == [0, 1, 1, 1, 2]
    for turn in range(3):
        text = text_of(cache, 1 + turn)
        assert text.endswith(f"Thought {turn}\n</think>\n\nAnswer {turn}<|im_end|>\n")
        assert text.count("<think>") == 1
    whole, turns = cache.hashes[1:4].T
    assert len(set(turns)) == 1
    assert len(set(whole)) == 3
    assert (cache.manifest["kept"], cache.manifest["samples"]) == (3, 5)
    assert (cache.manifest["fast_rows"], cache.manifest["template_rows"]) == (2, 1)
    assert (cache.manifest["split_rows"], cache.manifest["split_samples"]) == (1, 3)
    assert "1 split into 3 samples" in changes(cache.manifest)
    assert cache.source_starts.tolist() == [0, 5]


def test_a_cache_without_split_conversations_has_no_file_of_samples(prepared):
    cache = prepared(plain("hello", "hi"), thoughtful("Ann", 1))
    assert cache.samples is None
    assert not list(cache.directory.parent.rglob("samples.npy"))
    assert not {"samples", "split_rows"} & cache.manifest.keys()


@pytest.mark.parametrize(
    ("history", "kept", "records"), [("split", 2, 4), ("last", 2, 2), ("refuse", 1, 1)]
)
def test_rewritten_history_is_split_cut_to_its_last_turn_or_refused(
    prepared, history, kept, records
):
    cache = prepared(thoughtful("Ann", 3), plain("hello", "hi"), rewritten_history=history)
    assert (cache.manifest["kept"], len(cache.lengths)) == (kept, records)
    assert cache.manifest["dropped"] == ({"rewritten_history": 1} if history == "refuse" else {})
    if history == "last":
        assert "Thought 2" in text_of(cache, 0)


def test_a_refused_history_is_an_error_where_bad_rows_are(prepared):
    with pytest.raises(UserError, match=r"1\.jsonl:1: rewritten_history"):
        prepared(thoughtful("Ann", 3), rewritten_history="refuse", on_bad_row="error")


def test_a_sample_that_is_too_long_is_left_out_alone(prepared):
    whole = prepared(thoughtful("Ann", 3))
    limit = int(whole.lengths[1, 0])
    cache = prepared(thoughtful("Ann", 3), max_instruction_tokens=limit)
    assert cache.lengths.tolist() == whole.lengths[:2].tolist()
    assert cache.samples.tolist() == [0, 1]
    assert (cache.manifest["too_long_samples"], cache.manifest["dropped"]) == (1, {})
    with pytest.raises(UserError, match="tokens, at most"):
        prepared(thoughtful("Ann", 3), max_instruction_tokens=limit, too_long="error")
    short = int(whole.lengths[0, 0]) - 1
    rows = thoughtful("Ann", 3), plain("a", "b")
    assert prepared(*rows, max_instruction_tokens=short).manifest["dropped"] == {"too_long": 1}


def test_max_rows_counts_conversations(prepared):
    sources = [{"path": "a", "max_rows": 2}]
    domains = [{"name": "a", "sources": sources}]
    cache = prepared(*(thoughtful(name, 3) for name in "ABC"), domains=domains)
    assert (cache.manifest["kept"], len(cache.lengths)) == (2, 6)


def test_a_damaged_file_of_samples_is_made_anew(prepared):
    cache = prepared(thoughtful("Ann", 3))
    for path in cache.directory.parent.rglob("samples.npy"):
        path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert prepared(thoughtful("Ann", 3)).samples.tolist() == [0, 1, 2]


def test_hold_out_and_duplicates_keep_the_samples_of_a_conversation_together(prepared):
    rows = [thoughtful(f"Person {n}", 1 + n % 3) for n in range(60)]
    cache = prepared(*rows, *rows[:9])
    (selection,) = select([cache], config.HeldOut(fraction=0.1, min=5), "assistant")
    train, held_out = (
        set(cache.conversation_of[part]) for part in (selection.train, selection.held_out)
    )
    assert not train & held_out
    assert (len(train), len(held_out), selection.duplicates) == (54, 6, 9)
    in_both = np.concatenate([selection.train, selection.held_out])
    assert sorted(in_both.tolist()) == list(range(sum(1 + n % 3 for n in range(60))))
    counts = row_counts([cache], [selection])["a"]
    assert (counts["held_out"], counts["train"]) == (6, 54)
    corpus = Corpus.of_training([cache], [selection], "assistant")
    assert corpus.counts == [54]


def test_a_conversation_is_unplaceable_when_none_of_its_samples_is_left(prepared):
    cache = prepared(plain("hello", "hi"), thoughtful("Ann", 3), plain("bye", "ciao"))
    (selection,) = select([cache], config.HeldOut(fraction=0, min=0), "assistant")
    fewer = selection.keep(np.array([True, False, True, False, False]), cache)
    assert fewer.train.tolist() == [0, 2]
    assert fewer.unplaceable == 1


def test_weights_of_messages_multiply_those_of_the_labels(prepared):
    messages = (
        *(Message("user", "one"), Message("assistant", "two", weight=0.5)),
        *(Message("user", "three"), Message("assistant", "four", weight=2.0)),
    )
    cache = prepared(Conversation(messages), plain("hello", "hi"))
    weighted, unweighted = cache.read([0, 1])
    assert {*weighted.weights.tolist()} == {0.5, 1, 2}
    assert unweighted.weights is None
    batch = assemble(
        [[[PackedInstruction(weighted, 0, 0.25)]], [[PackedInstruction(unweighted, 0, 0.25)]]],
        64,
        9,
        "chunk",
        "assistant",
    )
    text = [SPLITTING.decode([t]) for t in batch.targets[0].tolist()]
    ends = [n for n, piece in enumerate(text) if piece == "<|im_end|>"]
    found = batch.loss_weights[0]
    assert found[ends].tolist() == [0, 0.125, 0, 0.5]  # only answers end with a label
    assert sorted({*found.tolist()}) == [0, 0.125, 0.5]
    assert np.count_nonzero(found == 0.125) == len(SPLITTING.encode("two")) + 1
    assert {*batch.loss_weights[1].tolist()} == {0, 0.25}
