"""The modules of a published model that carry PEFT's adapters, and the parts that they hold.

PEFT keeps A as lora_A.weight [r, inputs] and B as lora_B.weight [outputs, r] for each module of
each layer. A fused module, such as Qwen v1's c_attn, holds the outputs of several of our matrices.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

from moi_jax.models.config import ModelConfig
from moi_jax.models.families import FAMILIES
from moi_jax.models.parameters import Parameter, parameter_specs

CONFIG, STEM = "adapter_config.json", "adapter_model"
PREFIX, WEIGHT, KERNEL = "base_model.model.", ".weight", ".kernel"


@dataclass(frozen=True)
class Part:
    """One of our matrices within a module.

    Attributes:
      path: our dotted path of the module that has the matrix, such as layers.attention.query.
      spec: of its kernel [L, inputs, outputs].
      rows: the outputs of the published module that are its own.
    """

    path: str
    spec: Parameter
    rows: slice

    @property
    def inputs(self) -> tuple[int, ...]:
        return self.spec.shape[1 : 1 + self.spec.contracted]

    @property
    def outputs(self) -> tuple[int, ...]:
        return self.spec.shape[1 + self.spec.contracted :]


@dataclass(frozen=True)
class PublishedModule:
    """A published matrix of every layer; `{}` in its name stands for the number of the layer."""

    name: str
    parts: tuple[Part, ...]

    @property
    def in_layer(self) -> str:
        """The name within a layer, by which PEFT's target_modules find it."""
        return self.name.split("{}.")[1]

    @property
    def inputs(self) -> int:
        return math.prod(self.parts[0].inputs)

    @property
    def outputs(self) -> int:
        return self.parts[-1].rows.stop

    def tensor(self, layer: int, which: str) -> str:
        """The name of A ("A") or B ("B") of a layer in PEFT's file."""
        return f"{PREFIX}{self.name.format(layer)}.lora_{which}{WEIGHT}"


def published_modules(config: ModelConfig) -> Iterator[PublishedModule]:
    """Yields the modules of a model whose matrices can be adapted."""
    specs = parameter_specs(config.base)
    for tensor in FAMILIES[config.family].tensors:
        if not (tensor.inputs and "{}" in tensor.name):
            continue
        parts, start = [], 0
        for kernel in tensor.paths:
            spec = specs[kernel]
            end = start + math.prod(spec.shape[1 + spec.contracted :])
            parts.append(Part(kernel.removesuffix(KERNEL), spec, slice(start, end)))
            start = end
        yield PublishedModule(tensor.name.removesuffix(WEIGHT), tuple(parts))
