"""generate with tools: files of tools, conversations that go on with results, a chat."""

import io
import json
import re
import shlex
import shutil
import sys

import numpy as np
import pytest

from moi_jax import generate
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.common.errors import UserError
from moi_jax.data.sources.formats import Typing
from moi_jax.sampling.chat import Chat, chat_on_terminal
from moi_jax.sampling.completion_file import CompletionFile, read_conversations
from moi_jax.sampling.requests import Completion
from moi_jax.sampling.sampler import Sampler
from moi_jax.sampling.tool_file import read_tools
from moi_jax.text.conversations import Message, ToolCall
from moi_jax.text.rendering import render_prompt
from moi_jax.text.tokenizer import load_tokenizer

from support.places import ROOT
from support.published import micro_published
from support.runs import SAMPLES, forget_checksums
from support.tool_templates import TEMPLATES, WEATHER, with_calls

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
NATIVE = Typing(tools=True, thinking=True)


@pytest.fixture(scope="module")
def hermes():
    return with_calls("hermes")


# --- files of tools ---


@pytest.mark.parametrize(
    "text",
    [
        f"[{WEATHER}]",
        WEATHER,
        f"{WEATHER}\n\n",
        json.dumps(json.loads(WEATHER)["function"]),
        json.dumps([json.loads(WEATHER)], indent=2),
    ],
)
def test_tools_are_read_in_any_common_form(tmp_path, text):
    (tmp_path / "tools.json").write_text(text)
    assert read_tools(tmp_path / "tools.json") == (WEATHER,)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot read the tools"),
        ("", "has no tools"),
        ("[]", "has no tools"),
        ("{", "neither a JSON list of tools nor a JSON object a line"),
        ('[{"type": "function", "function": {}}]', "no name on one line"),
        ('{"name": "f", "parameters": {"type": "string"}}', "not object"),
    ],
)
def test_a_bad_file_of_tools_is_one_line(tmp_path, text, message):
    if text is not None:
        (tmp_path / "tools.json").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        read_tools(tmp_path / "tools.json")
    assert "\n" not in str(error.value)


def test_a_template_without_tools_or_thinking_is_refused_by_name():
    chatml = load_tokenizer(SAMPLES / "tokenizer")
    question = [Message("user", "Hi")]
    with pytest.raises(UserError, match="chat template chatml has no form for tools"):
        render_prompt(question, chatml, None, [WEATHER])
    with pytest.raises(UserError, match="chatml writes the same prompt with thinking and without"):
        render_prompt(question, chatml, None, thinking=True)


# --- files of conversations ---

