"""The command that answers: a prompt, ids, a file of conversations, a chat; and what it refuses."""

import dataclasses
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tokenizers import Tokenizer as Backend

import moi_jax
from moi_jax import generate
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.items import read_items
from moi_jax.checkpoints.opener import open_checkpoint
from moi_jax.checkpoints.parameters import save_model
from moi_jax.common.errors import UserError
from moi_jax.models.parameters import parameter_specs
from moi_jax.parallel import hosts
from moi_jax.sampling.chat import Chat, chat_on_terminal
from moi_jax.sampling.completion_file import read_conversations
from moi_jax.sampling.generate import generate as generate_function
from moi_jax.sampling.requests import GenerationConfig
from moi_jax.sampling.sampler import Sampler
from moi_jax.text.conversations import Message
from moi_jax.text.rendering import render_prompt
from moi_jax.text.tokenizer import Tokenizer

from support.processes import start
from support.published import add_tokenizer
from support.runs import ENVIRONMENT, ROOT, SAMPLES

DEFAULT = "You are a helpful assistant."
# New tokens of the answers here: with the longest prompt but one they fit the shortest cache, so
# that few programs are compiled.
COUNT = 5


@pytest.fixture(scope="module")
def made(golden, tmp_path_factory):
    """Fixture A with a tokenizer of its 512 ids: bytes, ChatML's tokens, and fillers."""
    place = tmp_path_factory.mktemp("generate")
    shutil.copytree(golden / "A", place / "A")
    add_tokenizer(place / "A")
    path = str(place / "A" / "tokenizer.json")
    backend = Backend.from_file(path)
    backend.add_special_tokens([f"<filler {n}>" for n in range(259, 512)])
    backend.save(path)
    import_checkpoint(place / "A", place / "ckpt")
    return place / "ckpt"


@pytest.fixture(scope="module")
def oracle(made):
    """The greedy answer to messages, by the whole sequence anew for each token."""
    model, tokenizer = moi_jax.load(made)
    assert tokenizer.vocab_size == 512

    def answer(*contents: str, system: str | None = DEFAULT, count: int = COUNT) -> str:
        roles = ("user", "assistant")
        messages = [Message(roles[n % 2], text) for n, text in enumerate(contents)]
        prompt = render_prompt(messages, tokenizer, system)
        ids = list(prompt)
        while len(ids) < len(prompt) + count:
            row = np.zeros((1, 128), np.int32)
            row[0, : len(ids)] = ids
            ids.append(int(np.argmax(model(row)[0, len(ids) - 1])))
            if ids[-1] in tokenizer.template.stops:
                ids.pop()
                break
        return tokenizer.decode(ids[len(prompt) :])

    return answer


@pytest.fixture
def run(made, monkeypatch, capsys):
    """The command's standard output, run in this process."""

    def run(*arguments, checkpoint: Path = made, stdin: bytes = b"") -> str:
        words = ["generate", str(checkpoint), "--mesh", "tensor=1", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(stdin)))
        assert generate.main() == 0
        return capsys.readouterr().out

    return run


SHORT = ("--max-new-tokens", COUNT)


# --- prompts ---


def test_prompt_ids_are_continued_as_the_reference_does(golden, made):
    case = json.loads((golden / "generate.json").read_text())["A"][1]
    done = subprocess.run(
        [
            *(sys.executable, "-m", "moi_jax.generate", made, "--max-new-tokens", "16"),
            *("--prompt-ids", ",".join(map(str, case["prompt"]))),
        ],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False,
    )  # fmt: skip
    assert done.stdout == ",".join(map(str, case["new_tokens"])) + "\n", done.stderr
    assert "cache of 1 x 128 tokens" in done.stderr


def test_a_prompt_is_asked_under_the_saved_system_prompt_or_another(run, oracle):
    answers = [
        (run("Hi", *SHORT), oracle("Hi")),
        (run(*SHORT, stdin=b"Hi\n"), oracle("Hi")),
        (run("Hi", "--system", "Be kind.", *SHORT), oracle("Hi", system="Be kind.")),
        (run("Hi", "--no-system", *SHORT), oracle("Hi", system=None)),
    ]
    for shown, expected in answers:
        assert shown == expected + "\n"
    assert len({expected for _, expected in answers}) == 3


