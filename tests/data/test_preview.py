"""The preview: rows as text, pictures, figures that add up, and an audit that finds every fault."""

import io
import json
import random
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import yaml
from rich.console import Console

from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config
from moi_jax.data import loader
from moi_jax.data.preview.audit import audit
from moi_jax.data.preview.picture import attention, draw_lengths, draw_row
from moi_jax.data.preview.row import print_row, view_row
from moi_jax.data.preview.statistics import accounts
from moi_jax.text.instructions import label_mask

from support.runs import ROOT, SAMPLES, open_data, small_config

# An "e" with a combining accent, which the tokenizer composes, and a line separator among them.
WORDS = "red blue café naïve drei\nvier fünf 六 seven ٩ ten \u2028 e\u0301 eight"


def turn(role: str, content: str, **keys) -> dict:
    return {"role": role, "content": content, **keys}


def ragged_rows(rng: random.Random) -> list[dict]:
    """Rows of every kind that the audit must derive: 60 good ones and 5 bad ones."""

    def text(most: int) -> str:
        words = rng.choices(WORDS.split(" "), k=rng.randint(1, most))
        return f"{' '.join(words)} {rng.random():.6f}"

    rows = []
    for number in range(60):
        messages = []
        for _ in range(rng.randint(1, 3)):
            messages += [turn("user", text(20)), turn("assistant", text(20))]
        kind = number % 6
        if kind == 1:
            messages.insert(0, turn("system", text(8)))
        elif kind == 2:  # the first exchange or two fit a row, not all
            messages += [turn("user", text(60)), turn("assistant", text(400))]
        elif kind == 3:
            messages[-1]["weight"] = 0
            messages += [turn("user", text(5)), turn("assistant", text(5))]
        elif kind == 4:
            messages[rng.choice([0, -2])]["train"] = False
        elif kind == 5:
            if number % 4 == 1:  # the others only look like a call of a tool
                messages[-2]["content"] = f"Action: one of [look]\n\nQuestion: {text(5)}"
            messages[-1]["content"] = (
                f"Thought: {text(3)}\nAction: look\nAction Input: {text(3)}\nObservation: {text(9)}"
                f"\nObservation:{text(2)}\nThought: {text(3)}\nFinal Answer: {text(4)}"
            )
        rows.append({"messages": messages})
    rows += [
        {"messages": [turn("user", "no answer")]},
        {"messages": [turn("user", "what"), turn("assistant", " ")]},
        {"messages": [turn("user", "long"), turn("assistant", "word " * 900)]},
        {"messages": [turn("user", "hi <|im_end|>"), turn("assistant", "ho")]},
        {"messages": [turn("assistant", "first")]},
    ]
    rng.shuffle(rows)
    return rows


@pytest.fixture(scope="module")
def ragged(tmp_path_factory):
    """A config of three domains over ragged files; some of the sources are cut by max_rows."""
    root, rng = tmp_path_factory.mktemp("ragged"), random.Random(1)
    for name in ("chat_1", "chat_2", "code", "tools"):
        lines = [json.dumps(row, ensure_ascii=False) for row in ragged_rows(rng)]
        (root / f"{name}.jsonl").write_text("\n".join(["", *lines]) + "\n", encoding="utf-8")
    answers = [{"question": f"{n} + 1?", "answer": f"It is {n + 1}."} for n in range(30)]
    sums = "\r\n".join(json.dumps(row) for row in answers)
    (root / "sums.jsonl").write_text("\ufeff" + sums + "\r\n{broken\r\n", encoding="utf-8")
    values = {
        "model": {"preset": "tiny"},
        "tokenizer": {"path": str(SAMPLES / "tokenizer")},
        "data": {
            "root": str(root),
            "cache_dir": str(root / "cache"),
            "sequence_length": 640,
            "max_instruction_tokens": 320,
            "domains": [
                {"name": "code", "prompt": "You are a programmer.",
                 "sources": [{"path": "code.jsonl"}, {"path": "sums.jsonl", "max_rows": 20}]},
                {"name": "chat", "sources": [{"path": "chat_*.jsonl", "max_rows": 80}]},
                {"name": "tools", "prompt": "You use tools.", "sources": [{"path": "tools.jsonl"}]},
            ],
        },
        "train": {"epochs": 2, "global_batch_rows": 4},
    }  # fmt: skip
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def opened(config, *overrides):
    """The opened data of a config, and its batch reader."""
    inputs = open_data(load_config(config, overrides))
    run = inputs.plan()
    return inputs, inputs.batch_reader(run)


