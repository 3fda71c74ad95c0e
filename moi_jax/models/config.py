"""The architecture of a decoder: `ModelConfig`, the presets, and how it is read from JSON."""

import dataclasses
import json
from typing import Any

from moi_jax.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """One decoder-only transformer; families differ in these fields alone.

    Letters used for the sizes everywhere: D hidden_size, H num_heads, K num_kv_heads,
    N head_dim, F mlp_width, V vocab_size, L num_layers.
    """

    family: str
    vocab_size: int
    num_layers: int
    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    mlp_width: int
    seq_length: int  # trained length: beyond it, dynamic NTK and log-n act at inference
    qkv_bias: bool
    rope_base: float
    norm_eps: float
    dynamic_ntk: bool
    logn_attention: bool
    initializer_range: float
    default_system_prompt: str

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "ModelConfig":
        return cls(**values)


def _qwen_v1(**sizes: Any) -> ModelConfig:
    """Qwen (2023), whose published sizes share everything but these."""
    fields = {
        "family": "qwen_v1",
        "head_dim": 128,
        "seq_length": 8192,
        "qkv_bias": True,
        "rope_base": 1e4,
        "norm_eps": 1e-6,
        "dynamic_ntk": True,
        "logn_attention": True,
        "initializer_range": 0.02,
        "default_system_prompt": "You are a helpful assistant.",
        "num_kv_heads": sizes["num_heads"],
    }
    return ModelConfig(**{**fields, **sizes})


PRESETS: dict[str, ModelConfig] = {
    "qwen-7b": _qwen_v1(
        vocab_size=151936, num_layers=32, hidden_size=4096, num_heads=32, mlp_width=11008
    ),
    "qwen-1.8b": _qwen_v1(
        vocab_size=151936, num_layers=24, hidden_size=2048, num_heads=16, mlp_width=5504
    ),
    "qwen-72b": _qwen_v1(
        vocab_size=152064,
        num_layers=80,
        hidden_size=8192,
        num_heads=64,
        mlp_width=24576,
        seq_length=32768,
        rope_base=1e6,
        dynamic_ntk=False,
        logn_attention=False,
    ),
    # For laptops and tests, with the vocabulary of the tokenizer in moi_jax/data/samples.
    "tiny": _qwen_v1(
        vocab_size=2048, num_layers=4, hidden_size=128, num_heads=2, head_dim=64, mlp_width=352
    ),
    "small": _qwen_v1(
        vocab_size=2048, num_layers=6, hidden_size=256, num_heads=4, head_dim=64, mlp_width=704
    ),
}


def preset(name: str) -> ModelConfig:
    """Raises UserError, listing the presets, when `name` is none of them."""
    if name not in PRESETS:
        raise UserError(f"model.preset {name!r} is unknown; presets: {', '.join(PRESETS)}")
    return PRESETS[name]


# Our field: the keys of a published Qwen v1 config.json, the August 2023 release's second.
_QWEN_V1_KEYS = {
    "vocab_size": ("vocab_size", "padded_vocab_size"),
    "num_layers": ("num_hidden_layers", "n_layer"),
    "hidden_size": ("hidden_size", "n_embd"),
    "num_heads": ("num_attention_heads", "n_head"),
    "head_dim": ("kv_channels",),
    "seq_length": ("seq_length",),
    "rope_base": ("rotary_emb_base",),
    "norm_eps": ("layer_norm_epsilon",),
    "dynamic_ntk": ("use_dynamic_ntk",),
    "logn_attention": ("use_logn_attn",),
    "initializer_range": ("initializer_range",),
}


def read_hf_config(text: str | bytes, where: str) -> ModelConfig:
    """The architecture a published Qwen v1 `config.json` describes; `where` names the file.

    Raises:
      UserError: no JSON, another architecture, a missing key, or a setting we do not build.
    """
    try:
        values = json.loads(text)
    except ValueError as error:  # no UTF-8, or no JSON
        raise UserError(f"{where} is not valid JSON: {error}") from None
    if not isinstance(values, dict) or "model_type" not in values:
        raise UserError(f"{where} has no model_type; is it the config.json of a model?")
    if values["model_type"] == "qwen2":  # until the families are merged
        return _qwen_v1(
            family="qwen2",
            vocab_size=values["vocab_size"],
            num_layers=values["num_hidden_layers"],
            hidden_size=values["hidden_size"],
            num_heads=values["num_attention_heads"],
            head_dim=values["hidden_size"] // values["num_attention_heads"],
            mlp_width=values["intermediate_size"],
            seq_length=values["max_position_embeddings"],
            dynamic_ntk=False,
            logn_attention=False,
        )
    if values["model_type"] != "qwen":
        raise UserError(
            f"{where}: model_type {values['model_type']!r} is not built yet; "
            f"only 'qwen' (Qwen v1) can be imported"
        )
    if values.get("quantization_config"):
        raise UserError(f"{where}: quantised weights are not supported; import the full ones")
    if values.get("rotary_pct", 1.0) != 1.0 or not values.get("no_bias", True):
        raise UserError(f"{where}: rotary_pct other than 1 and no_bias: false are not supported")
    fields: dict[str, Any] = {}
    for field, keys in _QWEN_V1_KEYS.items():
        found = [values[key] for key in keys if key in values]
        if not found:
            raise UserError(f"{where} lacks {keys[0]}")
        fields[field] = found[0]
    width = values.get("intermediate_size", values.get("ffn_hidden_size"))
    if width is None:
        raise UserError(f"{where} lacks intermediate_size")
    for field, value in {**fields, "mlp_width": width}.items():
        whole = ModelConfig.__annotations__[field] is int
        if not isinstance(value, int if whole else int | float) or value < 0:
            raise UserError(
                f"{where}: {field} is {value!r}, not a {'whole ' if whole else ''}number"
            )
    # The published figure counts both halves of the gated MLP.
    return _qwen_v1(**fields, mlp_width=width // 2)


def to_hf_config(config: ModelConfig) -> dict[str, Any]:
    """The config.json of a published checkpoint of this architecture."""
    if config.family == "qwen2":
        return {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "vocab_size": config.vocab_size,
            "hidden_size": config.hidden_size,
            "num_hidden_layers": config.num_layers,
            "num_attention_heads": config.num_heads,
            "num_key_value_heads": config.num_kv_heads,
            "intermediate_size": config.mlp_width,
            "max_position_embeddings": config.seq_length,
            "rope_theta": config.rope_base,
            "rms_norm_eps": config.norm_eps,
            "tie_word_embeddings": False,
            "initializer_range": config.initializer_range,
        }
    keys = {ours: names[0] for ours, names in _QWEN_V1_KEYS.items()}
    return {
        "architectures": ["QWenLMHeadModel"],
        "model_type": "qwen",
        **{key: getattr(config, ours) for ours, key in keys.items()},
        "intermediate_size": 2 * config.mlp_width,
        "no_bias": True,
        "tie_word_embeddings": False,
    }


def in_family(config: ModelConfig, name: str) -> ModelConfig:
    """The same parameters as a model of another family, for tools that lack their own.

    Raises:
      UserError: the other family cannot express this architecture.
    """
    if name == config.family:
        return config
    if (config.family, name) != ("qwen_v1", "qwen2"):
        raise UserError(f"a model of the family {config.family} cannot be written as {name!r}")
    return dataclasses.replace(config, family=name, dynamic_ntk=False, logn_attention=False)
