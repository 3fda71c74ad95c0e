"""Presets: architectures by name, for random initialisation and for plans.

The sizes come from the published config.json files of the chat models. An import never uses a
preset: it reads the config.json beside the weights, which may differ (for example in the length of
a base model).
"""

from typing import Any

from moi_jax.common.errors import UserError
from moi_jax.models.config import ModelConfig, RopeScaling
from moi_jax.models.families import FAMILIES

QWEN1_5_PROMPT = "You are a helpful assistant"  # no full stop, like in its template
QWEN2_5_PROMPT = "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."
SMOLLM2_PROMPT = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


def _model(
    family: str, num_layers: int, hidden_size: int, num_heads: int, mlp_width: int, **others: Any
) -> ModelConfig:
    """Makes one architecture; `others` are the fields that its family does not fix."""
    fields = {
        "num_kv_heads": num_heads,
        "head_dim": 128,
        "qkv_bias": False,
        "tied_head": False,
        "initializer_range": 0.02,
        **FAMILIES[family].fixed,
        **others,
    }
    return ModelConfig(
        family=family,
        num_layers=num_layers,
        hidden_size=hidden_size,
        num_heads=num_heads,
        mlp_width=mlp_width,
        **fields,
    )


def _qwen_v1(*sizes: int, **others: Any) -> ModelConfig:
    fields = {
        "vocab_size": 151936,
        "seq_length": 8192,
        "rope_base": 1e4,
        "norm_eps": 1e-6,
        "dynamic_ntk": True,
        "logn_attention": True,
    }
    return _model("qwen_v1", *sizes, **(fields | others))


def _qwen(family: str, *sizes: int, **others: Any) -> ModelConfig:
    """Makes a Qwen1.5, Qwen2.5 or Qwen3 model."""
    fields = {"vocab_size": 151936, "seq_length": 32768, "rope_base": 1e6, "norm_eps": 1e-6}
    return _model(family, *sizes, **(fields | others))


def _qwen2_5(*sizes: int, **others: Any) -> ModelConfig:
    return _qwen("qwen2", *sizes, default_system_prompt=QWEN2_5_PROMPT, **others)


def _qwen3(*sizes: int, **others: Any) -> ModelConfig:
    return _qwen("qwen3", *sizes, num_kv_heads=8, seq_length=40960, **others)


def _llama(*sizes: int, **others: Any) -> ModelConfig:
    fields = {"vocab_size": 128256, "seq_length": 8192, "rope_base": 5e5, "norm_eps": 1e-5}
    return _model("llama", *sizes, **(fields | others))


def _llama3_scaled(factor: float, *sizes: int, **others: Any) -> ModelConfig:
    """Makes a Llama 3.1 or 3.2 model."""
    scaling = RopeScaling(
        factor=factor,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=8192,
    )
    return _llama(*sizes, num_kv_heads=8, rope_scaling=scaling, seq_length=131072, **others)


def _smollm2(*sizes: int, **others: Any) -> ModelConfig:
    fields = {"vocab_size": 49152, "head_dim": 64, "tied_head": True, "rope_base": 1e5}
    return _llama(*sizes, default_system_prompt=SMOLLM2_PROMPT, **(fields | others))


