"""The Hugging Face names of Qwen v1's tensors, and how each becomes parameters of ours."""

import dataclasses
import math
from collections.abc import Callable, Iterator

import numpy as np

from moi_jax.models.config import ModelConfig
from moi_jax.models.parameters import Tree, declare, map_parameters


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One published tensor; `{}` in its name is the layer's number.

    Its rows are split over our `paths` in order (c_attn holds q, k, v as whole blocks). A
    matrix is published as [out, in]: `inputs` counts our leading axes that are its columns.
    """

    name: str
    paths: tuple[str, ...]
    inputs: int = 0


TENSORS = (
    HFTensor("transformer.wte.weight", ("embedding",)),
    HFTensor("transformer.h.{}.ln_1.weight", ("layers.attention_norm",)),
    HFTensor(
        "transformer.h.{}.attn.c_attn.weight",
        ("layers.query", "layers.key", "layers.value"),
        inputs=1,
    ),
    HFTensor(
        "transformer.h.{}.attn.c_attn.bias",
        ("layers.query_bias", "layers.key_bias", "layers.value_bias"),
    ),
    HFTensor("transformer.h.{}.attn.c_proj.weight", ("layers.out",), inputs=2),
    HFTensor("transformer.h.{}.ln_2.weight", ("layers.mlp_norm",)),
    HFTensor("transformer.h.{}.mlp.w1.weight", ("layers.up",), inputs=1),
    HFTensor("transformer.h.{}.mlp.w2.weight", ("layers.gate",), inputs=1),
    HFTensor("transformer.h.{}.mlp.c_proj.weight", ("layers.down",), inputs=1),
    HFTensor("transformer.ln_f.weight", ("final_norm",)),
    HFTensor("lm_head.weight", ("head",), inputs=1),
)


def published_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor a checkpoint of this architecture holds, with its published shape."""
    return {
        name: _published_shape(tensor, config)
        for tensor in TENSORS
        for name, _ in _instances(tensor, config)
    }


def import_tensors(
    config: ModelConfig, read: Callable[[str], np.ndarray], dtype: np.typing.DTypeLike
) -> Tree:
    """The parameter tree of ours; `read(name)` gives a published tensor by its name.

    One tensor is read at a time, straight into its place among the stacked layers.
    """
    flat = {path: np.empty(p.shape, dtype) for path, p in declare(config).items()}
    for tensor in TENSORS:
        for name, layer in _instances(tensor, config):
            blocks = np.split(read(name), len(tensor.paths))
            for path, block in zip(tensor.paths, blocks, strict=True):
                place = flat[path] if layer is None else flat[path][layer]
                place[...] = (block.T if tensor.inputs else block).reshape(place.shape)
    return map_parameters(config, lambda path, _: flat[path])


def _instances(tensor: HFTensor, config: ModelConfig) -> Iterator[tuple[str, int | None]]:
    if "{}" not in tensor.name:
        yield tensor.name, None
        return
    for layer in range(config.num_layers):
        yield tensor.name.format(layer), layer


def _published_shape(tensor: HFTensor, config: ModelConfig) -> tuple[int, ...]:
    shape = declare(config)[tensor.paths[0]].shape
    if "{}" in tensor.name:
        shape = shape[1:]
    if tensor.paths == ("embedding",):
        return shape
    outputs = len(tensor.paths) * math.prod(shape[tensor.inputs :])
    columns = shape[: tensor.inputs]
    return (outputs, math.prod(columns)) if columns else (outputs,)