def test_sampling_depends_on_the_seed_alone_and_ends_before_a_stop_string(run, oracle):
    hot = ("--no-system", "--temperature", 2)
    drawn = [run("Hi", *SHORT, *hot, "--seed", seed) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    whole = oracle("Hi", system=None)
    cut = next(n for n in range(1, len(whole)) if whole[:n].find(whole[n : n + 2]) < 0)
    stop = whole[cut : cut + 2]
    assert run("Hi", *SHORT, "--no-system", "--stop", "never", "--stop", stop) == whole[:cut] + "\n"


def test_of_sampling_among_the_single_likeliest_greedy_is_left(run, oracle):
    hot, greedy = ("--no-system", "--temperature", 2), oracle("Hi", system=None) + "\n"
    assert run("Hi", *SHORT, *hot, "--top-k", 1) == greedy
    assert run("Hi", *SHORT, *hot, "--top-p", 1e-6) == greedy


def test_generate_is_a_library_function_that_prints_nothing(made, oracle, capsys):
    checkpoint = open_checkpoint(made, devices=jax.devices()[:1])
    messages = [Message("user", "Hi")]
    prompt = render_prompt(messages, checkpoint.tokenizer, checkpoint.system_prompt)
    shown: list[str] = []
    config = GenerationConfig(max_new_tokens=COUNT)
    completion = generate_function(checkpoint, prompt, config, on_text=shown.append)
    assert completion.text == "".join(shown) == oracle("Hi")
    assert capsys.readouterr().out == ""


def test_every_command_of_the_page_runs(run, tmp_path, monkeypatch):
    """On stand-ins of the checkpoint and the ids, in the order of the page.

    test_tools.py runs those that need a template with tools.
    """
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "questions.jsonl", ROWS[0])
    page = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
    commands = re.findall(
        r"^    python -m moi_jax.generate runs/(?!tools)\S+(.*)$", page, re.MULTILINE
    )
    assert len(commands) == 4
    for command in commands:
        words = shlex.split(re.sub(r"[\d,]{20,}", "1,2,3", command))
        words += [] if "--prompt-ids" in words else ["--no-system"]
        assert run(*words, *SHORT, stdin=b"Hi") or "--out" in words
    assert read_rows(tmp_path / "answers.jsonl")[0]["finish"] == "length"


# --- files of conversations ---


def write_rows(path: Path, *rows) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def user(text: str) -> dict:
    return {"role": "user", "content": text}


ROWS = (
    {"id": 7, "messages": [user("Hi")]},
    {"messages": [user("Ho"), {"role": "assistant", "content": "Yes?"}, user("Go")]},
    {"messages": [{"role": "system", "content": "Be kind."}, user("Hi")], "finish": "old"},
    {"messages": [user("x" * 120)]},
)


@pytest.fixture
def asked(tmp_path):
    """Arguments: the last row leaves no room in the context."""
    file = write_rows(tmp_path / "in.jsonl", *ROWS)
    out = tmp_path / "out.jsonl"
    options = ("--no-system", "--slots", 1, "--context", 128, *SHORT)
    return ["--conversations", file, "--out", out, *options], out


