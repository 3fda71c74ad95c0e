"""The preview and its audit under a checkpoint's own template: thinking, calls, samples."""

import io
import json
import random
from dataclasses import replace

import pytest
import yaml
from rich.console import Console

from moi_jax.config.load import load_config
from moi_jax.data.cache.domain import DomainCache
from moi_jax.data.preview.audit import audit
from moi_jax.data.preview.parts import find_parts, token_ends
from moi_jax.data.preview.picture import draw_row
from moi_jax.data.preview.preview import show_statistics
from moi_jax.data.preview.row import print_row, view_row

from support.runs import open_data
from support.sources import TOKENIZER

# Writes calls and results in marks of its own, and thinking after the last question alone.
TEMPLATE = """
{%- set at = namespace(last=0, question=0) -%}
{%- for m in messages if m.role == 'user' -%}{%- set at.last = at.last + 1 -%}{%- endfor -%}
{%- if tools -%}{{- '<|im_start|>system\\n' + tools | tojson + '<|im_end|>\\n' -}}{%- endif -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set at.question = at.question + 1 -%}{%- endif -%}
{{- '<|im_start|>' + m.role + '\\n' -}}
{%- if m.reasoning_content and at.question == at.last -%}
{{- '<think>\\n' + m.reasoning_content + '\\n</think>\\n\\n' -}}
{%- endif -%}
{{- m.content or '' -}}
{%- for call in m.tool_calls or [] -%}
{{- 'CALL ' + {'name': call.function.name, 'arguments': call.function.arguments} | tojson -}}
{%- endfor -%}
{{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}
"""
LOOK = {
    "type": "function",
    "function": {
        "name": "look",
        "description": "Looks.",
        "parameters": {"type": "object", "properties": {"at": {"type": "string"}}},
    },
}


def turn(role: str, content: str, **keys) -> dict:
    return {"role": role, "content": content, **keys}


def called(number: int) -> list[dict]:
    """A question, a call, its result and the answer."""
    function = {"name": "look", "arguments": json.dumps({"at": f"sky {number}"})}
    calls = [{"type": "function", "id": f"call_{number}", "function": function}]
    return [
        turn("user", f"Sky {number}?"),
        turn("assistant", "", tool_calls=calls, reasoning_content=f"I look {number}."),
        turn("tool", f"blue {number}", tool_call_id=f"call_{number}"),
        turn("assistant", f"It is blue {number}.", weight=0.5),
    ]


def rows(rng: random.Random) -> list[dict]:
    """Plain conversations, conversations that are split, and calls of tools."""
    found: list[dict] = []
    for number in range(24):
        messages = called(number) if number % 3 == 0 else []
        for exchange in range(rng.randint(1, 3)):
            thought = {"reasoning_content": f"Hm {exchange}."} if number % 2 else {}
            words = " ".join(rng.choices(["red", "blue", "café", "fünf", "六", "eight"], k=8))
            messages += [turn("user", f"{words} {number}"), turn("assistant", words, **thought)]
        found.append({"messages": messages, **({"tools": [LOOK]} if number % 3 == 0 else {})})
    return [*found, {"messages": [*called(99), *called(100)], "tools": [LOOK]}]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    root = tmp_path_factory.mktemp("parts")
    folder = root / "tokenizer"
    folder.mkdir()
    for name, text in TOKENIZER.files.items():
        (folder / name).write_text(text, encoding="utf-8")
    (folder / "chat_template.jinja").write_text(TEMPLATE, encoding="utf-8")
    lines = [json.dumps(row) for row in rows(random.Random(0))]
    (root / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    values = {
        "model": {"preset": "tiny"},
        "tokenizer": {"path": str(folder)},
        "data": {
            "root": str(root),
            "cache_dir": str(root / "cache"),
            "sequence_length": 256,
            "system_prompts": "none",
            "held_out": {"fraction": 0, "min": 0},
            "domains": [{"name": "chat", "sources": [{"path": "chat.jsonl"}]}],
        },
        "train": {"epochs": 3, "global_batch_rows": 2},
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def audited(dataset, reader) -> str | None:
    train = [selection.train for selection in dataset.selections]
    records = [len(cache.lengths) for cache in dataset.caches]
    total = range(reader.plan.total_rows)
    return audit(reader, train, records, dataset.tokenizer, total)


def opened(config, *overrides):
    dataset = open_data(load_config(config, overrides))
    return dataset, dataset.batch_reader(dataset.plan())


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        ("data.rewritten_history=last", "loss.normalization=domain"),
        ("data.rewritten_history=refuse", "loss.normalization=instruction"),
        ("data.thinking=drop", "data.tools=react"),
        ("data.thinking=last", "data.max_instruction_tokens=100"),
        ("data.max_instruction_tokens=60", "data.too_long=drop"),
    ],
)
def test_the_audit_passes_under_a_template_of_the_checkpoint(config, overrides):
    dataset, reader = opened(config, *overrides)
    assert dataset.caches[0].manifest["template_rows"] > 0
    assert audited(dataset, reader) is None