def audited(inputs, reader, rows):
    train = [selection.train for selection in inputs.selections]
    records = [len(cache.lengths) for cache in inputs.caches]
    return audit(reader, train, records, inputs.tokenizer, rows)


def some_rows(reader, count=12):
    return random.Random(0).sample(range(reader.plan.total_rows), count)


STRATEGIES = ("sequence", "packing", "balance", "moi")
NORMALIZATIONS = ("token", "instruction", "domain")


@pytest.mark.parametrize("targets", ["assistant", "qwen_official"])
@pytest.mark.parametrize("normalization", NORMALIZATIONS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_the_audit_passes_for_every_strategy_and_loss(ragged, strategy, normalization, targets):
    inputs, reader = opened(
        ragged,
        f"data.strategy={strategy}",
        f"loss.normalization={normalization}",
        f"loss.targets={targets}",
    )
    assert audited(inputs, reader, some_rows(reader)) is None


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.mask=chunk", "data.sampling=proportional", "data.chunk_size=3"],
        ["data.mask=row", "data.order=shuffled"],
        ["data.mask=instruction", "data.order=config"],
        ["data.row_system=replace"],
        ["data.row_system=keep"],
        ["data.row_system=drop_row"],
        ["data.system_prompts=none", "loss.targets=qwen_official"],
        ["data.system_prompts=default"],
        ["data.too_long=drop", "loss.normalization=domain"],
        ["data.sampling=weights", "data.unit=loss_tokens", "data.chunk_size=2"],
        ["data.stages=[{begins: 0}, {begins: 5, sampling: temperature, temperature: 2.0}]"],
        ["data.decontaminate.path=ROOT/benchmarks", "data.domains.0.sources.0.weight=2"],
    ],
    ids=" ".join,
)
def test_the_audit_passes_under_every_switch_of_the_data(ragged, overrides):
    benchmarks = ragged.parent / "benchmarks"
    benchmarks.mkdir(exist_ok=True)
    rows = [
        json.loads(line) for line in (ragged.parent / "code.jsonl").read_text().split("\n") if line
    ]
    asked = [row["messages"][0]["content"] for row in rows[:20]]
    asked = [text for text in asked if len(text.split()) > 13]
    (benchmarks / "test.jsonl").write_text(
        "".join(json.dumps({"question": text}) + "\n" for text in asked)
    )
    inputs, reader = opened(
        ragged, *(text.replace("ROOT", str(ragged.parent)) for text in overrides)
    )
    contaminated = [cache.manifest["dropped"].get("contaminated", 0) for cache in inputs.caches]
    assert any(contaminated) == ("decontaminate" in overrides[0])
    assert audited(inputs, reader, some_rows(reader)) is None


def test_the_audit_passes_where_an_exchange_just_fits(ragged):
    inputs, _ = opened(ragged)
    instructions = inputs.caches[0].read(range(len(inputs.caches[0].lengths)))
    turns = [np.flatnonzero(i.tokens == inputs.tokenizer.template.turn) for i in instructions]
    # System, user, assistant, and where the next exchange begins.
    limit = next(int(begins[3]) for begins in turns if len(begins) > 3 and begins[3] > 100)
    inputs, reader = opened(ragged, f"data.max_instruction_tokens={limit}")
    assert (inputs.caches[0].lengths[:, 0] == limit).any()
    assert audited(inputs, reader, some_rows(reader)) is None