ASKED = {"role": "user", "content": "Weather in Oslo?"}
CALLING = {
    "role": "assistant",
    "content": "",
    "tool_calls": [
        {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo"}'}}
    ],
}
RESULT = {"role": "tool", "content": "3 degrees"}


def written(path, *messages, tools=True):
    row = {"messages": list(messages), **({"tools": [json.loads(WEATHER)]} if tools else {})}
    path.write_text(json.dumps(row) + "\n")
    return path


def test_a_row_with_tools_is_answered_by_calls_and_goes_on_with_their_results(hermes, tmp_path):
    (row,) = read_conversations(written(tmp_path / "in.jsonl", ASKED), NATIVE)
    assert row.tools == (WEATHER,)
    prompt = render_prompt(row.messages, hermes, None, row.tools)
    assert '"name": "weather"' in hermes.decode(prompt)
    answers = CompletionFile(tmp_path / "out.jsonl", [row], [prompt], {}, hermes.template)
    answers.add(0, Completion((1,), CALL, "stop"))
    assert answers.finish() == {"stop": 1}
    answered = json.loads((tmp_path / "out.jsonl").read_text())
    assert answered["messages"] == [ASKED, CALLING]

    path = written(tmp_path / "next.jsonl", *answered["messages"], RESULT)
    (row,) = read_conversations(path, NATIVE)
    made_up = row.messages[1].calls[0].id  # the row gives none
    assert re.fullmatch("[a-z0-9]{9}", made_up)
    assert row.messages[1:] == (
        Message("assistant", "", calls=(ToolCall("weather", '{"city": "Oslo"}', made_up),)),
        Message("tool", "3 degrees", call_id=made_up, name="weather"),
    )
    text = hermes.decode(render_prompt(row.messages, hermes, None, row.tools))
    assert text.endswith("<|im_start|>tool\n3 degrees<|im_end|>\n<|im_start|>assistant\n")


def test_a_thought_is_saved_apart(hermes, tmp_path):
    (row,) = read_conversations(written(tmp_path / "in.jsonl", ASKED, tools=False), NATIVE)
    answers = CompletionFile(tmp_path / "out.jsonl", [row], [[1]], {}, hermes.template)
    answers.add(0, Completion((1,), "<think>\nCold?\n</think>\n\nCold.", "stop"))
    answers.finish()
    last = json.loads((tmp_path / "out.jsonl").read_text())["messages"][-1]
    assert last == {"role": "assistant", "content": "Cold.", "reasoning_content": "Cold?"}


def test_results_can_only_come_last_where_the_template_has_tools(tmp_path):
    path = written(tmp_path / "in.jsonl", ASKED, CALLING, RESULT)
    with pytest.raises(UserError, match=r"in.jsonl:1: "):
        read_conversations(path)


# --- the chat ---


def chat(monkeypatch, tokenizer, lines, answers):
    """The prompts and notes of a chat in which these lines are typed; "^D" ends the input."""
    typed, given = iter(lines), iter(answers)
    prompts, notes, asked = [], [], []

    def read(prompt: str) -> str:
        asked.append(prompt)
        line = next(typed, "^D")
        if line == "^D":
            raise EOFError
        return line

    def answer(prompt, show):
        prompts.append(tokenizer.decode(prompt))
        show(next(given))

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO()))
    made = Chat(tokenizer, None, 4000, room=10, tools=[WEATHER])
    chat_on_terminal(made, answer, notes.append)
    return made, prompts, notes, asked


def test_a_call_in_a_chat_is_answered_by_the_user(monkeypatch, hermes):
    made, prompts, notes, asked = chat(
        monkeypatch, hermes, ["Weather?", "3 degrees", "Thanks."], [CALL, "It has 3.", "Welcome."]
    )
    assert 'call: {"name": "weather", "arguments": {"city": "Oslo"}}' in notes
    assert asked[:3] == ["> ", "result of weather> ", "> "]
    assert "<|im_start|>tool\n3 degrees<|im_end|>" in prompts[1]
    assert prompts[2].endswith(
        f"\n{CALL}<|im_end|>\n<|im_start|>tool\n3 degrees<|im_end|>\n<|im_start|>assistant\n"
        "It has 3.<|im_end|>\n<|im_start|>user\nThanks.<|im_end|>\n<|im_start|>assistant\n"
    )
    made.undo()
    assert [message.role for message in made.messages] == ["user", "assistant", "tool", "assistant"]
    made.undo()
    assert made.messages == []


def test_a_call_without_a_result_drops_its_question(monkeypatch, hermes):
    made, _, notes, _ = chat(monkeypatch, hermes, ["Weather?", "^D"], [CALL])
    assert made.messages == []
    assert any("calls have no results" in note for note in notes)


def test_results_that_do_not_fit_drop_their_question(monkeypatch, hermes):
    typed = ["Hi", "Weather?", "cold " * 4000, "Thanks."]
    made, prompts, notes, _ = chat(monkeypatch, hermes, typed, ["Hello.", CALL, "Welcome."])
    assert any("shorten the message" in note for note in notes)
    assert any("results of its calls do not fit" in note for note in notes)
    assert "Weather?" not in prompts[2]
    assert [message.content for message in made.messages] == ["Hi", "Hello.", "Thanks.", "Welcome."]


