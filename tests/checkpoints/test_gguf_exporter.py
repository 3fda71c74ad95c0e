"""GGUF files that we write: read back, quantised as the package does, run by llama.cpp."""

import errno
import json
import subprocess
import sys

import numpy as np
import pytest

import moi_jax
from moi_jax import convert
from moi_jax.checkpoints.hf.gguf import open_gguf
from moi_jax.checkpoints.hf.gguf_exporter import export_gguf
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.hf.verify import verify_checkpoint
from moi_jax.common.errors import UserError
from moi_jax.models.config import RopeScaling
from moi_jax.text.tokenizer import Tokenizer

from support.adapters import save_adapters
from support.published import micro_published, tensors

gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")

LLAMA3 = RopeScaling(
    factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=8192
)
MODELS = {
    "qwen2": {"family": "qwen2", "tied_head": True, "num_kv_heads": 1},
    "llama": {
        "family": "llama", "out_bias": True, "num_heads": 4, "num_kv_heads": 2, "head_dim": 32,
        "rope_scaling": LLAMA3,
    },
    "qwen3": {"family": "qwen3", "qkv_bias": False, "qk_norm": True, "head_dim": 128},
    "qwen_v1": {"family": "qwen_v1"},
}  # fmt: skip
TEXT = "Hello, world! 2024 naïve  café\n\n def f(x):\n\treturn 12345"
PROMPT = [5, 77, 300, 1024, 9, 12, 40]
ANSWER = 12