def test_the_audit_finds_a_weight_that_is_not_the_messages(config, monkeypatch):
    dataset, reader = opened(config)
    read = DomainCache.read

    def unweighted(cache, indices):
        return [replace(one, weights=None) for one in read(cache, indices)]

    monkeypatch.setattr(DomainCache, "read", unweighted)
    assert "loss_weights is 1.0 in the batch, 0.5 from the sources" in audited(dataset, reader)


def pieces(dataset, index: int) -> list[tuple[str, str]]:
    """(kind, text) of each part of an instruction."""
    (instruction,) = dataset.caches[0].read([index])
    tokens = instruction.tokens.tolist()
    parts = find_parts(tokens, instruction.conversation, dataset.tokenizer)
    # A token may hold the space before a word.
    return [
        (part.kind, dataset.tokenizer.decode(tokens[part.start : part.end]).strip())
        for part in parts
    ]


def test_thinking_calls_and_results_are_told_apart_by_the_words_of_the_row(config):
    dataset, _ = opened(config)
    last = len(dataset.caches[0].lengths) - 1  # both calls; the thinking of the first is left out
    assert pieces(dataset, last) == [
        ("call", '{"name": "look", "arguments": {"at": "sky 99"}}'),
        ("result", "blue 99"),
        ("thinking", "I look 100."),
        ("call", '{"name": "look", "arguments": {"at": "sky 100"}}'),
        ("result", "blue 100"),
    ]


def test_common_marks_tell_the_parts_where_the_words_are_not_known():
    text = (
        "a <think>é\u0301 so</think> b <tool_call>{}</tool_call> <tool_response>6</tool_response>"
    )
    tokens = TOKENIZER.encode(text)
    shown = [
        (kind, TOKENIZER.decode(tokens[start:end]).strip())
        for start, end, kind in find_parts(tokens, "", TOKENIZER)
    ]
    assert [kind for kind, _ in shown] == ["thinking", "call", "result"]
    assert "so</think>" in shown[0][1]


def test_the_ends_of_tokens_are_found_in_linear_work(monkeypatch):
    tokens = TOKENIZER.encode("<think> naïve 世界 😀😀 é\u0301\n\n  def f(x):\n\treturn 1 " * 5)
    wanted = [len(TOKENIZER.decode(tokens[: n + 1])) for n in range(len(tokens))]
    decode, decoded = TOKENIZER.decode, []

    def counted(ids):
        decoded.append(len(ids))
        return decode(ids)

    monkeypatch.setattr(TOKENIZER, "decode", counted)
    assert token_ends(tokens, TOKENIZER) == wanted
    assert sum(decoded) < 5 * len(tokens)


def test_a_row_shows_samples_weights_and_the_colours_of_parts(config, tmp_path):
    dataset, reader = opened(config)
    out = Console(file=io.StringIO(), width=60, force_terminal=True, color_system="standard")
    for row in range(reader.plan.total_rows):
        print_row(view_row(reader, row, dataset.tokenizer), dataset.tokenizer, out)
    text = out.file.getvalue()
    assert ", sample 1 of 2, tokens" in text
    assert "with loss of weights 0.5, 1, segment" in text
    assert "\x1b[1;36mI look 100." in text
    assert '\x1b[1;33m {"name": "look"' in text
    assert "\x1b[2;34mblue 100" in text
    draw_row(view_row(reader, 0, dataset.tokenizer), tmp_path / "row.svg")
    drawn = (tmp_path / "row.svg").read_text()
    assert all(f">{word}<" in drawn for word in ("parts", "thinking", "result"))


def test_the_statistics_tell_how_rows_were_rendered_and_split(config, log_text):
    dataset, _ = opened(config)
    chat = show_statistics(dataset)["domains"]["chat"]
    manifest = dataset.caches[0].manifest
    assert chat["template_rows"] + chat["fast_rows"] == manifest["kept"] == 25
    assert chat["split_samples"] - chat["split_rows"] == manifest["samples"] - 25
    assert f"{chat['split_rows']} split into {chat['split_samples']} samples" in log_text.getvalue()
