"""Reading a GGUF file: architecture, tokenizer, and dequantised tensors by published names."""

import json
import math
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax.checkpoints.hf.safetensors_reader import Header
from moi_jax.common.errors import UserError
from moi_jax.text.byte_level import SPLITS, tokenizer_json

Json = dict[str, Any]

# GGUF's name -> the published name; in a layer they follow blk.<i>. and model.layers.<i>.
_TENSORS = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER_TENSORS = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
# Llama 3's scaling of RoPE as a factor for each frequency; the file tells nothing else about it.
_ROPE_FACTORS = "rope_freqs.weight"

_CLASSES = {
    "llama": "LlamaForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
}  # fmt: skip
# config.json's key -> what follows the architecture's name in the metadata.
_SIZES = {
    "hidden_size": "embedding_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "intermediate_size": "feed_forward_length",
    "max_position_embeddings": "context_length",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
}
_NOT_BUILT = {"expert_count": "a mixture of experts", "attention.sliding_window": "sliding window"}

# tokenizer.ggml.token_type
_CONTROL, _USER_DEFINED, _UNUSED = 3, 4, 5


def open_gguf(path: Path) -> "GgufCheckpoint":
    """Opens a GGUF file of the architectures llama, qwen2 and qwen3; tensors are read when needed.

    Raises:
      UserError: the package gguf is missing; the file is missing, damaged or cut short; or it has
        an architecture or a setting that is not supported.
    """
    try:
        from gguf import GGUFReader
    except ImportError:
        raise UserError(f"{path} needs the package gguf: pip install 'moi_jax[gguf]'") from None
    if not path.is_file():
        raise UserError(f"{path} does not exist; give a .gguf file")
    try:
        reader = GGUFReader(path)
        metadata = {key: _value(field) for key, field in reader.fields.items()}
    # The reader raises these where a file is no GGUF or ends too early.
    except (IndexError, KeyError, OSError, UnicodeDecodeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{path} is no GGUF file, or it is damaged or cut short ({reason})"
        ) from None
    return GgufCheckpoint(path, metadata, {tensor.name: tensor for tensor in reader.tensors})


def _value(field: Any) -> Any:
    """The value of a metadata field; a float32 as the shortest decimal that gives it."""
    value = field.contents()
    single = field.types and field.types[-1].name == "FLOAT32" and isinstance(value, float)
    return float(str(np.float32(value))) if single else value