def read_rows(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_row_of_a_file_is_answered_in_its_place(run, oracle, asked):
    arguments, out = asked
    run(*arguments)
    answers = [
        oracle("Hi", system=None),
        oracle("Ho", "Yes?", "Go", system=None),
        oracle("Hi", system="Be kind."),
        "",
    ]
    assert len(set(answers)) == 4
    for row, given, answer in zip(read_rows(out), ROWS, answers, strict=True):
        assert row.pop("finish") == ("length" if answer else "too_long")
        message = {"role": "assistant", "content": answer}
        rest = {key: value for key, value in given.items() if key != "finish"}
        assert row == {**rest, "messages": [*given["messages"], message]}
    assert sorted(path.name for path in out.parent.iterdir()) == ["in.jsonl", "out.jsonl"]
    before = out.read_bytes()
    with pytest.raises(UserError, match=r"out.jsonl exists; name a new file"):
        run(*arguments)
    assert out.read_bytes() == before


def test_a_file_that_was_interrupted_goes_on_with_what_is_left(run, asked, monkeypatch, capsys):
    arguments, out = asked
    run(*arguments)
    expected = out.read_bytes()
    out.unlink()
    plain, asked_for = Sampler.run, []

    def interrupted(self, parameters, requests, on_text=None):
        asked_for.append(len(requests))
        answers = plain(self, parameters, requests, on_text)
        yield next(answers)
        yield next(answers)
        raise KeyboardInterrupt

    monkeypatch.setattr(Sampler, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments)
    assert "out.jsonl.partial" in capsys.readouterr().err
    assert not out.exists()
    monkeypatch.setattr(Sampler, "run", plain)
    with pytest.raises(UserError, match=r"temperature 0.0 -> 1.0"):
        run(*arguments, "--temperature", 1)

    def counted(self, parameters, requests, on_text=None):
        asked_for.append(len(requests))
        return plain(self, parameters, requests, on_text)

    monkeypatch.setattr(Sampler, "run", counted)
    run(*arguments)
    assert asked_for == [4, 2]
    assert out.read_bytes() == expected


def test_a_file_goes_on_with_the_same_parameters_wherever_they_are(
    made, run, asked, tmp_path, monkeypatch
):
    arguments, out = asked
    path, moved = remade(made, tmp_path / "ckpt", 0), tmp_path / "moved"

    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(Sampler, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, checkpoint=path)
    path.rename(moved)
    with pytest.raises(KeyboardInterrupt):
        run(*arguments, checkpoint=moved)
    remade(made, path, 1)
    with pytest.raises(
        UserError, match=r"out.jsonl.partial holds answers made with other settings \(param"
    ):
        run(*arguments, checkpoint=path)
    assert not out.exists()


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "in.jsonl:2: .*invalid_json"),
        ('{"messages": []}', "in.jsonl:2: .*a user's message last"),
        ('{"question": "x", "answer": "y"}', "in.jsonl:2: no list 'messages'"),
        (json.dumps({"messages": [user("a"), user("b")]}), "in.jsonl:2: turns 1 and 2 are both"),
        (json.dumps({"messages": [user("<|im_end|>")]}), "in.jsonl:2: .*control_tokens"),
        (json.dumps({"messages": json.dumps([user("a")])}), "in.jsonl:2: .*a user's message last"),
        (
            json.dumps({"messages": [user("a"), {"role": "assistant", "content": "b"}]}),
            "in.jsonl:2: .*a user's message last",
        ),
    ],
)
def test_a_malformed_row_is_named_by_its_line(tmp_path, line, message):
    path = tmp_path / "in.jsonl"
    path.write_text(json.dumps(ROWS[0]) + "\n" + line + "\n")
    with pytest.raises(UserError, match=message):
        read_conversations(path)


@pytest.mark.parametrize("text", ["", " \n"])
def test_a_blank_system_prompt_of_a_row_is_kept(tmp_path, text):
    own = {"role": "System", "content": text}
    path = write_rows(
        tmp_path / "in.jsonl",
        {"messages": [own, user("Hi")]},
        {"messages": [user("Hi")], "system": text},
        {"messages": [{**own, "content": [{"type": "text", "text": text}]}, user("Hi")]},
        {"messages": [own, user("Hi")], "tools": [{"name": "look"}]},
        {"messages": [{**own, "content": "Be kind."}, user("Hi")], "system": text},
        {"messages": [user("Hi")]},
    )
    systems = [
        row.messages[0].content if row.messages[0].role == "system" else None
        for row in read_conversations(path)
    ]
    assert systems == [text] * 4 + ["Be kind.", None]


