"""Every family against transformers' own model in torch, and its config.json and tensors."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from moi_jax.checkpoints.hf.reader import read_published
from moi_jax.checkpoints.hf.weights import (
    export_tensors,
    import_parameters,
    published_shapes,
    redundant_tensors,
)
from moi_jax.common.errors import UserError
from moi_jax.models import loss, rotary
from moi_jax.models.compute import Compute
from moi_jax.models.config import ModelConfig, in_family, read_hf_config, to_hf_config
from moi_jax.models.decoder import make_model
from moi_jax.models.families import FAMILIES
from moi_jax.models.parameters import abstract_parameters, map_parameters, parameter_specs
from moi_jax.models.presets import PRESETS
from moi_jax.models.remat import RematPolicy

LOGITS_ATOL = 2e-5
GRADIENTS_ATOL = 1e-6
LENGTH = 48

# Grouped-query heads everywhere, and all sizes different.
SIZES = {
    "vocab_size": 90, "hidden_size": 48, "intermediate_size": 56, "num_hidden_layers": 2,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 64,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
MODELS = {
    "qwen2": ("Qwen2", {"rms_norm_eps": 1e-6, "rope_parameters": {"rope_theta": 1e6}}),
    "qwen2 tied": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3", {"head_dim": 12, "rms_norm_eps": 1e-6}),
    "qwen3 tied with biases": (
        "Qwen3", {"head_dim": 10, "tie_word_embeddings": True, "attention_bias": True}
    ),
    "llama 2": ("Llama", {"rms_norm_eps": 1e-5, "num_key_value_heads": 6}),
    "llama 3": ("Llama", {"rms_norm_eps": 1e-5, "rope_parameters": {"rope_theta": 5e5}}),
    "llama 3.2": ("Llama", {"tie_word_embeddings": True, "rope_parameters": LLAMA3}),
    "llama with biases": ("Llama", {"attention_bias": True, "head_dim": 14}),
    "mistral": ("Mistral", {"head_dim": 10, "rms_norm_eps": 1e-5, "sliding_window": None}),
    "seed-oss": (
        "SeedOss", {"head_dim": 12, "attention_out_bias": True, "pad_token_id": None}
    ),
    # It rotates 6 of the 8 numbers of a head.
    "phi3": (
        "Phi3", {"rope_parameters": {"partial_rotary_factor": 0.8}, "pad_token_id": None}
    ),
    "smollm3": ("SmolLM3", {"no_rope_layers": [0, 1], "pad_token_id": None}),
}  # fmt: skip


def transformers_model(kind):
    """Makes a tiny transformers model; all its parameters are random, also norms and biases.

    It is in inference mode, without the dropout that Seed-OSS has in training.
    """
    torch = pytest.importorskip("torch", reason="torch is not installed (extra: parity)")
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    family, settings = MODELS[kind]
    settings = {"attn_implementation": "eager", **SIZES, **settings}
    config = getattr(transformers, f"{family}Config")(**settings)
    torch.manual_seed(0)
    model = getattr(transformers, f"{family}ForCausalLM")(config).float()
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float("norm" in name), std=0.15)
    return model.eval()


@pytest.fixture(scope="module", params=MODELS)
def case(request):
    """Returns the torch model, its config and tensors as we read them, and tokens [2, LENGTH]."""
    model = transformers_model(request.param)
    config = read_hf_config(model.config.to_json_string(), request.param)
    tensors = {name: tensor.detach().numpy() for name, tensor in model.state_dict().items()}
    tokens = np.random.default_rng(1).integers(0, 90, (2, LENGTH)).astype(np.int32)
    return model, config, imported(config, tensors), tokens


def imported(config, tensors, dtype=np.float32):
    flat = dict(import_parameters(config, tensors.__getitem__, dtype))
    return map_parameters(config, lambda path, _: flat[path])


def exported(config, tree, as_family=None):
    """Exports a tree (parameters or gradients) to published tensors."""
    tree = jax.tree.map(np.asarray, tree)

    def get(path, layer):
        node = tree
        for name in path.split("."):
            node = node[name]
        return node if layer is None else node[layer]

    return dict(export_tensors(config, get, as_family))


def torch_logits(model, tokens):
    import torch

    with torch.no_grad():
        return model(torch.tensor(tokens).long()).logits.numpy()


def test_logits_equal_transformers(case):
    """They do so also past the original length of Llama 3's scaling (16)."""
    model, config, parameters, tokens = case
    logits = make_model(config)(parameters)(tokens)
    np.testing.assert_allclose(logits, torch_logits(model, tokens), atol=LOGITS_ATOL, rtol=0)