# The sizes are, in order: layers, width, heads, MLP width.
PRESETS: dict[str, ModelConfig] = {
    "qwen-7b": _qwen_v1(32, 4096, 32, 11008),
    "qwen-1.8b": _qwen_v1(24, 2048, 16, 5504),
    "qwen-72b": _qwen_v1(
        80, 8192, 64, 24576,
        vocab_size=152064, seq_length=32768, rope_base=1e6, dynamic_ntk=False, logn_attention=False,
    ),
    # For tests and laptops, with the vocabulary of the tokenizer in moi_jax/data/samples.
    "micro": _qwen_v1(2, 64, 2, 192, vocab_size=2048, head_dim=32),
    "tiny": _qwen_v1(4, 128, 2, 352, vocab_size=2048, head_dim=64),
    "small": _qwen_v1(6, 256, 4, 704, vocab_size=2048, head_dim=64),
    "qwen1.5-1.8b": _qwen("qwen2", 24, 2048, 16, 5504, default_system_prompt=QWEN1_5_PROMPT),
    "qwen1.5-4b": _qwen(
        "qwen2", 40, 2560, 20, 6912, rope_base=5e6, default_system_prompt=QWEN1_5_PROMPT
    ),
    "qwen2.5-0.5b": _qwen2_5(24, 896, 14, 4864, num_kv_heads=2, head_dim=64, tied_head=True),
    "qwen2.5-1.5b": _qwen2_5(28, 1536, 12, 8960, num_kv_heads=2, tied_head=True),
    "qwen2.5-3b": _qwen2_5(36, 2048, 16, 11008, num_kv_heads=2, tied_head=True),
    "qwen2.5-7b": _qwen2_5(28, 3584, 28, 18944, num_kv_heads=4, vocab_size=152064),
    "qwen2.5-14b": _qwen2_5(48, 5120, 40, 13824, num_kv_heads=8, vocab_size=152064),
    "qwen2.5-32b": _qwen2_5(64, 5120, 40, 27648, num_kv_heads=8, vocab_size=152064),
    "qwen2.5-72b": _qwen2_5(80, 8192, 64, 29568, num_kv_heads=8, vocab_size=152064),
    "qwen3-0.6b": _qwen3(28, 1024, 16, 3072, tied_head=True),
    "qwen3-1.7b": _qwen3(28, 2048, 16, 6144, tied_head=True),
    "qwen3-4b": _qwen3(36, 2560, 32, 9728, tied_head=True),
    "qwen3-8b": _qwen3(36, 4096, 32, 12288),
    "qwen3-14b": _qwen3(40, 5120, 40, 17408),
    "qwen3-32b": _qwen3(64, 5120, 64, 25600),
    "llama-2-7b": _llama(32, 4096, 32, 11008, vocab_size=32000, seq_length=4096, rope_base=1e4),
    "llama-2-13b": _llama(40, 5120, 40, 13824, vocab_size=32000, seq_length=4096, rope_base=1e4),
    "llama-3-8b": _llama(32, 4096, 32, 14336, num_kv_heads=8),
    "llama-3-70b": _llama(80, 8192, 64, 28672, num_kv_heads=8),
    "llama-3.1-8b": _llama3_scaled(8.0, 32, 4096, 32, 14336),
    "llama-3.1-70b": _llama3_scaled(8.0, 80, 8192, 64, 28672),
    "llama-3.2-1b": _llama3_scaled(32.0, 16, 2048, 32, 8192, head_dim=64, tied_head=True),
    "llama-3.2-3b": _llama3_scaled(32.0, 28, 3072, 24, 8192, tied_head=True),
    "smollm2-135m": _smollm2(30, 576, 9, 1536, num_kv_heads=3, initializer_range=1 / 24),
    "smollm2-360m": _smollm2(32, 960, 15, 2560, num_kv_heads=5),
    "smollm2-1.7b": _smollm2(24, 2048, 32, 8192, rope_base=130000.0),
    # SmolLM3's template adds a system text with the day's date, so it has no fixed prompt.
    "smollm3-3b": _model(
        "smollm3", 36, 2048, 16, 11008, num_kv_heads=4, vocab_size=128256, tied_head=True,
        seq_length=65536, rope_base=5e6, norm_eps=1e-6,
        rope_layers=tuple(layer % 4 != 0 for layer in range(1, 37)),
    ),
    "mistral-7b-v0.3": _model(
        "mistral", 32, 4096, 32, 14336, num_kv_heads=8, vocab_size=32768, seq_length=32768,
        rope_base=1e6, norm_eps=1e-5,
    ),
    "mistral-nemo-12b": _model(
        "mistral", 40, 5120, 32, 14336, num_kv_heads=8, vocab_size=131072, seq_length=131072,
        rope_base=1e6, norm_eps=1e-5,
    ),
    "seed-oss-36b": _model(
        "seed_oss", 64, 5120, 80, 27648, num_kv_heads=8, vocab_size=155136, seq_length=524288,
        rope_base=1e7, norm_eps=1e-6, qkv_bias=True,
    ),
    "phi-4": _model(
        "phi3", 40, 5120, 40, 17920, num_kv_heads=10, vocab_size=100352, seq_length=16384,
        rope_base=2.5e5, norm_eps=1e-5,
    ),
}  # fmt: skip


def preset(name: str) -> ModelConfig:
    """Returns the architecture; raises UserError, with the list of presets, for another name."""
    if name not in PRESETS:
        raise UserError(f"model.preset {name!r} is unknown; presets: {', '.join(PRESETS)}")
    return PRESETS[name]