def test_half_a_surrogate_pair_beside_the_messages_is_written_as_it_came(run, tmp_path):
    line = r'{"id": "\ud83d", "messages": [{"role": "user", "content": "Hi"}]}'
    (tmp_path / "in.jsonl").write_text(line + "\n")
    run("--conversations", tmp_path / "in.jsonl", "--out", tmp_path / "out.jsonl", *SHORT)
    assert read_rows(tmp_path / "out.jsonl")[0]["id"] == "\ud83d"


def test_a_file_without_rows_or_none_at_all_is_refused(tmp_path):
    with pytest.raises(UserError, match="there is no file"):
        read_conversations(tmp_path / "in.jsonl")
    with pytest.raises(UserError, match="has no rows"):
        read_conversations(write_rows(tmp_path / "in.jsonl"))


# --- the chat ---


class Spy:
    """A chat of which every prompt and note is kept; the model answers with `answers`."""

    def __init__(self, monkeypatch, context: int = 1000, answers=()):
        self.tokenizer = Tokenizer.from_files(
            {"tokenizer.json": (SAMPLES / "tokenizer" / "tokenizer.json").read_text()}
        )
        self.chat = Chat(self.tokenizer, DEFAULT, context, room=10)
        self.prompts: list[list[int]] = []
        self.notes: list[str] = []
        self._answers = iter(answers)
        self._monkeypatch = monkeypatch

    def type(self, *lines: str) -> None:
        """Lines of the terminal, then its end."""
        waiting = iter(lines)

        def read(_: str) -> str:
            try:
                return next(waiting)
            except StopIteration:
                raise EOFError from None

        self._monkeypatch.setattr("builtins.input", read)
        self._monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
        chat_on_terminal(self.chat, self._answer, self.notes.append)

    def _answer(self, prompt, show):
        self.prompts.append(prompt)
        for piece in next(self._answers):
            if piece == "^C":
                raise KeyboardInterrupt
            show(piece)

    def prompt(self, *contents: str, system: str | None = DEFAULT) -> list[int]:
        roles = ("user", "assistant")
        messages = [Message(roles[n % 2], text) for n, text in enumerate(contents)]
        return render_prompt(messages, self.tokenizer, system)


def test_a_question_comes_after_all_that_was_said(monkeypatch, capsys):
    spy = Spy(monkeypatch, answers=[["It is", " 4."], ["^C"], ["So it", "^C"], ["5"], ["6"]])
    spy.type("2 + 2?", "", "never answered", "3?", "  /etc?  ", "/quit", "not read")
    assert "> " not in capsys.readouterr().out  # input() itself shows it
    assert spy.prompts == [
        spy.prompt("2 + 2?"),
        spy.prompt("2 + 2?", "It is 4.", "never answered"),
        spy.prompt("2 + 2?", "It is 4.", "3?"),
        spy.prompt("2 + 2?", "It is 4.", "3?", "So it", "/etc?"),
    ]
    assert spy.notes.count("(stopped)") == 2


def test_commands_change_what_is_asked_next(monkeypatch):
    spy = Spy(monkeypatch, answers=[["a"], ["b"], ["c"], ["d"], ["e"]])
    spy.type(
        "1", "2", "/undo", "/system Be kind.", "3", "/no-system", "/system", "4",
        "/reset", "/undo", "/systm x", "/help", "5",
    )  # fmt: skip
    assert spy.prompts[2:] == [
        spy.prompt("1", "a", "3", system="Be kind."),
        spy.prompt("1", "a", "3", "c", "4", system=None),
        spy.prompt("5", system=None),
    ]
    assert "system prompt: Be kind." in spy.notes
    assert "no system prompt" in spy.notes
    assert "there is no command /systm; /help lists them" in spy.notes
    assert any("/reset" in note for note in spy.notes)


@pytest.mark.parametrize("free", [10, 9])
def test_a_full_context_forgets_the_oldest_exchanges_and_no_more(monkeypatch, free):
    """The chat keeps 10 tokens free for an answer."""
    spy = Spy(monkeypatch, answers=[["a"]] * 3)
    everything = spy.prompt("1", "a", "2", "a", "3")
    spy.chat = Chat(spy.tokenizer, DEFAULT, context=len(everything) + free, room=10)
    spy.type("1", "2", "3")
    assert spy.prompts[1] == spy.prompt("1", "a", "2")
    assert spy.prompts[2] == (everything if free == 10 else spy.prompt("2", "a", "3"))
    told = "(the context is full; oldest exchanges dropped: 1)"
    assert (told in spy.notes) == (free < 10)


