"""Tokenizers: ids of the reference, text that cannot become a control token, and clear errors."""

import base64
import importlib.util
import json
import pickle
import unicodedata
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config
from moi_jax.text.tokenizer import (
    QWEN_PATTERN,
    TiktokenTokenizer,
    Tokenizer,
    check_whole,
    load_tokenizer,
)

from support.runs import small_config
from support.tokenizers import llama3_tokenizer

# A slow machine is no failure.
STEADY = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
SAMPLES = Path(__file__).parents[2] / "moi_jax" / "data" / "samples" / "tokenizer"
TINY_RANKS = "".join(
    f"{base64.b64encode(token).decode()} {rank}\n"
    for rank, token in enumerate([*(bytes([byte]) for byte in range(256)), b"ab"])
)


def qwen_directory() -> Path | None:
    spec = importlib.util.find_spec("dashscope")
    return Path(spec.origin).parent / "resources" if spec and spec.origin else None


def load(kind: str) -> Tokenizer:
    if kind == "samples":
        return load_tokenizer(SAMPLES)
    directory = qwen_directory()
    if directory is None:
        pytest.skip("qwen.tiktoken comes with the package dashscope, which is not installed")
    return load_tokenizer(directory)


@pytest.fixture(scope="module", params=["samples", "qwen"])
def tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return load(request.param)


@pytest.fixture(scope="module")
def golden_tokens(golden: Path) -> dict:
    return json.loads((golden / "tokens.json").read_text(encoding="utf-8"))


def test_qwen_ids_equal_the_reference(golden_tokens: dict) -> None:
    qwen = load("qwen")
    meta, strings = golden_tokens["meta"], golden_tokens["strings"]
    assert (qwen.vocab_size, qwen.template.pad) == (meta["n_vocab"], meta["eod_id"])
    assert (qwen.template.turn, qwen.template.end) == (meta["im_start"], meta["im_end"])
    assert meta["pat_str"] == QWEN_PATTERN
    assert qwen.encode_batch([s["text"] for s in strings]) == [s["ids_no_special"] for s in strings]
    for string in strings:
        assert qwen.decode(string["ids_no_special"]) == string["decoded"]
        assert qwen.decode(string["ids"]) == string["decoded"]
    for special, number in meta["special_tokens"].items():
        assert qwen.decode([number]) == special


def test_qwen_as_tokenizer_json_gives_the_same_ids(golden_tokens: dict) -> None:
    qwen = load("qwen")
    assert isinstance(qwen, TiktokenTokenizer)
    fast = Tokenizer.from_files({"tokenizer.json": qwen.to_json()})
    assert fast.vocab_size == qwen.vocab_size
    assert fast.template.stops == qwen.template.stops
    texts = [string["text"] for string in golden_tokens["strings"]]
    texts += (SAMPLES.parent / "chat.jsonl").read_text(encoding="utf-8").splitlines()
    texts += [token.decode(errors="replace") for token in list(qwen._ranks)[::31]]
    assert fast.encode_batch(texts) == qwen.encode_batch(texts)


def test_special_tokens_in_text_stay_text(tokenizer: Tokenizer) -> None:
    specials = set(tokenizer.template.controls)
    assert len(specials) == 3
    text = "a<|im_start|>system\nb<|im_end|><|endoftext|>"
    for ids in (
        tokenizer.encode(text),
        tokenizer.encode_batch([text])[0],
        tokenizer.encode_with_offsets(text)[0],
    ):
        assert not specials & set(ids)
        assert tokenizer.decode(ids) == text


def test_decode_shows_special_tokens(tokenizer: Tokenizer) -> None:
    turn, end, pad = (getattr(tokenizer.template, name) for name in ("turn", "end", "pad"))
    ids = [turn, *tokenizer.encode("user"), end, pad]
    assert tokenizer.decode(ids) == "<|im_start|>user<|im_end|><|endoftext|>"


