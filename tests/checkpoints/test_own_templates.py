"""A checkpoint's own chat template: from a file, in and out, compared with transformers."""

import dataclasses
import json
import logging
import shutil

import numpy as np
import pytest

from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.checkpoints.hf import compare_templates
from moi_jax.checkpoints.hf.companion_files import companion_files
from moi_jax.checkpoints.hf.exporter import export_checkpoint
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.hf.model_card import model_card
from moi_jax.checkpoints.hf.verify import describe, verify_checkpoint
from moi_jax.checkpoints.items import read_items
from moi_jax.checkpoints.opener import load, open_tokenizer
from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config, make_config
from moi_jax.text.conversations import Message
from moi_jax.text.templates import ChatML, fixed_fingerprint
from moi_jax.text.tokenizer import Tokenizer, load_tokenizer
from moi_jax.training import resume

from support.published import micro_published
from support.runs import SAMPLES, forget_checksums, small_config
from support.tokenizers import with_specials
from support.tool_templates import SPECIALS, TEMPLATES, WEATHER

HERMES = TEMPLATES["hermes"]
QUESTION = [Message("user", "Hi")]
DEFAULT = 'You are kind. "Really", 你好.'


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Published weights with a template of their own."""
    folder = micro_published(tmp_path_factory.mktemp("own") / "source", np.float32)
    (folder / "chat_template.jinja").write_text(HERMES)
    return folder


@pytest.fixture(scope="module")
def imported(source):
    import_checkpoint(source, source.parent / "ckpt")
    return source.parent / "ckpt"


# --- tokenizer.chat_template: FILE ---


def test_a_file_takes_the_place_of_the_template_and_goes_with_the_tokenizer(tmp_path, imported):
    (tmp_path / "mine.jinja").write_text(TEMPLATES["pythonic"])
    files = {
        "tokenizer.json": (SAMPLES / "tokenizer" / "tokenizer.json").read_text(),
        "tokenizer_config.json": json.dumps({"chat_template": "old", "eos_token": "<|im_end|>"}),
    }
    tokenizer = Tokenizer.from_files(files, str(tmp_path / "mine.jinja"))
    assert tokenizer.template.sources == {"default": TEMPLATES["pythonic"]}
    again = Tokenizer.from_files(tokenizer.files, "from_checkpoint")
    assert again.template.fingerprint() == tokenizer.template.fingerprint()
    assert json.loads(again.files["tokenizer_config.json"]) == {"eos_token": "<|im_end|>"}
    for opened in (
        load(imported, chat_template=str(tmp_path / "mine.jinja"))[1],
        open_tokenizer(imported, str(tmp_path / "mine.jinja"))[0],
    ):
        assert opened.template.sources == {"default": TEMPLATES["pythonic"]}


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (
            "chatlm",
            "no chat template 'chatlm'; choose from_checkpoint, chatml, llama3, or",
        ),
        ("nowhere.jinja", "cannot read the chat template nowhere.jinja: .*choose from_checkpoint"),
        (".", "there is no chat template"),
    ],
)
def test_a_template_that_is_none_is_one_line(name, message):
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(SAMPLES / "tokenizer", name)
    assert "\n" not in str(error.value)


def test_a_resumed_run_needs_the_file_of_its_template_no_more(imported, tmp_path):
    shutil.copytree(imported, tmp_path / "run" / "checkpoints" / "1")
    other = tmp_path / "other.jinja"
    other.write_text(TEMPLATES["pythonic"])

    def opened(file, **model):
        tokenizer = {"path": str(SAMPLES / "tokenizer"), "chat_template": str(tmp_path / file)}
        config = load_config(small_config(tmp_path, tokenizer=tokenizer, model=model))
        return open_experiment(config, tmp_path / "run").tokenizer.template.sources["default"]

    for model in ({}, {"preset": None, "init_from": str(imported)}):
        assert opened("gone.jinja", **model) == HERMES
        # A file that is there counts: another content is another run, by the template's hash.
        assert opened("other.jinja", **model) == TEMPLATES["pythonic"]
    before, now = ({"tokenizer": {"chat_template": name}} for name in ("a.jinja", "b.jinja"))
    changes = resume.config_changes(
        make_config(before).model_dump(mode="json"), make_config(now).model_dump(mode="json")
    )
    assert [may for _, may in changes] == ["always"]


def old_import(imported, folder):
    """The import as an earlier version made it, which took the nearest template of ours."""
    ckpt = shutil.copytree(imported, folder / "old")
    item = ckpt / "prompts" / "metadata"
    nearest = {"chat_template": "chatml", "template_hash": fixed_fingerprint(ChatML)}
    item.write_text(json.dumps(json.loads(item.read_text()) | nearest))
    forget_checksums(ckpt)
    return ckpt


def test_an_import_of_an_earlier_version_is_told_of_its_own_template(imported, tmp_path, caplog):
    ckpt = old_import(imported, tmp_path)
    (tmp_path / "mine.jinja").write_text(TEMPLATES["pythonic"])

    def opened(start, asked):
        caplog.clear()
        tokenizer = {"path": None, "chat_template": asked}
        model = {"preset": None, "init_from": str(start)}
        config = load_config(small_config(tmp_path, tokenizer=tokenizer, model=model))
        name = open_experiment(config).tokenizer.template.name
        return name, [line for line in caplog.messages if "import the weights again" in line]

    name, (line,) = opened(ckpt, "from_checkpoint")
    assert name == "chatml"
    assert "trained in the chat template chatml" in line
    assert "\n" not in line
    assert opened(ckpt, "chatml") == ("chatml", [])
    assert opened(ckpt, str(tmp_path / "mine.jinja")) == ("from_checkpoint", [])
    assert opened(imported, "from_checkpoint") == ("from_checkpoint", [])
    (ckpt / "config").mkdir()  # a run that was trained so goes on so
    assert opened(ckpt, "from_checkpoint") == ("chatml", [])


# --- in and out ---


def test_an_import_says_what_the_template_can_do(source, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        import_checkpoint(source, tmp_path / "ckpt")
    (line,) = (m for m in caplog.messages if m.startswith("chat template"))
    assert line == (
        "chat template: the checkpoint's own, with tools (hermes), thinking or not, as asked"
    )
    assert read_items(tmp_path / "ckpt").prompts["chat_template"] == "from_checkpoint"


def exported(imported, tmp_path, default, **files):
    """The companion files of the checkpoint as if it was trained under another default prompt."""
    items = read_items(imported)
    tokenizer = {**items.tokenizer, **files}
    if "tokenizer_config.json" in files:
        del tokenizer["chat_template.jinja"]
    (tmp_path / "config").mkdir()  # as a step of training has it
    items = dataclasses.replace(
        items, tokenizer=tokenizer, prompts={**items.prompts, "default_system_prompt": default}
    )
    return companion_files(items, None, "float32", tmp_path)


def rendered(files, messages, tools=()):
    own = Tokenizer.from_files(files, "from_checkpoint").template
    program = own._programs["tool_use" if tools and "tool_use" in own.sources else "default"]
    return program.render(
        messages=[{"role": m.role, "content": m.content} for m in messages],
        tools=[json.loads(tool) for tool in tools], add_generation_prompt=True,
    )  # fmt: skip


def test_the_template_goes_out_as_it_came_in(imported, tmp_path):
    export_checkpoint(imported, tmp_path / "out")
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == HERMES
    trained = exported(imported, tmp_path, None)
    assert trained["chat_template.jinja"] == HERMES
    stops = json.loads(trained["generation_config.json"])
    template = Tokenizer.from_files(trained, "from_checkpoint").template
    assert stops["eos_token_id"][: len(template.stops)] == list(template.stops)


SETTINGS = {"eos_token": "<|im_end|>", "model_max_length": 7}
NAMED = [{"name": "default", "template": HERMES}, {"name": "tool_use", "template": HERMES + " "}]


@pytest.mark.parametrize("form", ["file", "text", "names"])
def test_a_trained_default_prompt_stands_in_every_template_and_nothing_else_changes(
    imported, tmp_path, form
):
    given = {
        "file": {},
        "text": {"tokenizer_config.json": json.dumps({**SETTINGS, "chat_template": HERMES})},
        "names": {"tokenizer_config.json": json.dumps({**SETTINGS, "chat_template": NAMED})},
    }[form]
    files = exported(imported, tmp_path, DEFAULT, **given)
    if form != "file":
        settings = json.loads(files["tokenizer_config.json"])
        found = settings.pop("chat_template")
        assert settings == SETTINGS
        assert "chat_template.jinja" not in files
        names = [each["name"] for each in found] if form == "names" else type(found)
        assert names == (["default", "tool_use"] if form == "names" else str)
    before = {**read_items(imported).tokenizer, **given}
    if form != "file":
        del before["chat_template.jinja"]
    system = Message("system", DEFAULT)
    for tools in ((), (WEATHER,)):
        with_system = [system, *QUESTION]
        assert rendered(files, QUESTION, tools) == rendered(before, with_system, tools)
        assert rendered(files, with_system, tools) == rendered(before, with_system, tools)


CHATML = json.loads((SAMPLES / "tokenizer" / "tokenizer_config.json").read_text())["chat_template"]
ADDING = "{% if messages[0]['role'] != 'system' %}<|im_start|>system\nHi<|im_end|>\n{% endif %}"


@pytest.mark.parametrize(
    ("own", "default", "where"),
    [
        (CHATML, DEFAULT, "tokenizer_config.json"),  # ours writes the same tokens
        (CHATML, None, "tokenizer_config.json"),
        (ADDING + CHATML, DEFAULT, "tokenizer_config.json"),
        (ADDING + CHATML, None, "chat_template.jinja"),  # its own would add its default
        (HERMES, DEFAULT, "chat_template.jinja"),  # ours was named in its place
    ],
)
def test_a_model_trained_in_a_template_of_ours_has_one_template(
    imported, tmp_path, own, default, where
):
    files = {
        "tokenizer.json": read_items(imported).tokenizer["tokenizer.json"],
        "tokenizer_config.json": json.dumps({**SETTINGS, "chat_template": own}),
    }
    prompts = {"chat_template": "chatml", "default_system_prompt": default}
    items = dataclasses.replace(read_items(imported), tokenizer=files, prompts=prompts)
    (tmp_path / "config").mkdir()
    out = companion_files(items, None, "float32", tmp_path)
    in_file = "chat_template.jinja" in out
    in_settings = "chat_template" in json.loads(out["tokenizer_config.json"])
    assert (in_file, in_settings) == (
        where == "chat_template.jinja", where == "tokenizer_config.json"
    )  # fmt: skip
    if in_settings:
        assert json.loads(out["tokenizer_config.json"])["chat_template"].endswith(own)
    system = "" if default is None else f"<|im_start|>system\n{default}<|im_end|>\n"
    asked = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(out, QUESTION) == system + asked


def test_the_card_names_template_form_of_calls_and_parsers(imported):
    items = read_items(imported)
    card = model_card(items)
    assert "Chat template: the checkpoint's own, with tools (hermes)" in card
    assert "in vLLM `--tool-call-parser hermes`, in SGLang `--tool-call-parser qwen`" in card
    files = {**items.tokenizer, "chat_template.jinja": TEMPLATES["named"]}
    assert "none of those that servers" in model_card(dataclasses.replace(items, tokenizer=files))


# --- verify ---

MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}<|im_end|>{% endgeneration %}{% else %}"
    "{{ m.content }}<|im_end|>{% endif %}\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def compared(ours, theirs, folder, monkeypatch, default=None):
    """The comparison of a tokenizer with the template `ours` and a directory with `theirs`."""
    pytest.importorskip("transformers")
    monkeypatch.setattr(compare_templates, "CONVERSATIONS", 20)
    files = {
        "tokenizer.json": with_specials(*SPECIALS),
        "tokenizer_config.json": json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
        ),
    }
    for name, text in {**files, "chat_template.jinja": theirs}.items():
        (folder / name).write_text(text)
    tokenizer = Tokenizer.from_files({**files, "chat_template.jinja": ours}, "from_checkpoint")
    return compare_templates.compare_templates(tokenizer, default, folder)


@pytest.mark.parametrize("name", ["hermes", "llama3_json", "qwen3_coder", "marked"])
def test_what_is_trained_on_is_what_transformers_renders(tmp_path, monkeypatch, name):
    template = MARKED if name == "marked" else TEMPLATES[name]
    report = compared(template, template, tmp_path, monkeypatch)
    assert (report["different"], report["first"]) == (0, "")
    assert report["conversations"] == 20
    assert report["samples"] + report["refused"] >= 20
    assert (report["refused"] > 0) == (name == "llama3_json")  # of several calls at once
    assert report["labels"] == ("its masks" if name == "marked" else "renderings of the prompts")


def test_a_template_that_writes_the_date_writes_the_same_day(tmp_path, monkeypatch):
    dated = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}\n{% endif %}" + HERMES
    report = compared(dated, dated, tmp_path, monkeypatch)
    assert (report["different"], report["first"]) == (0, "")


def test_another_text_or_default_prompt_is_a_difference(tmp_path, monkeypatch):
    other = HERMES.replace("Tools:", "TOOLS:")
    report = compared(HERMES, other, tmp_path, monkeypatch)
    assert 0 < report["different"] < report["samples"]  # only where there are tools
    assert "TOOLS:" in report["first"]
    report = compared(HERMES, HERMES, tmp_path, monkeypatch, default="Be kind.")
    assert report["different"] > 0
    assert "Be kind." in report["first"]


def test_labels_that_differ_from_the_masks_are_a_difference(tmp_path, monkeypatch):
    theirs = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
    report = compared(MARKED, theirs, tmp_path, monkeypatch)
    assert report["different"] == report["samples"] == 20
    assert "the labels differ from the masks" in report["first"]


def test_verify_tells_of_the_template(imported, source, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    monkeypatch.setattr(compare_templates, "CONVERSATIONS", 10)
    report = verify_checkpoint(imported, source, tensors_only=True)
    assert (report["verdict"], report["template"]["different"]) == ("equal", 0)
    assert "of 10 conversations equal" in describe(report)
    shutil.copytree(source, tmp_path / "other")
    (tmp_path / "other" / "chat_template.jinja").write_text(HERMES.replace("<|im_end|>", "!"))
    report = verify_checkpoint(imported, tmp_path / "other", tensors_only=True)
    assert report["verdict"] == "different"
    assert "there, " in describe(report)