def test_a_message_that_does_not_fit_even_alone_is_refused_and_the_chat_goes_on(monkeypatch):
    spy = Spy(monkeypatch, context=60, answers=[["a"], ["b"]])
    spy.type("1", "word " * 100, "2")
    assert spy.prompts == [spy.prompt("1"), spy.prompt("1", "a", "2")]
    assert any("the context has 60" in note for note in spy.notes)


class Terminal:
    """The command on a pseudo-terminal."""

    def __init__(self, *arguments):
        self.master, slave = pty.openpty()
        environment = {**ENVIRONMENT, "TERM": "dumb", "INPUTRC": "/dev/null"}
        self.process = start(
            [sys.executable, "-m", "moi_jax.generate", *map(str, arguments)],
            stdin=slave, stdout=slave, stderr=subprocess.STDOUT, cwd=ROOT, env=environment,
            start_new_session=True, close_fds=True,
        )  # fmt: skip
        os.close(slave)

        self._unread = b""

    def read_until(self, mark: str) -> None:
        """Reads on to the end of `mark`."""
        deadline = time.monotonic() + 120
        while mark.encode() not in self._unread and time.monotonic() < deadline:
            if select.select([self.master], [], [], 1)[0]:
                self._unread += os.read(self.master, 4096)
        before, found, self._unread = self._unread.partition(mark.encode())
        assert found, f"no {mark!r} after {before!r}"

    def type(self, line: str) -> None:
        os.write(self.master, line.encode() + b"\n")

    def interrupt(self) -> None:
        self.process.send_signal(signal.SIGINT)


def test_a_chat_on_a_terminal_streams_and_goes_on_after_an_answer_was_stopped(made, oracle):
    """Context and length are such that no answer ends by itself in time."""
    begun = oracle("Hi", system=None).replace("\n", "\r\n").rstrip("\N{REPLACEMENT CHARACTER}")
    assert len(begun) >= 3
    terminal = Terminal(made, "--no-system", "--max-new-tokens", 100_000, "--context", 200_000)
    try:
        terminal.read_until("> ")
        terminal.type("Hello!")
        terminal.read_until("Hello!\r\n")
        terminal.read_until("<")  # a filler: some of the answer is there
        terminal.interrupt()
        terminal.read_until("(stopped)\r\n")
        terminal.read_until("> ")
        # readline sees a signal at the next key only, if it comes while the prompt is drawn.
        time.sleep(1)
        terminal.interrupt()  # at the prompt: nothing but a new one
        terminal.read_until("> ")
        terminal.type("/reset")
        terminal.read_until("> ")
        terminal.type("Hi")
        terminal.read_until("Hi\r\n" + begun)
        terminal.interrupt()
        terminal.read_until("(stopped)\r\n")
        terminal.read_until("> ")
        os.write(terminal.master, b"\x04")  # Ctrl-D
        assert terminal.process.wait(timeout=60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.master)