# --- the command ---


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """A random model with a template of its own."""
    folder = micro_published(tmp_path_factory.mktemp("tools") / "source", np.float32, num_layers=1)
    (folder / "chat_template.jinja").write_text(TEMPLATES["hermes"])
    import_checkpoint(folder, folder.parent / "ckpt")
    return folder.parent / "ckpt"


@pytest.fixture
def command(checkpoint, monkeypatch, capsys):
    """The command with a model that answers `CALL`, and the prompts that it was given."""
    prompts = []

    def answer(self, parameters, requests, on_text=None):
        for number, request in enumerate(requests):
            prompts.append(self._decode(request.prompt))
            yield number, Completion((1,), f"Let me look.\n{CALL}", "stop")

    def run(*arguments):
        words = ["generate", str(checkpoint), "--mesh", "tensor=1", *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", words)
        assert generate.main() == 0
        return capsys.readouterr().out

    monkeypatch.setattr(Sampler, "run", answer)
    return run, prompts


def test_the_command_shows_calls_as_lines_of_json(command, tmp_path):
    run, prompts = command
    (tmp_path / "tools.json").write_text(WEATHER)
    shown = run("Weather?", "--tools", tmp_path / "tools.json", "--thinking", "off")
    assert shown == 'Let me look.\n{"name": "weather", "arguments": {"city": "Oslo"}}\n'
    assert "Tells the weather of a city." in prompts[0]
    assert prompts[0].endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")


def test_the_command_of_the_page_runs(command, tmp_path, monkeypatch):
    run, _ = command
    page = (ROOT / "docs" / "generate.md").read_text(encoding="utf-8")
    (written_there,) = re.findall(r"moi_jax.generate runs/tools (.*)$", page, re.MULTILINE)
    (tmp_path / "tools.json").write_text(WEATHER)
    monkeypatch.chdir(tmp_path)
    assert '"name": "weather"' in run(*shlex.split(written_there))


def test_a_model_that_was_trained_on_react_text_takes_no_tools(checkpoint, tmp_path, monkeypatch):
    react = shutil.copytree(checkpoint, tmp_path / "react")
    item = react / "prompts" / "metadata"
    item.write_text(json.dumps({**json.loads(item.read_text()), "tools": "react"}))
    forget_checksums(react)
    (tmp_path / "tools.json").write_text(WEATHER)
    words = ["generate", str(react), "Weather?", "--tools", str(tmp_path / "tools.json")]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(UserError, match=r"was trained with data\.tools: react"):
        generate.main()


def test_the_command_answers_rows_with_tools_and_with_results(command, tmp_path):
    run, prompts = command
    path = written(tmp_path / "in.jsonl", ASKED, CALLING, RESULT)
    run("--conversations", path, "--out", tmp_path / "out.jsonl")
    assert "Tells the weather of a city." in prompts[0]
    assert prompts[0].endswith("<|im_start|>tool\n3 degrees<|im_end|>\n<|im_start|>assistant\n")
    answer = json.loads((tmp_path / "out.jsonl").read_text())["messages"][-1]
    assert answer == {**CALLING, "content": "Let me look."}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt-ids", "1", "--thinking", "on"], "--prompt-ids is the whole prompt"),
        (["--prompt-ids", "1", "--tools", "x"], "--prompt-ids is the whole prompt"),
        (["--conversations", "x", "--out", "y", "--tools", "z"], "lists its own tools"),
        (["Hi", "--tools", "nowhere.json"], "cannot read the tools in nowhere.json"),
        (["Hi", "--chat-template", "chatml", "--thinking", "on"], "chatml writes the same prompt"),
    ],
)
def test_options_that_do_not_fit_are_one_line(command, arguments, message):
    with pytest.raises(UserError, match=message):
        command[0](*arguments)