# llama.cpp in a process of its own: what it generates, and how it splits a text.
LLAMA_CPP = """
import json, sys, urllib.request
import xllamacpp
params = xllamacpp.CommonParams()
params.model.path, params.n_ctx, params.n_parallel, params.warmup = sys.argv[1], 256, 1, False
params.cpuparams.n_threads = 1
server = xllamacpp.Server(params)
prompt, length = json.loads(sys.argv[2]), int(sys.argv[4])
answer = server.handle_completions({"prompt": prompt, "max_tokens": length,
    "temperature": 0.0, "return_tokens": True, "ignore_eos": True, "verbose": True})
body = json.dumps({"content": sys.argv[3]}).encode()
request = urllib.request.Request(server.listening_address + "/tokenize", body,
    {"Content-Type": "application/json"})
split = json.loads(urllib.request.urlopen(request).read())
print(json.dumps([answer["__verbose"]["tokens"], split["tokens"]]), flush=True)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


@pytest.fixture(scope="module", params=MODELS)
def checkpoint(request, folder):
    """A model of each kind, in float16, so that a file of float16 holds the same weights."""
    plain = {"dynamic_ntk": False, "logn_attention": False, "num_layers": 2}
    name = request.param
    # Weights that are large enough for attention to decide the next token.
    micro_published(folder / f"{name}-published", np.float16, 0.3, **plain, **MODELS[name])
    import_checkpoint(folder / f"{name}-published", folder / name)
    return folder / name


def greedy(checkpoint):
    model, tokenizer = moi_jax.load(checkpoint)
    ids = np.zeros((1, len(PROMPT) + ANSWER), np.int32)
    ids[0, : len(PROMPT)] = PROMPT
    for place in range(len(PROMPT), ids.shape[1]):  # later tokens do not change earlier logits
        ids[0, place] = np.argmax(np.asarray(model(ids))[0, place - 1])
    return ids[0, len(PROMPT) :].tolist(), tokenizer.encode(TEXT)


def test_llama_cpp_generates_the_same_tokens(checkpoint, tmp_path):
    pytest.importorskip("xllamacpp", reason="llama.cpp runs the file")
    export_gguf(checkpoint, tmp_path / "m.gguf", "F16")
    ran = subprocess.run(
        [sys.executable, "-c", LLAMA_CPP, tmp_path / "m.gguf", json.dumps(PROMPT), TEXT,
         str(ANSWER)],
        capture_output=True, text=True, check=True, timeout=120,
    )  # fmt: skip
    assert json.loads(ran.stdout.splitlines()[-1]) == list(greedy(checkpoint))


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_the_file_is_read_back_as_the_package_quantises(checkpoint, kind, tmp_path):
    path = tmp_path / "m.gguf"
    export_gguf(checkpoint, path, kind)
    assert verify_checkpoint(checkpoint, path, tensors_only=True)["verdict"] == "equal"
    read, quantisation = open_gguf(path), gguf.GGMLQuantizationType[kind]
    if checkpoint.name == "qwen_v1":  # it has other names there
        return
    published = tensors(checkpoint.with_name(f"{checkpoint.name}-published"))
    assert read.names == published.keys()
    for name, values in published.items():
        expected = values.astype(np.float32)
        if values.ndim > 1:
            expected = gguf.dequantize(gguf.quantize(expected, quantisation), quantisation)
        np.testing.assert_array_equal(read.read(name), expected, err_msg=name)
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(path).tensors}
    assert (kinds["blk.1.ffn_down.weight"], kinds["output_norm.weight"]) == (kind, "F32")


def test_a_changed_weight_is_found(checkpoint, tmp_path):
    export_gguf(checkpoint, tmp_path / "m.gguf", "Q8_0")
    data = bytearray((tmp_path / "m.gguf").read_bytes())
    data[-97] ^= 64  # the upper byte, where it is a float32
    (tmp_path / "m.gguf").write_bytes(data)
    report = verify_checkpoint(checkpoint, tmp_path / "m.gguf", tensors_only=True)
    assert (report["verdict"], len(report["tensors"]["mismatched"])) == ("different", 1)


def test_tokenizer_template_and_ends_are_those_of_the_checkpoint(folder, tmp_path):
    micro_published(tmp_path / "published", np.float32, num_layers=1, family="qwen2",
        dynamic_ntk=False, logn_attention=False, vocab_size=2050)  # fmt: skip
    import_checkpoint(tmp_path / "published", tmp_path / "ckpt")
    export_gguf(tmp_path / "ckpt", tmp_path / "m.gguf")
    _, tokenizer = moi_jax.load(tmp_path / "ckpt")
    read = Tokenizer.from_files(open_gguf(tmp_path / "m.gguf").tokenizer_files)
    assert read.encode(TEXT) == tokenizer.encode(TEXT)
    assert read.special_tokens == tokenizer.special_tokens
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    fields = {key: field.contents() for key, field in reader.fields.items()}
    assert fields["tokenizer.ggml.pre"] == "qwen2"
    assert fields["tokenizer.ggml.eos_token_id"] == tokenizer.special("<|im_end|>")
    assert fields["tokenizer.ggml.padding_token_id"] == tokenizer.special("<|endoftext|>")
    assert fields["tokenizer.ggml.tokens"][-2:] == ["[PAD2048]", "[PAD2049]"]
    assert fields["tokenizer.ggml.token_type"][-3:] == [3, 5, 5]
    assert "<|im_start|>assistant" in fields["tokenizer.chat_template"]


def test_adapters_are_merged_and_a_missing_base_is_one_line(checkpoint, tmp_path):
    if checkpoint.name != "qwen2":
        pytest.skip("one kind of model is enough")
    adapters = save_adapters(checkpoint, tmp_path / "adapters")
    export_gguf(adapters, tmp_path / "m.gguf", "F32")
    pytest.importorskip("torch", reason="transformers reads the file by code of its own")
    report = verify_checkpoint(adapters, tmp_path / "m.gguf")
    assert report["verdict"] == "equal", report
    assert report["logits"]["max_abs"] < 1e-4
    moved = save_adapters(checkpoint, tmp_path / "moved")
    checkpoint.rename(tmp_path / "elsewhere")
    try:
        with pytest.raises(UserError, match="their base"):
            export_gguf(moved, tmp_path / "none.gguf")
        assert not (tmp_path / "none.gguf").exists()
    finally:
        (tmp_path / "elsewhere").rename(checkpoint)


def test_what_cannot_be_written_is_one_line_and_leaves_nothing(folder, tmp_path, monkeypatch):
    plain = {"dynamic_ntk": False, "logn_attention": False, "num_layers": 1}
    out = tmp_path / "out" / "m.gguf"

    def refused(checkpoint):
        with pytest.raises(UserError) as error:
            export_gguf(checkpoint, out)
        assert not list(out.parent.glob("*"))
        assert "\n" not in str(error.value)
        return str(error.value)

    out.parent.mkdir()
    mistral = {**plain, "family": "mistral", "qkv_bias": False}
    micro_published(tmp_path / "mistral-published", np.float32, **mistral)
    import_checkpoint(tmp_path / "mistral-published", tmp_path / "mistral")
    assert "the family mistral, which is not written as GGUF" in refused(tmp_path / "mistral")

    source = micro_published(tmp_path / "published", np.float32, **plain, family="qwen2")
    import_checkpoint(source, tmp_path / "ckpt")
    split = json.loads((source / "tokenizer.json").read_text())
    split["pre_tokenizer"] = {"type": "Whitespace"}
    (source / "tokenizer.json").write_text(json.dumps(split))
    import_checkpoint(source, tmp_path / "other")
    assert "splits text in a way" in refused(tmp_path / "other")

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", full)
    assert "no space left" in refused(tmp_path / "ckpt")
    monkeypatch.undo()
    monkeypatch.setattr(
        "moi_jax.checkpoints.hf.gguf_exporter.merged_parameters", lambda *_: Large()
    )
    assert "float16 cannot hold" in refused(tmp_path / "ckpt")


class Large:
    """Parameters of the model of the last test, too large for float16."""

    def get(self, path, layer):
        return np.full({"embedding.table": (2048, 128)}[path], 1e6, np.float32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gguf", "m.gguf", "--type", "Q4_K"], "invalid choice: 'Q4_K'"),
        (["--gguf", "m.gguf", "--peft"], "leave out --peft"),
        (["--out", "dir", "--type", "F16"], "--type is for GGUF files"),
        (["--gguf", "m.gguf", "--out", "dir"], "not allowed with"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(arguments, message, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["convert", "export", "CKPT", *arguments])
    with pytest.raises((SystemExit, UserError)) as error:
        convert.main()
    assert message in f"{error.value} {capsys.readouterr().err}"