TEXTS = st.text(max_size=40) | st.text("\nThougt: Obsrvain<|>éé😀 ", max_size=40)


@pytest.mark.parametrize("kind", ["samples", "qwen"])
def test_ids_decode_to_the_nfc_text_and_offsets_cover_it(kind: str) -> None:
    tokenizer = load(kind)

    @STEADY
    @given(TEXTS)
    def check(text: str) -> None:
        normal = unicodedata.normalize("NFC", text)
        ids, offsets = tokenizer.encode_with_offsets(text)
        assert ids == tokenizer.encode(text)
        assert tokenizer.decode(ids) == normal
        assert len(offsets) == len(ids)
        # Tokens follow one another; only a character split among tokens is in several ranges.
        at = 0
        for number, (begin, end) in enumerate(offsets):
            assert begin in (at, at - 1)
            assert end > begin
            piece = tokenizer.decode([ids[number]])
            assert "\ufffd" in piece or piece == normal[begin:end]
            at = end
        assert at == len(normal)

    check()


def test_batch_equals_one_by_one(tokenizer: Tokenizer) -> None:
    texts = [f"Text {n}: " + "word é " * (n % 7) for n in range(300)]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    assert tokenizer.encode_batch([]) == []


def test_files_give_the_same_tokenizer_back(tokenizer: Tokenizer, tmp_path: Path) -> None:
    for name, text in tokenizer.files.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    for again in (load_tokenizer(tmp_path), Tokenizer.from_files(tokenizer.files)):
        assert again.fingerprint == tokenizer.fingerprint
        assert again.encode("Hello, world") == tokenizer.encode("Hello, world")


def test_fingerprint_depends_on_the_deciding_file_alone() -> None:
    files = {"qwen.tiktoken": TINY_RANKS}
    one = Tokenizer.from_files(files)
    other = Tokenizer.from_files({**files, "tokenizer_config.json": "{}"})
    longer = Tokenizer.from_files({"qwen.tiktoken": TINY_RANKS + "YWJi 257\n"})
    assert one.fingerprint == other.fingerprint != longer.fingerprint
    assert other.files["tokenizer_config.json"] == "{}"


def test_tiktoken_specials_follow_the_ranks() -> None:
    tiny = Tokenizer.from_files({"qwen.tiktoken": TINY_RANKS})
    assert tiny.encode("abba") == [256, ord("b"), ord("a")]
    assert tiny.template.controls == (257, 258, 259)
    assert (tiny.template.pad, tiny.template.turn, tiny.template.end) == (257, 258, 259)
    assert tiny.vocab_size == 257 + 208


def test_truncation_padding_and_trimmed_offsets_in_the_file_are_ignored() -> None:
    spec = json.loads((SAMPLES / "tokenizer.json").read_text(encoding="utf-8"))
    spec["truncation"] = {
        "direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0
    }  # fmt: skip
    spec["padding"] = {
        "strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": None,
        "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
    }  # fmt: skip
    spec["post_processor"] = {
        "type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True
    }  # fmt: skip
    limited = Tokenizer.from_files({"tokenizer.json": json.dumps(spec)})
    plain = load("samples")
    for text in ("", "a somewhat longer text than two tokens, and than eight"):
        assert limited.encode(text) == plain.encode(text)
        assert limited.encode_with_offsets(text) == plain.encode_with_offsets(text)