# --- bad input ---


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-ids", "1,512"], "token id 512; the model knows 0 to 511"),
        (
            ["Hi", "--context", "50"],
            r"the prompt has 59 tokens and the context 50.*raise the context",
        ),
        ([], "there is no prompt"),
        (["--conversations", "x"], "--conversations and --out go together"),
        (["Hi", "--out", "x"], "--conversations and --out go together"),
        (["Hi", "--prompt-ids", "1"], "give only one of PROMPT, --prompt-ids and --conversations"),
        (["--prompt-ids", "1", "--no-system"], "--prompt-ids is the whole prompt"),
        (["--prompt-ids", "1", "--stop", "x"], "--stop cuts a text and --prompt-ids prints ids"),
        (["Hi", "--chat-template", "llama3"], r"no special token <\|begin_of_text\|>"),
        (["Hi", "--mesh", "tensor=3,data=3"], "does not fit 8 cpu devices"),
        (["Hi", "--mesh", "expert=2"], "'expert=2' is not a mesh.*fsdp=2,tensor=4"),
        (["Hi", "--mesh", "tensor=x"], "is not a mesh"),
        (["Hi", "--mesh", "fsdp=2,fsdp=2"], "is not a mesh"),
        (["Hi", "--mesh", "fsdp=-1,tensor=-1"], "is not a mesh"),
    ],
)
def test_a_mistake_is_one_clear_line(run, arguments, message):
    with pytest.raises(UserError, match=message) as raised:
        run(*arguments)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["Hi", "--temperature", "-1"], ["Hi", "--temperature", "nan"], ["Hi", "--top-p", "0"],
        ["Hi", "--top-k", "-1"], ["Hi", "--max-new-tokens", "0"], ["Hi", "--slots", "x"],
        ["--prompt-ids", "1,,2"], ["--prompt-ids", "-1"], ["--prompt-ids", ""],
        ["\udcff"], ["Hi", "--system", "\udcff"], ["Hi", "--stop", ""], ["Hi", "--stop", "\udcff"],
        ["Hi", "--top-k", str(2**31)], ["Hi", "--context", str(2**31)],
        ["Hi", "--seed", str(2**31)], ["--prompt-ids", str(2**31)],
    ],
)  # fmt: skip
def test_a_wrong_option_is_refused_before_anything_is_read(run, arguments):
    with pytest.raises(SystemExit) as raised:
        run(*arguments, checkpoint=Path("nowhere"))
    assert raised.value.code == 2


def test_input_that_is_no_text_is_refused(run):
    with pytest.raises(UserError, match="standard input is not valid UTF-8"):
        run(stdin=b"\xff\n")


def test_a_number_that_is_too_large_is_told_what_is_not(run, capsys):
    with pytest.raises(SystemExit):
        run("Hi", "--context", 2**31)
    assert "is no whole number from 1 to 2,147,483,647" in capsys.readouterr().err


def test_a_closed_standard_input_is_no_prompt():
    command = shlex.join([sys.executable, "-m", "moi_jax.generate", "nowhere"]) + " <&-"
    done = subprocess.run(
        command, shell=True, capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False
    )
    assert (done.returncode, done.stdout) == (2, "")
    assert re.fullmatch(r"error: there is no prompt: .*\n", done.stderr)


BROKEN = "raise BrokenPipeError('of a worker')"


@pytest.mark.parametrize(
    ("work", "options", "reader", "status", "told"),
    [
        ("print('a')", [], False, 128 + signal.SIGPIPE, ""),
        ("print('a')", ["-u"], False, 128 + signal.SIGPIPE, ""),
        ("print('a' * 100_000); print('b')", [], False, 128 + signal.SIGPIPE, ""),
        ("sys.exit(3)", [], False, 3, ""),
        (BROKEN, [], True, 1, "BrokenPipeError: of a worker\n"),
        ("print('a'); sys.exit(3)", [], True, 3, ""),
    ],
)
def test_a_command_ends_quietly_when_the_reader_of_its_output_has_left(
    work, options, reader, status, told
):
    code = f"import sys; from moi_jax.cli.command import run_command\ndef main(): {work}\n"
    out, into = os.pipe()
    if not reader:
        os.close(out)
    environment = {key: value for key, value in ENVIRONMENT.items() if key != "PYTHONUNBUFFERED"}
    try:
        done = subprocess.run(
            [sys.executable, *options, "-c", code + "run_command(main)"],
            stdout=into, stderr=subprocess.PIPE, text=True, cwd=ROOT, env=environment, check=False,
        )  # fmt: skip
    finally:
        os.close(into)
        if reader:
            os.close(out)
    assert done.returncode == status, done.stderr
    assert done.stderr.endswith(told) if told else not done.stderr


def remade(made: Path, path: Path, value: float, **changes) -> Path:
    """A checkpoint of the same model whose parameters are all `value`, with other items."""
    items = dataclasses.replace(read_items(made), **changes)
    stream = (
        (name, np.full(p.shape, value, np.float32))
        for name, p in parameter_specs(items.model).items()
    )
    save_model(path, stream, np.dtype(np.float32), items)
    return path