def test_packed_segments_equal_transformers_run_on_each_alone(case):
    model, config, parameters, tokens = case
    lengths = (11, 30, LENGTH - 41)
    segment_ids = np.repeat((1, 2, 3), lengths).astype(np.int32)[None].repeat(2, 0)
    logits = np.asarray(make_model(config)(parameters)(tokens, segment_ids=segment_ids))
    for segment in (1, 2, 3):
        here = segment_ids[0] == segment
        alone = torch_logits(model, tokens[:, here])
        np.testing.assert_allclose(logits[:, here], alone, atol=LOGITS_ATOL, rtol=0)


def test_loss_and_gradients_equal_transformers(case):
    import torch

    model, config, parameters, tokens = case
    segment_ids = np.ones_like(tokens)
    positions = np.arange(LENGTH, dtype=np.int32)[None].repeat(2, 0)

    def mean_loss(parameters):
        decoder = make_model(config, Compute(remat=RematPolicy()))(parameters)
        hidden = decoder.hidden_states(tokens, positions, segment_ids, extend_context=False)
        targets = tokens[:, 1:]
        weights = jnp.full(targets.shape, 1 / targets.size)
        return loss.weighted_nll(hidden[:, :-1], decoder.head_kernel(), targets, weights)[0]

    ours, gradients = jax.jit(jax.value_and_grad(mean_loss))(parameters)
    model.zero_grad()
    batch = torch.tensor(tokens).long()
    theirs = model(batch, labels=batch).loss
    theirs.backward()
    np.testing.assert_allclose(ours, theirs.item(), rtol=1e-5)
    named = exported(config, gradients)
    reference = {name: p.grad.numpy() for name, p in model.named_parameters()}
    assert named.keys() == reference.keys()
    for name, gradient in reference.items():
        np.testing.assert_allclose(named[name], gradient, atol=GRADIENTS_ATOL, err_msg=name)


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16])
def test_import_then_export_is_bit_identical(case, dtype):
    """Every tensor of the torch model is used, with its shape."""
    model, config, _, _ = case
    tensors = {name: t.numpy().astype(dtype) for name, t in model.state_dict().items()}
    back = exported(config, imported(config, tensors, dtype))
    assert {name: array.shape for name, array in back.items()} == published_shapes(config)
    copies = {k for k, source in redundant_tensors(config).items() if source}
    assert tensors.keys() - copies == back.keys()
    for name, array in back.items():
        assert array.dtype == dtype
        assert array.flags.c_contiguous
        assert array.tobytes() == tensors[name].tobytes(), name
    for copy in copies:
        assert tensors[copy].tobytes() == back[redundant_tensors(config)[copy]].tobytes()


def test_the_exported_config_is_read_by_transformers_as_the_same_model(case):
    import transformers

    model, config, _, _ = case
    values = to_hf_config(config)
    theirs = transformers.AutoConfig.for_model(**values)
    assert read_hf_config(theirs.to_json_string(), "theirs") == config
    assert values["architectures"] == [type(model).__name__]


@pytest.mark.parametrize("fixture", ["A", "B"])
def test_qwen_v1_round_trips_and_its_config_keeps_the_published_keys(golden, fixture):
    config, tree = read_published(golden / fixture, None)
    for name, array in exported(config, tree).items():
        assert array.tobytes() == exported_source(golden / fixture)[name].tobytes(), name
    published = json.loads((golden / fixture / "config.json").read_text())
    values = to_hf_config(config)
    same = published.keys() - {"transformers_version", "max_position_embeddings", "fp32"}
    assert {key: values[key] for key in same - {"use_flash_attn"}} == {
        key: published[key] for key in same - {"use_flash_attn"}
    }


def exported_source(directory):
    import safetensors.numpy

    shards = [safetensors.numpy.load_file(path) for path in directory.glob("*.safetensors")]
    return {name: array for shard in shards for name, array in shard.items()}