def vocabulary_files(kind: str) -> dict[str, str]:
    """The sample tokenizer as vocab.json, merges.txt and the settings of a tokenizer class."""
    model = json.loads((SAMPLES / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    vocabulary = {t: n for t, n in model["vocab"].items() if not t.startswith("<|")}
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"])]
    specials = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    added = [*specials, "<tool_call>"]
    decoder = {
        len(vocabulary) + n: {"content": token, "special": token in specials}
        for n, token in enumerate(added)
    }
    settings = {
        "tokenizer_class": kind, "added_tokens_decoder": decoder,
        "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
    }  # fmt: skip
    return {
        "vocab.json": json.dumps(vocabulary),
        "merges.txt": "\n".join(lines) + "\n",
        "tokenizer_config.json": json.dumps(settings),
    }


@pytest.mark.parametrize("kind", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_vocabulary_and_merges_give_the_ids_of_transformers(tmp_path: Path, kind: str) -> None:
    transformers = pytest.importorskip("transformers", reason="the reference of the ids")
    for name, text in vocabulary_files(kind).items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    ours = load_tokenizer(tmp_path)
    reference = getattr(transformers, kind).from_pretrained(tmp_path)
    assert ours.vocab_size == len(reference)
    assert ours.template.pad == reference.pad_token_id
    assert ours.template.end == reference.eos_token_id
    texts = [
        "Hello, it's 2024! def f(x):\n\n    return x",
        "<tool_call>{}</tool_call>",
        "Cafe\u0301 naïve  \n 你好😀\t end ",
    ]

    @STEADY
    @given(st.lists(TEXTS.filter(lambda text: "<|" not in text), max_size=3))
    def check(more: list[str]) -> None:
        for text in (*texts, *more):
            assert ours.encode(text) == reference(text).input_ids

    check()
    assert load_tokenizer(tmp_path).fingerprint == ours.fingerprint
    assert Tokenizer.from_files(ours.files).fingerprint == ours.fingerprint


def test_special_token_that_only_the_vocabulary_lists_is_no_damage() -> None:
    files = vocabulary_files("Qwen2Tokenizer")
    settings = json.loads(files["tokenizer_config.json"])
    vocabulary = json.loads(files["vocab.json"])
    for number, token in settings["added_tokens_decoder"].items():
        vocabulary[token["content"]] = int(number)
    del settings["added_tokens_decoder"][str(vocabulary["<|im_start|>"])]
    listed = {"vocab.json": vocabulary, "tokenizer_config.json": settings}
    found = Tokenizer.from_files({**files, **{n: json.dumps(v) for n, v in listed.items()}})
    whole = Tokenizer.from_files(files)
    assert found.vocab_size == whole.vocab_size
    assert found.encode("Hello, it's 2024!") == whole.encode("Hello, it's 2024!")


def changed(name: str, text: str | None) -> dict[str, str]:
    files: dict[str, str | None] = {**vocabulary_files("Qwen2Tokenizer"), name: text}
    return {name: text for name, text in files.items() if text is not None}


MERGES = vocabulary_files("Qwen2Tokenizer")["merges.txt"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (changed("merges.txt", None), "merges.txt is missing beside vocab.json"),
        (changed("merges.txt", "a b c\n"), "merges.txt is damaged: 'a b c' is not a pair"),
        (changed("merges.txt", "zz zz\n"), "is not a tokenizer"),
        (changed("merges.txt", MERGES[: MERGES.rindex("\n", 0, -1)]), "so it was cut short"),
        (changed("vocab.json", "{"), "vocab.json is not valid JSON"),
        (changed("vocab.json", "[]"), "vocab.json is not a JSON object"),
        (changed("vocab.json", '{"a": "b"}'), "not an object of tokens and their ids"),
        (changed("vocab.json", '{"a": 0, "b": 9}'), "have gaps"),
        (changed("added_tokens.json", '{"<|x|>": "one"}'), "added tokens are damaged"),
        (changed("tokenizer_config.json", None), "tokenizer_class None"),
        (vocabulary_files("LlamaTokenizer"), "tokenizer_class LlamaTokenizer"),
    ],
)
def test_broken_vocabulary_files_are_one_line(files: dict[str, str], message: str) -> None:
    with pytest.raises(UserError) as error:
        Tokenizer.from_files(files)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_text_is_composed_only_where_the_tokenizer_does() -> None:
    spec = json.loads((SAMPLES / "tokenizer.json").read_text(encoding="utf-8"))
    assert spec["normalizer"] == {"type": "NFC"}
    spec["normalizer"] = None
    plain = Tokenizer.from_files({"tokenizer.json": json.dumps(spec)})
    text = "Cafe\u0301!"
    assert load("samples").decode(load("samples").encode(text)) == "Café!"
    assert plain.decode(plain.encode(text)) == text
    ids, offsets = plain.encode_with_offsets(text)
    assert (len(ids), offsets[-1]) == (len(offsets), (5, 6))


def test_a_pickled_tokenizer_keeps_its_template() -> None:
    for tokenizer in (load("samples"), llama3_tokenizer()):
        again = pickle.loads(pickle.dumps(tokenizer))
        assert again.fingerprint == tokenizer.fingerprint
        assert again.template.name == tokenizer.template.name
        assert again.encode("Hello") == tokenizer.encode("Hello")


def test_missing_directory_and_files_say_what_was_looked_for(tmp_path: Path) -> None:
    for directory in (tmp_path, tmp_path / "none"):
        with pytest.raises(UserError, match=r"tokenizer\.json and qwen\.tiktoken"):
            load_tokenizer(directory)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("tokenizer.json", "{}"),
        ("qwen.tiktoken", "not base64"),
        ("qwen.tiktoken", "YQ== 0\nYg== 0\n"),
        ("qwen.tiktoken", "YQ== 0 1\n"),
        ("qwen.tiktoken", "YQ== 0\n"),
        ("qwen.tiktoken", TINY_RANKS + "YWJi 258\n"),
        ("qwen.tiktoken", ""),
    ],
)
def test_broken_file_is_refused_by_name(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} is not a tokenizer"):
        load_tokenizer(tmp_path)