class GgufCheckpoint:
    """A GGUF file, read as if it were a published checkpoint of the same model.

    Attributes:
      config_json: the values of config.json.
      names: the published names of the tensors.
      headers: name -> file, dtype and shape, as in `safetensors_reader.TensorFiles`.
    """

    def __init__(self, path: Path, metadata: Json, tensors: Mapping[str, Any]):
        self._path, self._metadata = path, metadata
        self._architecture = metadata.get("general.architecture")
        if self._architecture not in _CLASSES:
            raise UserError(
                f"{path} has the architecture {self._architecture}, which is not built; only "
                f"{', '.join(_CLASSES)} can be imported from GGUF"
            )
        for key, what in _NOT_BUILT.items():
            if self._setting(key, 0):
                raise UserError(f"{path} has {what} ({key}), which is not built")
        self._rope_factors = tensors.get(_ROPE_FACTORS)
        self._tensors = {
            self._published(name): tensor for name, tensor in tensors.items()
            if name != _ROPE_FACTORS
        }  # fmt: skip
        self.names = set(self._tensors)
        self.headers = {
            # GGUF counts dimensions from the innermost one.
            name: Header(path, np.dtype(np.float32), tuple(map(int, tensor.shape[::-1])))
            for name, tensor in self._tensors.items()
        }
        self.config_json = self._config()

    def read(self, name: str) -> np.ndarray:
        """The tensor with a published name, float32 in the published layout.

        Raises:
          UserError: the package gguf cannot dequantise it.
        """
        from gguf import dequantize

        tensor = self._tensors[name]
        try:
            values = dequantize(tensor.data, tensor.tensor_type)
            values = values.reshape(self.headers[name].shape)
        except NotImplementedError:
            raise UserError(
                f"{self._path}: {name} is quantised as {tensor.tensor_type.name}, which the "
                f"package gguf cannot undo; use a file of another quantisation"
            ) from None
        values = values.astype(np.float32, copy=False)
        heads = {
            "q_proj": self.config_json["num_attention_heads"],
            "k_proj": self.config_json["num_key_value_heads"],
        }
        projection = name.split(".")[-2]
        if self._architecture == "llama" and projection in heads:
            return _half_split(values, heads[projection])
        return values

    def rounded(self, name: str, values: np.ndarray) -> np.ndarray:
        """Values of a published tensor, float32, as the file would hold them.

        They stay as they are where the package gguf has no quantiser of the file's type.
        """
        from gguf import dequantize, quantize

        kind = self._tensors[name].tensor_type
        values = values.astype(np.float32)
        try:
            with np.errstate(over="ignore"):
                return dequantize(quantize(values, kind), kind).reshape(values.shape)
        except NotImplementedError:
            return values

    @cached_property
    def tokenizer_files(self) -> dict[str, str]:
        """tokenizer.json, and tokenizer_config.json with the chat template.

        Raises:
          UserError: the file has no byte-level BPE tokenizer, or one with an unknown split.
        """
        kind, split = (self._metadata.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
        if kind != "gpt2" or split not in SPLITS:
            raise UserError(
                f"{self._path} has a tokenizer of kind {kind} with the split {split}, which is "
                f"not built (byte-level BPE with {', '.join(SPLITS)} is); name a directory that "
                f"holds the model's tokenizer"
            )
        settings = self._tokenizer_settings()
        bos = settings.get("bos_token") if settings["add_bos_token"] else None
        tokens = self._tokens("tokens")
        types = self._metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
        numbered = [(t, n, kind) for n, (t, kind) in enumerate(zip(tokens, types, strict=True))]
        # Unused tokens only fill up the embedding; they are never generated.
        vocabulary = {token: number for token, number, kind in numbered if kind != _UNUSED}
        added = {
            token: (number, kind == _CONTROL)
            for token, number, kind in numbered
            if kind in (_CONTROL, _USER_DEFINED)
        }
        merges = [(left, right) for left, right in map(str.split, self._tokens("merges"))]
        return {
            "tokenizer.json": tokenizer_json(vocabulary, merges, SPLITS[split], added, bos),
            "tokenizer_config.json": json.dumps(settings, indent=2, ensure_ascii=False) + "\n",
        }

    def _tokenizer_settings(self) -> Json:
        """The values of tokenizer_config.json."""
        tokens, get = self._tokens("tokens"), self._metadata.get
        # If the file does not say, Llama 3's tokenizer begins every text with bos.
        add_bos = get("tokenizer.ggml.add_bos_token", get("tokenizer.ggml.pre") == "llama-bpe")
        settings = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "add_bos_token": bool(add_bos),
            "model_max_length": self.config_json["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
        }
        for name, key in (("bos", "bos"), ("eos", "eos"), ("pad", "padding"), ("unk", "unknown")):
            number = get(f"tokenizer.ggml.{key}_token_id")
            if number is not None:
                settings[f"{name}_token"] = tokens[number]
        if template := get("tokenizer.chat_template"):
            settings["chat_template"] = template
        return settings

    def _tokens(self, key: str) -> list[str]:
        if not (found := self._metadata.get(f"tokenizer.ggml.{key}")):
            raise UserError(f"{self._path} lacks the tokenizer's {key} (tokenizer.ggml.{key})")
        return found

    def _config(self) -> Json:
        values: Json = {"model_type": self._architecture}
        values["architectures"] = [_CLASSES[values["model_type"]]]
        for key, name in _SIZES.items():
            values[key] = self._setting(name)
        heads = values["num_attention_heads"]
        embedding = self._tensors.get("model.embed_tokens.weight")
        if embedding is None:
            raise UserError(f"{self._path} lacks the embedding (token_embd.weight)")
        head_dim = self._setting("attention.key_length", values["hidden_size"] // heads)
        if self._setting("rope.dimension_count", head_dim) != head_dim:
            raise UserError(f"{self._path} rotates a part of each head, which is not built")
        bias = "model.layers.0.self_attn.q_proj.bias" in self.names
        values |= {
            "num_key_value_heads": self._setting("attention.head_count_kv", heads),
            "head_dim": head_dim,
            "vocab_size": int(embedding.shape[1]),  # also the rows that have no token
            "rope_theta": self._setting("rope.freq_base", 10000.0),
            "tie_word_embeddings": "lm_head.weight" not in self.names,
            "hidden_act": "silu",
            "initializer_range": 0.02,
            "torch_dtype": "float32",
        }
        values["rope_scaling"] = self._rope_scaling(values)
        if self._architecture != "qwen2":
            values["attention_bias"] = bias
        if self._architecture == "llama":
            values["mlp_bias"] = False
        else:
            values["use_sliding_window"] = False
        for key in ("bos", "eos"):
            values[f"{key}_token_id"] = self._metadata.get(f"tokenizer.ggml.{key}_token_id")
        return values

    def _rope_scaling(self, values: Json) -> Json | None:
        """The value of rope_scaling in config.json.

        Raises:
          UserError: the file has factors that no supported setting gives.
        """
        kind = self._setting("rope.scaling.type", "none")
        if kind != "none":
            return {"rope_type": kind, "factor": self._setting("rope.scaling.factor", 1.0)}
        if self._rope_factors is None:
            return None
        factors = np.asarray(self._rope_factors.data, np.float32)
        scaling = {
            "rope_type": "llama3", "factor": round(float(factors.max()), 3), "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        }  # fmt: skip
        expected = llama3_factors(values["rope_theta"], values["head_dim"], scaling)
        if factors.shape != expected.shape or not np.allclose(factors, expected, rtol=1e-4):
            raise UserError(
                f"{self._path} scales RoPE in a way that is not built ({_ROPE_FACTORS})"
            )
        return scaling

    def _setting(self, name: str, default: Any = None) -> Any:
        key = f"{self._architecture}.{name}"
        value = self._metadata.get(key, default)
        if value is None:
            raise UserError(f"{self._path} lacks {key}")
        return value

    def _published(self, name: str) -> str:
        stem, _, kind = name.rpartition(".")
        if stem in _TENSORS:
            return f"{_TENSORS[stem]}.{kind}"
        block, _, part = stem.removeprefix("blk.").partition(".")
        if block.isdigit() and part in _LAYER_TENSORS:
            return f"model.layers.{block}.{_LAYER_TENSORS[part]}.{kind}"
        raise UserError(
            f"{self._path} has the tensor {name}, which no model of the architecture "
            f"{self._architecture} built here has"
        )


def _half_split(values: np.ndarray, heads: int) -> np.ndarray:
    """Reorders the rows (or the bias) of q or k for RoPE that rotates halves, not neighbours.

    llama.cpp stores Llama's rows of each head in the order 0, N/2, 1, N/2 + 1, ... Published
    checkpoints, and the Qwen family in GGUF too, have the order 0, 1, 2, ...
    """
    pairs = values.reshape(heads, -1, 2, *values.shape[1:])
    return pairs.swapaxes(1, 2).reshape(values.shape)


def llama3_factors(base: float, head_dim: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """float32[N/2]: the divisors of RoPE's frequencies in Llama 3's scaling."""
    length, factor = scaling["original_max_position_embeddings"], scaling["factor"]
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    wavelengths = 2 * math.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    # 1: the frequency stays. 0: it is divided by the whole factor.
    kept = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    return (1 / (kept + (1 - kept) / factor)).astype(np.float32)