def test_the_ragged_rows_are_of_every_kind(ragged):
    inputs, _ = opened(ragged)
    manifests = [cache.manifest for cache in inputs.caches]
    for count in ("own_system", "truncated_turns"):
        assert all(manifest[count] > 3 for manifest in manifests), count
    reasons = set().union(*(manifest["dropped"] for manifest in manifests))
    assert {"too_long", "control_tokens", "no_assistant", "empty_assistant"} <= reasons
    read = {file["name"]: file["kept"] for m in manifests for file in m["files"]}
    assert read["sums.jsonl"] == 20  # of 30
    assert read["chat_1.jsonl"] + read["chat_2.jsonl"] == 80
    tools = inputs.caches[2].read(range(len(inputs.caches[2].lengths)))
    trained = [inputs.tokenizer.decode(r.tokens[label_mask(r, "assistant")]) for r in tools]
    react = [text for text in trained if "Action: look" in text]
    assert {"Observation:\nThought:" in text for text in react} == {True, False}


@pytest.mark.parametrize("array", loader.Batch._fields)
def test_the_audit_finds_one_wrong_token_of_any_array(ragged, monkeypatch, array):
    inputs, reader = opened(ragged)
    row = some_rows(reader, 1)[0]
    right = reader.read([row])
    token = int(np.flatnonzero(right.loss_weights[0])[7])

    def rows(numbers):
        wrong = getattr(right, array).copy()
        wrong[0, token] += 1
        return right._replace(**{array: wrong})

    monkeypatch.setattr(reader, "read", rows)
    difference = audited(inputs, reader, [row])
    assert difference.startswith(f"row {row}, token {token} (domain ")
    assert f"): {array} is " in difference
    assert ".jsonl:" in difference


def test_the_audit_finds_a_label_too_many_in_the_padding(ragged, monkeypatch):
    inputs, reader = opened(ragged)
    row = next(r for r in range(99) if not reader.read([r]).segment_ids[0, -1])
    right = reader.read([row])
    wrong = right.loss_weights.copy()
    wrong[0, -1] = 1
    monkeypatch.setattr(reader, "read", lambda numbers: right._replace(loss_weights=wrong))
    assert audited(inputs, reader, [row]) == (
        f"row {row}, token 639 (padding): loss_weights is 1.0 in the batch, 0.0 from the sources"
    )


def test_the_audit_finds_weights_of_another_normalization(ragged, monkeypatch):
    inputs, reader = opened(ragged, "loss.normalization=domain")
    monkeypatch.setattr(loader, "label_weights", lambda plan, group, _: np.full(len(group), 1.001))
    assert "loss_weights is 1.00" in audited(inputs, reader, some_rows(reader))


def test_the_audit_finds_a_cache_with_other_rows(ragged, monkeypatch):
    inputs, reader = opened(ragged)
    reader._caches = [reader._caches[0]] * 3
    reader._train = [train % len(inputs.caches[0].lengths) for train in reader._train]
    assert "from the sources" in audited(inputs, reader, some_rows(reader))


def test_the_audit_finds_rows_missing_from_the_cache(ragged):
    inputs, reader = opened(ragged)
    train = [selection.train for selection in inputs.selections]
    records = [len(cache.lengths) for cache in inputs.caches]
    records[1] -= 1
    difference = audit(reader, train, records, inputs.tokenizer, [0])
    assert difference == "domain chat: 79 instructions in the cache, 80 usable rows in the sources"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A config of one domain with two conversations, whose rows are known by heart."""
    root = tmp_path_factory.mktemp("tiny")
    rows = [
        [turn("user", "Hi"), turn("assistant", "No.", weight=0),
         turn("user", "So?"), turn("assistant", "Yes.")],
        [turn("system", "Be\x1b[2Jkind."), turn("user", "Ho"), turn("assistant", "Good day!")],
    ]  # fmt: skip
    lines = [json.dumps({"messages": messages}) for messages in [*rows, rows[0], rows[0][:1]]]
    (root / "chat.jsonl").write_text("\n".join(lines), encoding="utf-8")
    values = {
        "model": {"preset": "tiny"},
        "tokenizer": {"path": str(SAMPLES / "tokenizer")},
        "data": {
            "root": str(root),
            "cache_dir": str(root / "cache"),
            "sequence_length": 128,
            "domains": [{"name": "chat", "sources": [{"path": "chat.jsonl"}]}],
        },
        "train": {"steps": 1, "global_batch_rows": 1},
    }
    path = root / "config.yaml"
    path.write_text(yaml.safe_dump(values), encoding="utf-8")
    return path


def printed(config, *overrides, **console) -> str:
    inputs, reader = opened(config, *overrides)
    out = Console(file=io.StringIO(), width=60, **console)
    print_row(view_row(reader, 0, inputs.tokenizer), inputs.tokenizer, out)
    return out.file.getvalue()


FIRST = """\
<|im_start|>system
You are a helpful assistant.<|im_end|>
<|im_start|>user
Hi<|im_end|>
<|im_start|>assistant
No.<|im_end|>
<|im_start|>user
So?<|im_end|>
<|im_start|>assistant
⟦Yes.<|im_end|>⟧
"""
SECOND = """\
<|im_start|>system
You are a helpful assistant.