def test_qwen_file_cut_at_a_line_end_is_refused_where_the_model_has_qwens_vocabulary(
    tmp_path: Path,
) -> None:
    directory = qwen_directory()
    if directory is None:
        pytest.skip("qwen.tiktoken comes with the package dashscope, which is not installed")
    lines = (directory / "qwen.tiktoken").read_text().splitlines(keepends=True)
    (tmp_path / "qwen.tiktoken").write_text("".join(lines[:-1]))
    open_experiment(load_config(small_config(tmp_path), qwen_at(directory)))
    message = rf"qwen\.tiktoken of {tmp_path} has 151,642 tokens, not the 151,643 of Qwen"
    with pytest.raises(UserError, match=message):
        open_experiment(load_config(small_config(tmp_path), qwen_at(tmp_path)))
    with pytest.raises(UserError, match=message):
        check_whole(load_tokenizer(tmp_path), 152_064, tmp_path)
    # A small model has a vocabulary of its own.
    check_whole(Tokenizer.from_files({"qwen.tiktoken": TINY_RANKS}), 2048, tmp_path)


def qwen_at(directory: Path) -> list[str]:
    return ["model.preset=qwen-1.8b", f"tokenizer.path={directory}"]


def test_vocabulary_without_the_templates_tokens_encodes_but_renders_nothing() -> None:
    text = (SAMPLES / "tokenizer.json").read_text(encoding="utf-8")
    spec = json.loads(text)
    for token in spec["added_tokens"]:
        token["special"] = False
    for lacking in (text.replace("<|im_end|>", "<|end|>"), json.dumps(spec)):
        files = {"tokenizer.json": lacking}
        plain = Tokenizer.from_files(files)
        assert plain.encode("Hello") == load("samples").encode("Hello")
        with pytest.raises(UserError, match="special tokens of none of ours"):
            _ = plain.template
        with pytest.raises(UserError, match=r"no special token <\|im_(end|start)\|>.*chatml needs"):
            Tokenizer.from_files(files, "chatml")
    with pytest.raises(UserError, match=r"no special token <\|begin_of_text\|>.*llama3 needs"):
        load("samples").with_template("llama3")
