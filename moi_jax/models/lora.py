"""From the section `lora` of a config to the architecture with its adapters."""

import math

from moi_jax import config as config_lib
from moi_jax.common.errors import UserError
from moi_jax.models.adapter import Adapter
from moi_jax.models.config import ModelConfig
from moi_jax.models.parameters import parameter_specs
from moi_jax.models.patterns import LAYERS, matching
from moi_jax.models.quantized import BLOCK

KERNEL = ".kernel"


def adapted(model: ModelConfig, section: config_lib.LoRA) -> ModelConfig:
    """Returns the model with the adapters of the section; itself where the rank is 0.

    Raises:
      UserError: a target names no matrix of the layers, or something else too; the rank is over
        the smaller side of a matrix; or the blocks of nf4 do not divide a matrix.
    """
    if not section.rank:
        return model
    targets = sorted({t for pattern in section.targets for t in _targets(model, pattern)})
    if section.quantization == "nf4":
        _check_blocks(model)
    return model.with_adapter(
        Adapter(
            rank=check_rank(model, targets, section.rank, "lora.rank"),
            alpha=section.alpha,
            scaling=section.scaling,
            targets=tuple(targets),
            quantization=section.quantization,
        )
    )


def check_rank(model: ModelConfig, targets: list[str], rank: int, name: str) -> int:
    """Returns the rank if every target has that many inputs and outputs; else raises UserError.

    Args:
      name: of what gives the rank, for the message.
    """
    for target in targets:
        spec = parameter_specs(model.base)[target + KERNEL]
        shape = spec.shape[1:]  # of one layer
        inputs, outputs = math.prod(shape[: spec.contracted]), math.prod(shape[spec.contracted :])
        if rank > min(inputs, outputs):
            raise UserError(
                f"{name} {rank} is over the smaller side of {target} ({inputs} x {outputs}); "
                f"choose at most {min(inputs, outputs)}"
            )
    return rank


def _check_blocks(model: ModelConfig) -> None:
    """Raises UserError where 64 does not divide the inputs of a matrix of the layers."""
    for path, spec in parameter_specs(model.base).items():
        inputs = math.prod(spec.shape[1 : 1 + spec.contracted])
        if path.startswith("layers.") and spec.contracted and inputs % BLOCK:
            raise UserError(
                f"lora.base_dtype nf4 has blocks of {BLOCK} inputs, which do not divide the "
                f"{inputs} of {path}; use int8"
            )


def _targets(model: ModelConfig, pattern: str) -> list[str]:
    """Returns the modules whose matrices a pattern names; their biases come along."""
    specs = parameter_specs(model.base)
    if LAYERS.match(pattern):
        raise UserError(
            f"lora.targets: {pattern!r} names single layers, but adapters are in all of them; "
            f"leave the numbers out, and freeze the adapters of a layer with optimizer.frozen"
        )
    found = matching(specs, pattern)
    if not found:
        raise UserError(
            f"lora.targets: no parameter of the model matches {pattern!r}; --print-sharding with "
            f"lora.targets='layers.*.kernel' lists them"
        )
    for path in found:
        module = path.rpartition(".")[0]
        inside = path.startswith("layers.") and f"{module}{KERNEL}" in specs
        if not inside:
            raise UserError(
                f"lora.targets: {pattern!r} names {path}, but adapters go with the matrices of the "
                f"layers, such as layers.attention.*{KERNEL} or layers.mlp.up"
            )
    targets = [path.removesuffix(KERNEL) for path in found if path.endswith(KERNEL)]
    if not targets:
        raise UserError(f"lora.targets: {pattern!r} names no matrix, only {', '.join(found)}")
    return targets