def test_logits_that_are_not_finite_are_told(made, run, tmp_path, asked):
    path = remade(made, tmp_path / "nan", 1e18)  # whose products exceed float32
    with pytest.raises(UserError, match=r"logits of .*nan in float32 are not finite"):
        run("Hi", checkpoint=path)
    arguments, out = asked
    with pytest.raises(UserError, match="3 of 4 rows have no complete answer: the logits"):
        run(*arguments, checkpoint=path)
    assert [row["finish"] for row in read_rows(out)] == ["not_finite"] * 3 + ["too_long"]


def test_a_checkpoint_that_was_added_to_is_asked_only_without_verifying(made, run, tmp_path):
    shutil.copytree(made, tmp_path / "more")
    (tmp_path / "more" / "parameters" / "more").write_text("")
    with pytest.raises(UserError, match="parameters/more was not written with the checkpoint"):
        run("Hi", *SHORT, checkpoint=tmp_path / "more")
    assert run("Hi", *SHORT, "--no-verify", checkpoint=tmp_path / "more") == run("Hi", *SHORT)


def test_a_checkpoint_that_cannot_be_asked_says_why(made, run, tmp_path):
    with pytest.raises(UserError, match="no is no checkpoint"):
        run("Hi", checkpoint=tmp_path / "no")
    bare = remade(made, tmp_path / "bare", 0, tokenizer={})
    with pytest.raises(UserError, match=r"bare: no tokenizer: looked for tokenizer.json"):
        run("Hi", checkpoint=bare)
    prompts = read_items(made).prompts
    none = remade(made, tmp_path / "none", 0, prompts={**prompts, "chat_template": None})
    with pytest.raises(UserError, match=r"none has no chat template of ours.*--chat-template"):
        run("Hi", checkpoint=none)
    assert moi_jax.load(none)[1].vocab_size == 512  # who renders nothing needs none


def test_a_checkpoint_of_another_rendering_is_opened_only_when_told_how(made, tmp_path):
    prompts = {**read_items(made).prompts, "template_hash": "0" * 64}
    stale = remade(made, tmp_path / "stale", 0, prompts=prompts)
    with pytest.raises(UserError, match=r"another rendering .*choose one with --chat-template"):
        open_checkpoint(stale, devices=jax.devices())
    with pytest.raises(UserError, match=r"another rendering .*choose one with chat_template"):
        moi_jax.load(stale)
    assert (
        open_checkpoint(
            stale, chat_template="chatml", devices=jax.devices()
        ).tokenizer.template.name
        == "chatml"
    )
    assert moi_jax.load(stale, chat_template="chatml")[1].template.name == "chatml"


def test_a_checkpoint_is_opened_on_the_mesh_and_in_the_dtype_asked_for(made):
    opened = open_checkpoint(made, devices=jax.devices())
    assert (dict(opened.mesh.shape), opened.dtype) == (
        {"data": 1, "fsdp": 1, "tensor": 8, "context": 1},
        "float32",
    )
    opened = open_checkpoint(made, dtype="bfloat16", mesh="fsdp=2, tensor=2", devices=jax.devices())
    assert dict(opened.mesh.shape) == {"data": 1, "fsdp": 2, "tensor": 2, "context": 1}
    leaves = jax.tree.leaves(opened.parameters)
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype(jnp.bfloat16)}
    assert jnp.dtype(opened.bind(opened.parameters).compute.dtype) == jnp.bfloat16
    assert {len(leaf.sharding.device_set) for leaf in leaves} == {4}


def test_a_chat_is_refused_on_many_hosts(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["generate", "ckpt"])
    monkeypatch.setattr(generate, "_standard_input", lambda: None)  # a terminal
    monkeypatch.setattr(generate, "check_same_command", lambda args: None)
    monkeypatch.setattr(hosts, "joined", object)
    with pytest.raises(UserError, match=r"a chat runs in one process; on many hosts give a prompt"):
        generate.main()