@pytest.mark.parametrize("length", [32, 64])
def test_qwen_v1_written_as_qwen2_equals_it_up_to_its_trained_length(golden, length):
    transformers = pytest.importorskip("transformers")
    torch = pytest.importorskip("torch")
    config, tree = read_published(golden / "B", None)  # seq_length 64
    qwen2 = in_family(config, "qwen2")
    model = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**to_hf_config(qwen2)))
    tensors = exported(config, tree, as_family="qwen2")
    model.load_state_dict({name: torch.tensor(array) for name, array in tensors.items()})
    arrays = np.load(golden / "B" / "logits.npz")
    theirs = torch_logits(model.float(), arrays[f"x{length}"])
    np.testing.assert_allclose(theirs, arrays[f"eval_{length}"], atol=LOGITS_ATOL, rtol=0)


@pytest.mark.parametrize(
    ("preset", "family"),
    [
        ("qwen3-8b", "qwen2"),
        ("llama-3-8b", "qwen2"),
        ("qwen-7b", "llama"),
        ("qwen-7b", "gpt"),
        ("smollm3-3b", "llama"),
    ],
)
def test_a_family_that_cannot_express_the_model_is_refused(preset, family):
    with pytest.raises(UserError, match=f"cannot be written as '{family}'"):
        in_family(PRESETS[preset], family)


# Numbers of parameters from the model cards and the safetensors headers.
COUNTS = {
    "qwen-7b": 7_721_324_544, "qwen-1.8b": 1_836_828_672, "qwen-72b": 72_287_920_128,
    "qwen1.5-1.8b": 1_836_828_672, "qwen1.5-4b": 3_950_369_280,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512, "qwen2.5-14b": 14_770_033_664, "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648, "qwen3-0.6b": 596_049_920, "qwen3-1.7b": 1_720_574_976,
    "qwen3-4b": 4_022_468_096, "qwen3-8b": 8_190_735_360, "qwen3-14b": 14_768_307_200,
    "qwen3-32b": 32_762_123_264, "llama-2-7b": 6_738_415_616, "llama-2-13b": 13_015_864_320,
    "llama-3-8b": 8_030_261_248, "llama-3-70b": 70_553_706_496, "llama-3.1-8b": 8_030_261_248,
    "llama-3.1-70b": 70_553_706_496, "llama-3.2-1b": 1_235_814_400, "llama-3.2-3b": 3_212_749_824,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "smollm3-3b": 3_075_098_624, "mistral-7b-v0.3": 7_248_023_552,
    "mistral-nemo-12b": 12_247_782_400, "seed-oss-36b": 36_151_104_512, "phi-4": 14_659_507_200,
}  # fmt: skip


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_has_the_published_size_and_reads_back_from_its_config_json(name):
    config = PRESETS[name]
    count = sum(int(np.prod(p.shape)) for p in parameter_specs(config).values())
    assert count == COUNTS.get(name, count)
    assert sum(int(np.prod(s)) for s in published_shapes(config).values()) == count
    assert read_hf_config(json.dumps(to_hf_config(config)), name) == config
    assert ModelConfig.from_json(json.loads(json.dumps(config.to_json()))) == config
    paths = {path for tensor in FAMILIES[config.family].tensors for path in tensor.paths}
    assert parameter_specs(config).keys() <= paths


def test_every_published_size_is_checked():
    assert PRESETS.keys() - COUNTS.keys() == {"micro", "tiny", "small"}


def test_default_prompts_are_those_of_the_templates():
    prompts = {name: PRESETS[name].default_system_prompt for name in PRESETS}
    assert prompts["qwen1.5-4b"] == "You are a helpful assistant"
    assert prompts["qwen2.5-7b"] == (
        "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
    )
    assert prompts["llama-3.1-8b"] == prompts["qwen3-8b"] == ""
    assert prompts["smollm2-135m"].startswith("You are a helpful AI assistant named SmolLM, ")


def test_a_checkpoint_from_before_the_families_is_read():
    values = PRESETS["qwen-7b"].to_json()
    for name in ("out_bias", "qk_norm", "tied_head", "rope_scaling"):
        del values[name]
    assert ModelConfig.from_json(values) == PRESETS["qwen-7b"]


