"""Chat templates: a checkpoint's own against ours, ours in Jinja, and which one a run takes."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.checkpoints.items import ModelItems
from moi_jax.checkpoints.parameters import save_model
from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config
from moi_jax.data.preview.audit import audit
from moi_jax.models.parameters import parameter_specs
from moi_jax.models.presets import preset
from moi_jax.text.conversations import Conversation, Message
from moi_jax.text.instructions import label_mask
from moi_jax.text.jinja.comparison import difference
from moi_jax.text.jinja.export import jinja_source
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.prompts import prompts_metadata, saved_template
from moi_jax.text.rendering import render, render_prompt
from moi_jax.text.template_choice import default_system_prompt, has_own_template
from moi_jax.text.templates import TEMPLATES, FixedTemplate, fixed_fingerprint
from moi_jax.text.tokenizer import Tokenizer, load_tokenizer

from support.runs import open_data, small_config
from support.tokenizers import LLAMA3_SPECIALS, SAMPLES, llama3_tokenizer, with_specials

STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
CHATML, LLAMA3 = load_tokenizer(SAMPLES / "tokenizer"), llama3_tokenizer()
TOKENIZERS = {"chatml": CHATML, "llama3": LLAMA3}

# Reduced from what published checkpoints have.
PLAIN = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>' + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{% else %}"
    "{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SMOLLM2 = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}" + PLAIN
)
QWEN2 = """
{%- if tools %}
    {{- raise_exception('none here') }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are "Q".\\nBe kind.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'system' and loop.first %}
        {%- continue %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""
HEAD = "'<|start_header_id|>' + message.role + '<|end_header_id|>\\n\\n'"
LLAMA3_JINJA = (
    "{{ bos_token }}{% for message in messages %}"
    f"{{{{ {HEAD} + message.content | trim + '<|eot_id|>' }}}}{{% endfor %}}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
DATED = LLAMA3_JINJA.replace(
    "{{ bos_token }}",
    "{{ bos_token }}{{ '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' }}"
    "{{ strftime_now('%d %b %Y') + '\n\n<|eot_id|>' }}",
)


def owning(tokenizer: Tokenizer, template: object, **more: object) -> Tokenizer:
    """The tokenizer with a chat template of its own, and other settings."""
    settings = json.dumps({"chat_template": template, **more})
    return Tokenizer.from_files({**tokenizer.files, "tokenizer_config.json": settings})


def differs(tokenizer: Tokenizer, name: str) -> str:
    """The first difference between the tokenizer's own template and one of ours."""
    ours = tokenizer.with_template(name).template
    assert isinstance(ours, FixedTemplate)
    return difference(JinjaTemplate(tokenizer), ours, tokenizer) or ""


@pytest.mark.parametrize(
    ("template", "default"),
    [
        (PLAIN, None),
        (SMOLLM2, "You are small."),
        (
            MARKED,
            None,
        ),
        (QWEN2, 'You are "Q".\nBe kind.'),
        ([{"name": "tool_use", "template": ""}, {"name": "default", "template": PLAIN}], None),
    ],
)
def test_rendering_of_a_checkpoint_is_known_with_its_default_prompt(
    template: object, default: str | None
) -> None:
    tokenizer = owning(CHATML, template)
    assert tokenizer.template.name == "chatml"
    assert has_own_template(tokenizer)
    assert default_system_prompt(tokenizer) == default
    assert differs(tokenizer, "chatml") == ""


def test_a_template_that_marks_other_tokens_than_ours_decides_itself() -> None:
    newline_too = MARKED.replace("'<|im_end|>' }}{% endg", "'<|im_end|>\n' }}{% endg").replace(
        "{{ '\n' }}{% endfor", "{% if m.role != 'assistant' %}{{ '\n' }}{% endif %}{% endfor"
    )
    tokenizer = owning(CHATML, newline_too)
    assert tokenizer.template.name == "from_checkpoint"
    chat = Conversation((Message("user", "Hi"), Message("assistant", "Hello.")))
    (((row, *_),)) = render([chat], tokenizer, None, "append")
    labels = row.tokens[label_mask(row, "assistant")]
    assert tokenizer.decode(labels) == "Hello.<|im_end|>\n"


@pytest.mark.parametrize("bos", ["<|begin_of_text|>", {"content": "<|begin_of_text|>"}])
def test_llama3_of_a_checkpoint_is_known(bos: object) -> None:
    files = {
        **LLAMA3.files,
        "chat_template.jinja": LLAMA3_JINJA,
        "special_tokens_map.json": json.dumps({"bos_token": bos}),
    }
    in_settings = owning(LLAMA3, LLAMA3_JINJA, bos_token=bos)
    for tokenizer in (in_settings, Tokenizer.from_files(files)):
        assert tokenizer.template.name == "llama3"
        assert default_system_prompt(tokenizer) is None


@pytest.mark.parametrize(
    ("tokenizer", "template", "shown"),
    [
        (
            CHATML,
            PLAIN.replace("+ '\n' }}", "}}"),
            r"for a chat of user, its own template renders .*where",
        ),
        (CHATML, PLAIN.replace("m.content", "m.content | trim"), r"for a chat of system, user, as"),
        (CHATML, PLAIN.replace("+ m.content", "+ '<think>' + m.content"), "'.*<think>.*' where"),
        (
            LLAMA3,
            LLAMA3_JINJA,
            "for a chat of user, its own template renders '<|start",
        ),  # no bos_token
    ],
)
def test_another_template_is_shown_with_its_first_difference(
    tokenizer: Tokenizer, template: str, shown: str
) -> None:
    name = tokenizer.template.name
    tokenizer = owning(tokenizer, template)
    assert tokenizer.template.name == "from_checkpoint"
    found = differs(tokenizer, name)
    assert found
    assert "\n" not in found
    assert re.search(shown, found), found


def test_a_date_in_the_system_block_is_a_difference_and_no_default_prompt() -> None:
    tokenizer = owning(LLAMA3, DATED, bos_token="<|begin_of_text|>")
    assert tokenizer.template.name == "from_checkpoint"
    assert default_system_prompt(tokenizer) is None
    assert "Today Date: 26" in differs(tokenizer, "llama3")


def test_the_template_file_wins_over_the_settings() -> None:
    settings = json.dumps({"chat_template": PLAIN})
    more = {"chat_template.jinja": SMOLLM2, "tokenizer_config.json": settings}
    tokenizer = Tokenizer.from_files({**CHATML.files, **more})
    assert default_system_prompt(tokenizer) == "You are small."


def test_without_a_template_the_special_tokens_tell() -> None:
    assert not has_own_template(LLAMA3)
    assert LLAMA3.template.name == "llama3"
    neither = Tokenizer.from_files({"tokenizer.json": with_specials("<s>", "</s>")})
    with pytest.raises(UserError, match=r"special tokens of none of ours \(chatml, llama3\)"):
        neither.template  # noqa: B018
    own = owning(
        neither, "{% for m in messages %}[{{ m.role }}]{{ m.content }}{{ '</s>' }}{% endfor %}"
    )
    assert own.template.name == "from_checkpoint"
    assert own.template.stops == (own.special("</s>"),)


def test_of_two_possible_templates_the_equal_one_is_found() -> None:
    both = with_specials("<|endoftext|>", "<|im_start|>", "<|im_end|>", *LLAMA3_SPECIALS)
    tokenizer = Tokenizer.from_files({"tokenizer.json": both})
    assert tokenizer.template.name == "chatml"
    own = owning(tokenizer, LLAMA3_JINJA, bos_token="<|begin_of_text|>")
    assert own.template.name == "llama3"
    assert owning(tokenizer, PLAIN).template.name == "chatml"


TEXTS = st.text(max_size=10) | st.sampled_from(
    ["  spaced \n", "{{ x }}{% if %}", "'\"\\n\\", "<|im_end|><|eot_id|>", "\u00a0 e\u0301 😀\x00"]
)


@pytest.mark.parametrize("name", list(TEMPLATES))
def test_exported_jinja_renders_what_we_render(name: str, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers", reason="it renders the exported template")
    tokenizer = TOKENIZERS[name]
    for file, text in tokenizer.files.items():
        (tmp_path / file).write_text(text, encoding="utf-8")
    theirs = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"))

    @STEADY
    @given(st.none() | TEXTS, st.none() | TEXTS, st.lists(TEXTS, min_size=1, max_size=5))
    def check(default: str | None, system: str | None, contents: list[str]) -> None:
        jinja = jinja_source(tokenizer.template, default)
        roles = ["user", "assistant"] * 3
        messages = [] if system is None else [Message("system", system)]
        messages += [Message(r, t) for r, t in zip(roles, contents, strict=False)]  # type: ignore[arg-type]
        asked = messages[-1].role == "user"
        text = theirs.apply_chat_template(
            [{"role": m.role, "content": m.content} for m in messages],
            chat_template=jinja, tokenize=False, add_generation_prompt=asked,
        )  # fmt: skip
        if asked:
            tokens = render_prompt(messages, tokenizer, default)
        else:  # "" is no system text of a row, while a chat may have an empty system turn
            prompt = system if system == "" else default
            ((row,),) = render([Conversation(tuple(messages))], tokenizer, prompt, "keep")
            tokens = row.tokens.tolist()
        assert tokenizer.decode(tokens) == tokenizer.normalize(text)

    check()


@pytest.mark.parametrize("default", [None, "", 'You are "Q".\n\t{{ kind }} \\ 😀\u2028.'])
def test_exported_jinja_is_known_again(default: str | None) -> None:
    for name, tokenizer in TOKENIZERS.items():
        again = owning(tokenizer, jinja_source(tokenizer.template, default))
        assert again.template.name == name
        assert default_system_prompt(again) == default


def test_stops_and_padding_belong_to_the_template() -> None:
    def ids(*names: str) -> tuple[int, ...]:
        return tuple(LLAMA3.special(name) or -1 for name in names)

    assert LLAMA3.template.stops == ids(
        "<|eot_id|>", "<|eom_id|>", "<|start_header_id|>", "<|end_of_text|>"
    )
    assert LLAMA3.template.pad == ids("<|finetune_right_pad_id|>")[0]
    bare = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    least = Tokenizer.from_files({"tokenizer.json": with_specials(*bare)}).template
    assert (least.pad, least.stops) == (least.end, (least.end, least.turn))


# --- which template a run renders in ---


def test_another_rendering_of_the_saved_template_is_refused() -> None:
    item = prompts_metadata("You are kind.", CHATML.template)
    assert saved_template(item, "ckpt") == "chatml"
    with pytest.raises(UserError, match=r"ckpt was made with another rendering.*chatml or llama3"):
        saved_template({**item, "template_hash": "0" * 64}, "ckpt")
    with pytest.raises(UserError, match=r"ckpt has no chat template.*chatml or llama3"):
        saved_template(prompts_metadata("You are kind.", None), "ckpt")
    assert len({fixed_fingerprint(kind) for kind in TEMPLATES.values()}) == len(TEMPLATES)


def saved(path: Path, tokenizer: Tokenizer, prompts: dict) -> Path:
    """A checkpoint of zeros: what a run starts from besides its parameters."""
    model = dataclasses.replace(preset("tiny"), vocab_size=2064)
    zeros = ((name, np.zeros(p.shape, np.float32)) for name, p in parameter_specs(model).items())
    save_model(path, zeros, np.dtype(np.float32), ModelItems(model, tokenizer.files, prompts))
    return path


def started(tmp_path: Path, checkpoint: Path, template: str = "from_checkpoint"):
    config = small_config(
        tmp_path,
        model={"preset": None, "init_from": str(checkpoint)},
        tokenizer={"path": None, "chat_template": template},
    )
    return open_experiment(load_config(config))


def test_a_run_from_a_checkpoint_renders_in_its_template_unless_asked(tmp_path: Path) -> None:
    both = with_specials("<|endoftext|>", "<|im_start|>", "<|im_end|>", *LLAMA3_SPECIALS)
    tokenizer = Tokenizer.from_files({"tokenizer.json": both})
    path = saved(tmp_path / "llama3", tokenizer, prompts_metadata(None, LLAMA3.template))
    assert started(tmp_path, path).tokenizer.template.name == "llama3"
    assert started(tmp_path, path).config.data.default_system_prompt is None
    assert started(tmp_path, path, "chatml").tokenizer.template.name == "chatml"


def test_a_run_from_a_checkpoint_of_another_rendering_is_refused_unless_asked(
    tmp_path: Path,
) -> None:
    stale = {**prompts_metadata("You are kind.", CHATML.template), "template_hash": "0" * 64}
    path = saved(tmp_path / "stale", CHATML, stale)
    with pytest.raises(UserError, match="another rendering of the chat template chatml"):
        started(tmp_path, path)
    assert started(tmp_path, path, "chatml").tokenizer.template.name == "chatml"
    with pytest.raises(UserError, match=r"no special token <\|begin_of_text\|>"):
        started(tmp_path, path, "llama3")


@pytest.mark.parametrize("targets", ["assistant", "qwen_official"])
def test_llama3_rows_of_a_run_pass_the_audit(tmp_path: Path, targets: str) -> None:
    path = saved(tmp_path / "llama3", LLAMA3, prompts_metadata(None, LLAMA3.template))
    config = small_config(
        tmp_path,
        model={"preset": None, "init_from": str(path)},
        tokenizer={"path": None},
        loss={"targets": targets},
    )
    inputs = open_data(load_config(config))
    run = inputs.plan()
    reader = inputs.batch_reader(run)
    train = [selection.train for selection in inputs.selections]
    records = [len(cache.lengths) for cache in inputs.caches]
    assert audit(reader, train, records, inputs.tokenizer, [0, 3]) is None
    batch = reader.read([0])
    text = inputs.tokenizer.decode(batch.tokens[0].tolist())
    # Chat has the default prompt, which is none; maths has its own.
    assert "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n" in text
    assert "<|end_header_id|>\n\nYou are a mathematician.<|eot_id|><|start_header_id|>user" in text
    assert set(batch.tokens[batch.segment_ids == 0].tolist()) <= {inputs.tokenizer.template.pad}
    items = open_experiment(load_config(config)).items
    assert items.prompts["chat_template"] == "llama3"