Be\\u001b[2Jkind.<|im_end|>
<|im_start|>user
Ho<|im_end|>
<|im_start|>assistant
⟦Good day!<|im_end|>⟧
"""


def test_a_row_without_colour_has_its_labels_between_brackets(tiny):
    text = printed(tiny)
    assert FIRST in text
    assert SECOND in text
    assert "\x1b" not in text
    lines = text.splitlines()
    assert lines[0].startswith("row 0 (epoch 0, row 0 of 1): ")
    assert "2 chunks; attention stays inside a chunk" in lines[0]
    assert sum(line.startswith("━━ chunk ") for line in lines) == 2
    assert sum(line.startswith("── chat ") for line in lines) == 2
    assert lines[-1].startswith("━━ padding, ")


def test_no_color_in_the_environment_gives_brackets_too(tiny, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    text = printed(tiny, force_terminal=True, color_system="truecolor")
    assert "⟦Good day!<|im_end|>⟧" in text


def test_a_trained_line_end_shows_inside_the_brackets(tiny):
    text = printed(tiny, "loss.targets=qwen_official")
    assert "helpful assistant.⟦<|im_end|>↵<|im_start|>⟧user" not in text
    assert "assistant.⟦<|im_end|>\n<|im_start|>⟧user\nHi⟦<|im_end|>↵⟧\n" in text


def test_a_row_in_colour_has_labels_in_green_and_no_brackets(tiny):
    text = printed(tiny, force_terminal=True, color_system="standard")
    assert "⟦" not in text
    assert "\x1b[1;32mGood day!" in text
    assert "\x1b[2mHo" in text


def test_a_view_has_the_borders_of_the_plan(ragged):
    inputs, reader = opened(ragged, "data.strategy=balance")
    view = view_row(reader, 1, inputs.tokenizer)
    domains = np.full(640, -1)
    for member in view.members:
        domains[member.start : member.end] = view.domains.index(member.domain)
    np.testing.assert_array_equal(domains, view.batch.domain_ids)
    assert all([m.domain for m in group] == ["chat", "code", "tools"] for group in view.groups)
    # A label stands one token behind its weight.
    np.testing.assert_array_equal(view.trained[1:], view.batch.loss_weights[:-1] > 0)


@pytest.mark.parametrize("mask", ["chunk", "row", "instruction"])
def test_the_attention_of_a_picture_is_causal_inside_a_segment(ragged, mask):
    inputs, reader = opened(ragged, f"data.mask={mask}")
    view = view_row(reader, 0, inputs.tokenizer)
    seen, batch = attention(view, 640), view.batch
    for query in range(0, 640, 7):
        for key in range(0, 640, 5):
            same = batch.segment_ids[query] == batch.segment_ids[key] > 0
            expected = batch.domain_ids[key] + 1 if same and key <= query else 0
            assert seen[query, key] == expected
    np.testing.assert_array_equal(attention(view, 100), seen[::7, ::7])


@pytest.mark.parametrize("kind", ["png", "svg"])
def test_the_picture_of_a_row_is_the_same_file_every_time(ragged, tmp_path, kind):
    inputs, reader = opened(ragged)
    for name in ("one", "two"):
        draw_row(view_row(reader, 0, inputs.tokenizer), tmp_path / f"{name}.{kind}")
    one, two = (tmp_path / f"{name}.{kind}" for name in ("one", "two"))
    assert one.read_bytes() == two.read_bytes()
    draw_row(view_row(reader, 1, inputs.tokenizer), two)
    assert one.read_bytes() != two.read_bytes()


def test_lengths_are_drawn(ragged, tmp_path):
    inputs, _ = opened(ragged)
    draw_lengths(inputs.corpus, 640, tmp_path / "lengths.svg")
    text = (tmp_path / "lengths.svg").read_text()
    assert all(name in text for name in ("chat", "code", "tools", "a row of 640"))


def test_accounts_that_do_not_add_up_are_a_fault_of_ours():
    dropped = {"duplicate": 2, "x": 0}
    domain = {"read": 9, "dropped": dropped, "held_out": 1, "used": 4, "unplaced": 1}
    right = {"domains": {"chat": {**domain, "not_drawn": 1}}}
    assert accounts(right) == {
        "chat": "9 read = 2 dropped (duplicate 2) + 1 held out + 4 used + 1 unplaced + 1 not drawn"
    }
    with pytest.raises(RuntimeError, match="chat: 9 rows read, 8 accounted for"):
        accounts({"domains": {"chat": {**domain, "not_drawn": 0}}})


def preview(monkeypatch, capsys, *arguments) -> tuple[int, str, str]:
    """Exit status, standard output and standard error of the command."""
    monkeypatch.setattr(sys, "argv", ["preview", *map(str, arguments)])
    with pytest.raises(SystemExit) as left:
        runpy.run_module("moi_jax.preview", run_name="__main__")
    out, err = capsys.readouterr()
    return left.value.code, out, err


def test_the_command_shows_rows_on_standard_output_alone(tiny, monkeypatch, capsys):
    status, out, err = preview(monkeypatch, capsys, "--config", tiny)
    assert status == 0
    assert FIRST in out
    assert out.startswith("⟦text that carries loss⟧, ")
    assert "rows kept" not in out
    assert "rows kept" in err


def test_overrides_may_stand_anywhere(tiny, monkeypatch, capsys):
    arguments = ("--config", tiny, "train.steps=3", "--row", "1", "data.mask=row")
    status, out, _ = preview(monkeypatch, capsys, *arguments)
    assert status == 0
    assert "\nrow 1 (epoch 1, row 0 of 1): " in out
    assert "attention stays inside a row" in out


def test_instructions_drawn_one_by_one_have_no_border_of_a_group(tiny):
    text = printed(tiny, "data.sampling=proportional", "data.mask=chunk")
    assert "2 instructions; attention stays inside an instruction" in text
    borders = [line[:2] for line in text.splitlines() if line[:1] in ("━", "─")]
    assert borders == ["──", "──", "━━"]


def test_the_account_of_a_domain_is_told(tiny, monkeypatch, capsys):
    status, out, _ = preview(monkeypatch, capsys, "--config", tiny, "--stats")
    assert status == 0
    dropped = "2 dropped (no_assistant 1, duplicate 1)"
    assert f"chat: 4 read = {dropped} + 0 held out + 2 used + 0 unplaced + 0 not drawn" in out
    assert "chat: dropped 1 no_assistant, for example chat.jsonl:4" in out


def long_chat(directory: Path) -> Path:
    """A config of one chat of 300 turns and a question, which is cut to fit a row."""
    text = [turn(r, f"{n}: one two three") for n in range(150) for r in ("user", "assistant")]
    row = {"messages": [*text, turn("user", "Bye")], "system": "Be brief."}
    (directory / "chat.jsonl").write_text(json.dumps(row), encoding="utf-8")
    data = {"domains": [{"name": "chat", "sources": [{"path": "chat.jsonl"}]}]}
    return small_config(directory, data={**data, "root": str(directory)})


def test_what_rows_that_are_kept_have_lost_is_told(tmp_path, monkeypatch, capsys):
    config = long_chat(tmp_path)
    inputs, _ = opened(config)
    (row,) = inputs.caches[0].read([0])
    cut = 300 - np.count_nonzero(row.tokens == inputs.tokenizer.template.turn) + 1
    changed = f"1 truncated by {cut} turns, 1 without their last user turn, "
    changed += "1 with a system text of their own"
    status, out, err = preview(monkeypatch, capsys, "--config", config, "--stats")
    assert status == 0
    assert cut > 250
    assert f"chat: cached, 1 of 1 rows kept ({changed}), " in err.replace("\n", "")
    assert f"chat: rows kept: {changed}\n" in out
    _, out, _ = preview(monkeypatch, capsys, "--config", config, "--stats", "--json")
    counts = {"own_system": 1, "trimmed_user_turn": 1, "truncated_turns": 1, "cut_turns": cut}
    assert json.loads(out)["domains"]["chat"].items() >= {**counts, "contaminated": 0}.items()


def test_json_is_alone_on_standard_output_and_keeps_its_contract(ragged, monkeypatch, capsys):
    status, out, err = preview(monkeypatch, capsys, "--config", ragged, "--stats", "--json")
    assert status == 0
    assert "Mixture of one epoch" in err
    told = json.loads(out)
    assert told.keys() >= {
        "fill", "rows", "steps_per_epoch", "tokens", "loss_tokens", "moved_share",
        "domains_per_row", "domains",
    }  # fmt: skip
    assert list(told["domains"]) == ["code", "chat", "tools"]
    for domain in told["domains"].values():
        assert domain.keys() >= {
            "read", "dropped", "held_out", "used", "occurrences", "mean_repeats", "max_repeats",
            "tokens", "loss_tokens",
        }  # fmt: skip
        parts = sum(domain["dropped"].values()) + domain["held_out"] + domain["used"]
        assert domain["read"] == parts + domain["unplaced"] + domain["not_drawn"]
    assert told["tokens"] == sum(d["tokens"] for d in told["domains"].values())
    assert told["fill"] == told["tokens"] / (told["rows"] * 640)


def test_the_audit_of_the_command_ends_with_its_verdict(ragged, monkeypatch, capsys):
    arguments = ("--config", ragged, "--audit", 3, "--seed", 5)
    status, out, _ = preview(monkeypatch, capsys, *arguments)
    assert (status, out) == (0, "audit: 3 rows of 640 tokens equal\n")
    monkeypatch.setattr(loader, "label_weights", lambda plan, group, _: np.full(len(group), 2.0))
    status, out, _ = preview(monkeypatch, capsys, *arguments)
    assert status == 1
    assert out.startswith("audit: row ")
    assert "loss_weights is 2.0 in the batch, 1.0 from the sources" in out


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--row", "1"], "error: there is no row 1: the run has the rows 0 to 0"),
        (["--png", "row.gif"], "error: row.gif: the name of a picture must end in .png or .svg"),
        (["--json"], "error: --json needs --stats; add it or leave out --json"),
        (["--seed", "0"], "error: --seed needs --audit; add it or leave out --seed"),
        (["--stats", "--rows", "1"], "error: --rows shows rows in the terminal; leave it out"),
        (["--audit", "1", "--row", "0"], "error: --row chooses a row for the terminal or --png; "),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_and_exit_status_2(tiny, monkeypatch, capsys, arguments, line):
    status, out, err = preview(monkeypatch, capsys, "--config", tiny, *arguments)
    assert (status, out) == (2, "")
    assert err.splitlines()[-1].startswith(line)


def test_a_picture_that_cannot_be_written_is_the_users_mistake(tiny, tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "folder.png").mkdir()
    inputs, reader = opened(tiny)
    from moi_jax.data.preview.picture import check_picture

    with pytest.raises(UserError, match="cannot write"):
        check_picture(tmp_path / "file" / "row.png")
    with pytest.raises(UserError, match="cannot write"):
        draw_row(view_row(reader, 0, inputs.tokenizer), tmp_path / "folder.png")


def test_the_pictures_of_the_docs_are_drawn(tmp_path):
    script = [sys.executable, "docs/draw_strategies.py", str(tmp_path)]
    assert subprocess.run(script, cwd=ROOT, capture_output=True, check=False).returncode == 0
    for strategy in STRATEGIES:
        for directory in (tmp_path, ROOT / "docs"):
            size = (directory / f"strategy_{strategy}.png").stat().st_size
            assert 10_000 < size < 60_000
    assert (tmp_path / "row.svg").exists()