# The published files, without the ids of special tokens and the versions.
PUBLISHED = {
    "qwen2.5-1.5b": {
        "architectures": ["Qwen2ForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": 1536, "initializer_range": 0.02, "intermediate_size": 8960,
        "max_position_embeddings": 32768, "max_window_layers": 21, "model_type": "qwen2",
        "num_attention_heads": 12, "num_hidden_layers": 28, "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06, "rope_theta": 1000000.0, "sliding_window": 32768,
        "tie_word_embeddings": True, "use_cache": True, "use_sliding_window": False,
        "vocab_size": 151936,
    },
    "qwen3-32b": {
        "architectures": ["Qwen3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
        "intermediate_size": 25600, "max_position_embeddings": 40960, "max_window_layers": 64,
        "model_type": "qwen3", "num_attention_heads": 64, "num_hidden_layers": 64,
        "num_key_value_heads": 8, "rms_norm_eps": 1e-06, "rope_scaling": None,
        "rope_theta": 1000000, "sliding_window": None, "tie_word_embeddings": False,
        "use_cache": True, "use_sliding_window": False, "vocab_size": 151936,
    },
    "smollm2-1.7b": {
        "architectures": ["LlamaForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "hidden_act": "silu", "hidden_size": 2048, "initializer_range": 0.02,
        "intermediate_size": 8192, "max_position_embeddings": 8192, "mlp_bias": False,
        "model_type": "llama", "num_attention_heads": 32, "num_hidden_layers": 24,
        "num_key_value_heads": 32, "pretraining_tp": 1, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 130000, "tie_word_embeddings": True,
        "use_cache": True, "vocab_size": 49152,
    },
    "mistral-7b-v0.3": {
        "architectures": ["MistralForCausalLM"], "attention_dropout": 0.0, "hidden_act": "silu",
        "hidden_size": 4096, "initializer_range": 0.02, "intermediate_size": 14336,
        "max_position_embeddings": 32768, "model_type": "mistral", "num_attention_heads": 32,
        "num_hidden_layers": 32, "num_key_value_heads": 8, "rms_norm_eps": 1e-05,
        "rope_theta": 1000000.0, "sliding_window": None, "tie_word_embeddings": False,
        "use_cache": True, "vocab_size": 32768,
    },
    "phi-4": {
        "architectures": ["Phi3ForCausalLM"], "attention_bias": False, "attention_dropout": 0.0,
        "embd_pdrop": 0.0, "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02,
        "intermediate_size": 17920, "max_position_embeddings": 16384, "model_type": "phi3",
        "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
        "original_max_position_embeddings": 16384, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
        "rope_scaling": None, "rope_theta": 250000, "sliding_window": None,
        "tie_word_embeddings": False, "use_cache": True, "vocab_size": 100352,
    },
    "smollm3-3b": {
        "architectures": ["SmolLM3ForCausalLM"], "attention_bias": False,
        "attention_dropout": 0.0, "hidden_act": "silu", "hidden_size": 2048,
        "initializer_range": 0.02, "intermediate_size": 11008, "max_position_embeddings": 65536,
        "max_window_layers": 28, "mlp_bias": False, "model_type": "smollm3",
        "no_rope_layer_interval": 4, "no_rope_layers": [1, 1, 1, 0] * 9,
        "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
        "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 5000000.0,
        "sliding_window": None, "tie_word_embeddings": True, "use_cache": True,
        "use_sliding_window": False, "vocab_size": 128256,
    },
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_config_json_is_the_preset_and_is_written_with_its_keys(name):
    published = PUBLISHED[name]
    config = read_hf_config(json.dumps(published), name)
    assert config == PRESETS[name]
    # Keys without effect are left out: windows that are not used, the slicing of pretraining,
    # an interval beside the list of its layers.
    idle = {"max_window_layers", "sliding_window", "pretraining_tp", "no_rope_layer_interval"}
    written = to_hf_config(config)
    assert written.pop("sliding_window", None) is None
    assert written == {k: v for k, v in published.items() if k not in idle}


# Models whose config.json differs from a preset's in some values: preset, changed keys and fields.
RELATIVES: dict[str, tuple[str, dict, dict]] = {
    "Qwen2.5-Coder-7B-Instruct": (
        "qwen2.5-7b", {"max_window_layers": 28, "sliding_window": 131072}, {}
    ),
    "Qwen2.5-Math-7B-Instruct": (
        "qwen2.5-7b",
        {"max_position_embeddings": 4096, "max_window_layers": 28, "rope_theta": 10000.0,
         "sliding_window": 4096},
        {"seq_length": 4096, "rope_base": 1e4},
    ),
    "DeepSeek-R1-Distill-Qwen-1.5B": (
        "qwen2.5-1.5b",
        {"max_position_embeddings": 131072, "max_window_layers": 21, "rope_theta": 10000,
         "sliding_window": 4096, "tie_word_embeddings": False, "use_mrope": False},
        {"seq_length": 131072, "rope_base": 1e4, "tied_head": False},
    ),
    "DeepSeek-R1-Distill-Qwen-32B": (
        "qwen2.5-32b",
        {"max_position_embeddings": 131072, "max_window_layers": 64, "sliding_window": 131072},
        {"seq_length": 131072},
    ),
    "DeepSeek-R1-Distill-Llama-8B": ("llama-3.1-8b", {"pretraining_tp": 1}, {}),
}  # fmt: skip


@pytest.mark.parametrize("name", RELATIVES)
def test_a_relative_is_read_as_its_family_with_its_own_values(name):
    preset, keys, fields = RELATIVES[name]
    config = read_hf_config(json.dumps(to_hf_config(PRESETS[preset]) | keys), name)
    assert config == dataclasses.replace(PRESETS[preset], **fields)
    assert read_hf_config(json.dumps(to_hf_config(config)), "") == config


def test_both_layouts_of_the_rotary_keys_are_read():
    old = to_hf_config(PRESETS["llama-3.1-8b"])
    new = {key: value for key, value in old.items() if not key.startswith("rope_")}
    new["rope_parameters"] = {**old["rope_scaling"], "rope_theta": 500000.0}
    assert read_hf_config(json.dumps(new), "new") == PRESETS["llama-3.1-8b"]
    older = {**old, "rope_scaling": {**old["rope_scaling"], "type": "llama3"}}
    del older["rope_scaling"]["rope_type"]
    assert read_hf_config(json.dumps(older), "older") == PRESETS["llama-3.1-8b"]


def test_missing_keys_mean_what_they_mean_in_transformers():
    def read(preset, *missing):
        values = {k: v for k, v in to_hf_config(PRESETS[preset]).items() if k not in missing}
        return read_hf_config(json.dumps(values), "")

    llama = PRESETS["llama-2-7b"]
    assert read("llama-2-7b", "rope_theta", "tie_word_embeddings", "attention_bias") == llama
    assert read("llama-3-8b", "num_key_value_heads").num_kv_heads == 32
    assert read("qwen3-0.6b", "head_dim").head_dim == 128  # not 1024 / 16
    assert read("llama-3.2-3b", "head_dim").head_dim == 128
    assert read("smollm3-3b", "no_rope_layers") == PRESETS["smollm3-3b"]
    assert read("smollm3-3b", "rope_theta").rope_base == 2e6
    assert read("smollm3-3b", "tie_word_embeddings").tied_head
    assert read("seed-oss-36b", "head_dim", "attention_bias") == PRESETS["seed-oss-36b"]
    unset = {**to_hf_config(llama), "head_dim": None, "num_key_value_heads": None}
    assert read_hf_config(json.dumps(unset), "") == llama
    scaled = to_hf_config(PRESETS["llama-3.1-8b"])
    del scaled["rope_scaling"]["original_max_position_embeddings"]
    for change, length in ({}, 131072), ({"original_max_position_embeddings": 4096}, 4096):
        config = read_hf_config(json.dumps(scaled | change), "")
        assert config.rope_scaling.original_max_position_embeddings == length


YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
REFUSED = [
    ("qwen2.5-7b", {"model_type": "qwen2_moe"}, "model_type 'qwen2_moe' is not built yet"),
    ("llama-3-8b", {"model_type": "mixtral"}, "model_type 'mixtral' is not built yet"),
    ("llama-3-8b", {"model_type": ["llama"]}, r"model_type \['llama'\] is not built yet"),
    ("llama-3-8b", {"num_local_experts": 8}, "num_local_experts 8 is not supported"),
    ("qwen3-8b", {"num_experts": 128}, "num_experts 128 is not supported"),
    ("qwen2.5-7b", {"rope_scaling": YARN}, "rope type 'yarn' is not supported"),
    ("llama-2-7b", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "rope type 'linear'"),
    ("llama-3-8b", {"rope_parameters": {"rope_type": "longrope"}}, "rope type 'longrope'"),
    ("llama-3.1-8b", {"rope_parameters": {"rope_theta": 1e4}}, "both rope_scaling and rope_param"),
    ("llama-3-8b", {"rope_scaling": [8.0]}, "rotary parameters by layer type"),
    (
        "qwen3-8b",
        {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
        "rotary parameters by layer type",
    ),
    ("llama-3-8b", {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "lacks low_freq_fac"),
    (
        "llama-3-8b",
        {"rope_scaling": {**LLAMA3, "high_freq_factor": 1.0}},
        "high_freq_factor must be greater than low_freq_factor",
    ),
    ("llama-3-8b", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supported"),
    ("llama-3-8b", {"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
    ("smollm2-135m", {"rope_interleaved": True}, "rope_interleaved True is not supported"),
    ("qwen2.5-7b", {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 27},
     "use_sliding_window is true"),
    ("qwen3-8b", {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window is tr"),
    ("qwen3-8b", {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types other"),
    ("qwen3-8b", {"layer_types": 5}, "layer_types other than 'full_attention'"),
    ("qwen2.5-7b", {"num_attention_heads": 27}, "hidden_size does not divide into the attention"),
    ("llama-3-8b", {"sliding_window": 4096}, "sliding_window 4096 is not supported"),
    ("qwen2.5-7b", {"quantization_config": {"quant_method": "gptq"}}, "quantised weights"),
    ("llama-3-8b", {"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported, only 'silu'"),
    ("llama-3-8b", {"mlp_bias": True}, "mlp_bias True is not supported"),
    ("qwen2.5-7b", {"attention_dropout": 0.1}, "attention_dropout 0.1 is not supported"),
    ("qwen2.5-7b", {"is_causal": False}, "is_causal False is not supported"),
    ("qwen-7b", {"rotary_pct": 0.25}, "rotary_pct 0.25 is not supported"),
    ("qwen-7b", {"no_bias": False}, "no_bias False is not supported"),
    ("qwen-7b", {"tie_word_embeddings": True}, "tie_word_embeddings True is not supported"),
    ("qwen-7b", {"use_dynamic_ntk": "auto"}, "use_dynamic_ntk is 'auto', not true or false"),
    ("qwen2.5-7b", {"rms_norm_eps": None}, "lacks rms_norm_eps"),
    ("qwen2.5-7b", {"num_attention_heads": 0}, "num_attention_heads is 0, not a whole number ab"),
    ("qwen2.5-7b", {"vocab_size": True}, "vocab_size is True, not a whole number above zero"),
    ("qwen2.5-7b", {"rope_theta": float("nan")}, "rope_theta is nan, not a number above zero"),
    ("qwen2.5-7b", {"num_key_value_heads": 5}, "cannot share 5 key/value heads evenly"),
    ("qwen3-8b", {"head_dim": 127}, "heads of odd width 127 cannot be rotated"),
    ("mistral-7b-v0.3", {"sliding_window": 4096}, "sliding_window 4096 is below max_position_emb"),
    ("phi-4", {"sliding_window": 2047}, "set max_position_embeddings to 2047"),
    ("phi-4", {"sliding_window": "all"}, "sliding_window is 'all', not a whole number"),
    ("phi-4", {"rope_scaling": {"type": "longrope", "long_factor": [4.0]}}, "type 'longrope'"),
    ("phi-4", {"rope_scaling": LLAMA3}, "type 'llama3' is not supported, only 'default'; remove"),
    ("phi-4", {"partial_rotary_factor": 0.29}, "would rotate 37 numbers of each; they must be an"),
    ("phi-4", {"partial_rotary_factor": 1.5}, "would rotate 192 numbers of each"),
    ("phi-4", {"embd_pdrop": 0.1}, "embd_pdrop 0.1 is not supported, only 0.0"),
    ("phi-4", {"attention_bias": True}, "attention_bias True is not supported, only False"),
    ("mistral-7b-v0.3", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5 is not supp"),
    ("seed-oss-36b", {"mlp_bias": True}, "mlp_bias True is not supported"),
    ("seed-oss-36b", {"sliding_window": 4096}, "sliding_window 4096 is not supported, only None"),
    ("smollm3-3b", {"use_sliding_window": True, "sliding_window": 4096}, "use_sliding_window True"),
    ("smollm3-3b", {"no_rope_layers": [1, 0]}, "no_rope_layers has 2 entries for 36 layers"),
    ("smollm3-3b", {"no_rope_layers": [2] * 36}, r"not a list of 0 and 1"),
    ("smollm3-3b", {"no_rope_layers": None, "no_rope_layer_interval": 0}, "interval is 0, not a"),
]  # fmt: skip


@pytest.mark.parametrize(("preset", "change", "message"), REFUSED)
def test_a_setting_that_is_not_built_is_refused_by_name(preset, change, message):
    values = {**to_hf_config(PRESETS[preset]), **change}
    with pytest.raises(UserError, match=message) as error:
        read_hf_config(json.dumps(values), "the/config.json")
    assert str(error.value).startswith("the/config.json")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("preset", "change"),
    [
        (
            "qwen2.5-7b",
            {"use_sliding_window": True, "sliding_window": 4096, "max_window_layers": 28},
        ),
        (
            "qwen2.5-7b",
            {"use_sliding_window": False, "sliding_window": 131072, "max_window_layers": 0},
        ),
        ("qwen2.5-7b", {"layer_types": ["full_attention"] * 28}),
        ("qwen2.5-7b", {"rope_scaling": {"rope_type": "default"}}),
        ("mistral-7b-v0.3", {"sliding_window": 32768}),
        ("smollm3-3b", {"no_rope_layers": [1, 1, 1, 0] * 10}),
        ("seed-oss-36b", {"rope_scaling": {"rope_type": "default"}, "attention_dropout": 0.0}),
        ("phi-4", {"rope_parameters": {"rope_theta": 2.5e5, "partial_rotary_factor": 1.0}}),
    ],
)
def test_settings_without_effect_are_read(preset, change):
    values = {**to_hf_config(PRESETS[preset]), **change}
    assert read_hf_config(json.dumps(values), "") == PRESETS[preset]


def test_a_mistral_file_without_a_window_has_that_of_mistral_7b_v01():
    values = to_hf_config(PRESETS["mistral-7b-v0.3"])
    del values["sliding_window"]
    with pytest.raises(UserError, match="sliding_window 4096 is below max_position_embeddings 32"):
        read_hf_config(json.dumps(values), "")
    short = read_hf_config(json.dumps(values | {"max_position_embeddings": 4096}), "")
    assert short == dataclasses.replace(PRESETS["mistral-7b-v0.3"], seq_length=4096)


def test_llama_3_scaling_by_hand():
    """Base 16, width 4: frequencies 1 and 1/4, so 6.37 and 1.59 turns in the original length 40."""
    scaling = dataclasses.replace(
        PRESETS["llama-3.1-8b"].rope_scaling, original_max_position_embeddings=40
    )
    cos, _ = rotary.rotary_angles(jnp.array([[3]]), 4, 16.0, scaling, None, jnp.float32)
    kept = (40 / 4 / (2 * np.pi) - 1) / (4 - 1)
    expected = [1.0, 0.25 * (kept + (1 - kept) / 8)]
    np.testing.assert_allclose(cos[0, 0], np.cos(3 * np.array(expected)), rtol=1e-6)


# Its first layer does not rotate, the second one rotates half of each head.
TIED = dataclasses.replace(
    PRESETS["qwen2.5-0.5b"], vocab_size=1016, num_layers=2, hidden_size=40, num_heads=4,
    num_kv_heads=2, head_dim=8, mlp_width=48, rope_layers=(False, True), partial_rotary_factor=0.5,
)  # fmt: skip


def test_a_tied_model_has_no_head_parameter():
    assert "head.kernel" not in parameter_specs(TIED)
    assert "lm_head.weight" not in published_shapes(TIED)
    assert redundant_tensors(TIED) == {"lm_head.weight": "model.embed_tokens.weight"}


def program_and_gradients(config, mesh_axes):
    """Returns the text of a device's program, and the gradients of the loss in all parameters."""
    from moi_jax import config as config_lib
    from moi_jax.models.parameters import parameter_shardings, random_parameters
    from moi_jax.parallel.mesh import make_mesh

    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (8, 12)).astype(np.int32)

    def mean_loss(parameters, tokens):
        decoder = make_model(config)(parameters)
        segment_ids = jnp.ones_like(tokens)
        positions = rotary.segment_positions(segment_ids)
        hidden = decoder.hidden_states(tokens, positions, segment_ids, extend_context=False)
        weights = jnp.full(tokens.shape, 1 / tokens.size)
        return loss.weighted_nll(hidden, decoder.head_kernel(), tokens, weights)[0]

    mesh = make_mesh(config_lib.Mesh(**mesh_axes), jax.devices())
    with jax.set_mesh(mesh):
        shardings = parameter_shardings(config, mesh)
        rows = jax.NamedSharding(mesh, jax.P(("data", "fsdp"), "context"))
        parameters = random_parameters(config, 0, "float32", mesh)
        step = jax.jit(jax.grad(mean_loss), in_shardings=(shardings, rows), out_shardings=shardings)
        program = step.lower(parameters, tokens).compile()
        gradients = program(parameters, jax.device_put(tokens, rows))
        return program.as_text(), jax.device_get(gradients)


@pytest.fixture(scope="module")
def on_one_device():
    return program_and_gradients(TIED, {"fsdp": 1})[1]


@pytest.mark.parametrize(
    "axes",
    [
        {"fsdp": 8},
        {"data": 2, "fsdp": 2, "tensor": 2},
        {"fsdp": 2, "tensor": 2, "context": 2},
    ],
    ids=str,
)
def test_a_tied_table_and_its_gradient_are_never_whole_on_a_device(
    on_one_device, axes, monkeypatch, capfd
):
    """The lookup splits [V, D] along D and the head along V; no device holds more than a shard.

    The result of the lookup, [8 rows, 12, D], is never whole either.
    """
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 1)  # the loss gathers the rows of a chunk
    text, gradients = program_and_gradients(TIED, axes)
    shapes = [list(map(int, s.split(","))) for s in re.findall(r"\w+\[([\d,]+)\]", text)]
    entries = TIED.vocab_size * TIED.hidden_size // axes.get("tensor", 1)
    assert not [shape for shape in shapes if np.prod(shape) >= entries]
    assert [8, 12, TIED.hidden_size] not in shapes
    assert "Involuntary full rematerialization" not in capfd.readouterr().err  # XLA's last resort
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-7), gradients, on_one_device)


def test_an_own_head_and_the_embedding_are_never_whole_on_a_device():
    config = dataclasses.replace(TIED, tied_head=False)
    text, _ = program_and_gradients(config, {"fsdp": 8})
    assert not re.findall(r"\w+\[(?:1016,40|40,1016)\]", text)


def test_every_block_of_the_page_on_porting_is_run_or_is_in_the_source():
    root = Path(__file__).parents[2]
    page = (root / "docs" / "port-a-model.md").read_text(encoding="utf-8")
    files = [Path(__file__), *(root / "moi_jax" / "models").rglob("*.py")]
    sources = [path.read_text(encoding="utf-8") for path in files]
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == page.count("```") // 2 == 6
    for block in blocks:
        if block.startswith("from "):
            exec(block, {})
        else:
            assert any(f"\n{block}" in source for source in sources), block
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.MULTILINE)) == FAMILIES.keys()
    for path in re.findall(r"`((?:moi_jax|tests)/[\w/]+\.py)`", page):
        assert (root / path).is_file(), path


def test_biases_and_head_norms_are_declared_where_the_family_has_them():
    paths = {name: parameter_specs(config).keys() for name, config in PRESETS.items()}
    assert "layers.attention.query.bias" in paths["qwen2.5-7b"]
    assert "layers.attention.out.bias" not in paths["qwen2.5-7b"]
    assert not any("bias" in path for path in paths["qwen3-8b"] | paths["llama-3-8b"])
    assert {"layers.attention.query_norm.scale", "layers.attention.key_norm.scale"} <= paths[
        "qwen3-8b"
    ]
    attention = abstract_parameters(PRESETS["qwen3-8b"], "float32")["layers"]["attention"]
    assert attention["key_norm"]["scale"].shape == (36, 128)


def test_import_holds_one_published_tensor_at_a_time():
    """Each tensor is freed before the next one is read."""
    import weakref

    config = dataclasses.replace(PRESETS["tiny"], num_layers=2, vocab_size=32)
    shapes, alive = published_shapes(config), []

    def read(name):
        assert not any(reference() is not None for reference in alive)
        array = np.zeros(shapes[name], np.float32).view(Watched)
        alive.append(weakref.ref(array))
        return array

    paths = [path for path, _ in import_parameters(config, read, np.float32)]
    assert paths == list(parameter_specs(config))


class Watched(np.ndarray):
    """An array that can have weak references, which numpy's own arrays cannot."""
