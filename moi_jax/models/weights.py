"""Published tensors and our parameters, one at a time in both directions (Qwen v1)."""

import dataclasses
from collections.abc import Callable, Iterator

import numpy as np

from moi_jax.models import qwen
from moi_jax.models.config import ModelConfig
from moi_jax.models.parameters import declare

_QWEN2 = {
    "transformer.wte.weight": "model.embed_tokens.weight",
    "transformer.h.{}.ln_1.weight": "model.layers.{}.input_layernorm.weight",
    "transformer.h.{}.attn.c_attn.weight": "model.layers.{{}}.self_attn.{}_proj.weight",
    "transformer.h.{}.attn.c_attn.bias": "model.layers.{{}}.self_attn.{}_proj.bias",
    "transformer.h.{}.attn.c_proj.weight": "model.layers.{}.self_attn.o_proj.weight",
    "transformer.h.{}.ln_2.weight": "model.layers.{}.post_attention_layernorm.weight",
    "transformer.h.{}.mlp.w1.weight": "model.layers.{}.mlp.up_proj.weight",
    "transformer.h.{}.mlp.w2.weight": "model.layers.{}.mlp.gate_proj.weight",
    "transformer.h.{}.mlp.c_proj.weight": "model.layers.{}.mlp.down_proj.weight",
    "transformer.ln_f.weight": "model.norm.weight",
    "lm_head.weight": "lm_head.weight",
}


def _table(family: str) -> tuple[qwen.HFTensor, ...]:
    if family == "qwen_v1":
        return qwen.TENSORS
    return tuple(
        dataclasses.replace(t, name=_QWEN2[t.name].format(path[7]), paths=(path,))
        if len(t.paths) > 1
        else dataclasses.replace(t, name=_QWEN2[t.name])
        for t in qwen.TENSORS
        for path in t.paths
    )


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {
        name: qwen._published_shape(tensor, config)
        for tensor in _table(config.family)
        for name, _ in qwen._instances(tensor, config)
    }


def import_parameters(
    config: ModelConfig, read: Callable[[str], np.ndarray], dtype: np.typing.DTypeLike
) -> Iterator[tuple[str, np.ndarray]]:
    for path, parameter in declare(config).items():
        tensor = next(t for t in _table(config.family) if path in t.paths)
        value = np.empty(parameter.shape, dtype)
        for name, layer in qwen._instances(tensor, config):
            rows = np.split(read(name), len(tensor.paths))[tensor.paths.index(path)]
            place = value if layer is None else value[layer]
            place[...] = (rows.T if tensor.inputs else rows).reshape(place.shape)
        yield path, value


def export_tensors(
    config: ModelConfig,
    get: Callable[[str, int | None], np.ndarray],
    as_family: str | None = None,
) -> Iterator[tuple[str, np.ndarray]]:
    for tensor in _table(as_family or config.family):
        for name, layer in qwen._instances(tensor, config):
            parts = []
            for path in tensor.paths:
                value = get(path, layer)
                if tensor.inputs:
                    columns = int(np.prod(value.shape[: tensor.inputs]))
                    value = value.reshape(columns, -1).T
                elif path != "embedding":
                    value = value.reshape(-1)
                parts.append(value)
            yield name, parts[0] if len(parts) == 1 else np.concatenate(parts)
