"""The differences between the families' published checkpoints: keys of config.json, tensors."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One published tensor; `{}` in its name stands for the number of the layer.

    Its rows are those of our `paths`, one block after the other (Qwen v1's c_attn holds q, k and
    v). A matrix is published as [out, in]: `inputs` is the number of our leading axes that
    are its columns.
    """

    name: str
    paths: tuple[str, ...]
    inputs: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The differences of one family; everything else is shared."""

    name: str
    model_type: str  # in config.json
    architecture: str  # class name in transformers, or in the family's own code
    # Field of ModelConfig -> the keys of config.json that may hold it. We write the first one.
    keys: dict[str, tuple[str, ...]]
    fixed: dict[str, Any]  # fields of ModelConfig that no config.json of the family contains
    defaults: dict[str, Any]  # key of config.json -> what it means if it is missing
    supported: dict[str, Any]  # key -> the only value of it that we support
    written: dict[str, Any]  # keys of config.json that are always the same
    # A tensor is not published if the architecture has none of its paths (a bias, a tied head).
    tensors: tuple[HFTensor, ...]
    # Tensors in old files that only repeat what the config says.
    redundant: tuple[str, ...] = ()
    scales_rope: bool = True  # its keys are rope_theta, rope_scaling or rope_parameters
    rope_types: tuple[str, ...] = ("default", "llama3")  # scalings of the rotary frequencies
    skips_rope: bool = False  # no_rope_layers says which layers rotate their queries and keys
    switches_windows: bool = True  # sliding_window counts only where use_sliding_window is true
    default_window: int | None = None  # sliding_window of a file that lacks the key
    # Key of config.json that we write -> the key whose value it repeats.
    repeated: dict[str, str] = dataclasses.field(default_factory=dict)
    derives_head_dim: bool = True  # a missing head_dim means hidden_size / heads
    mlp_matrices: int = 1  # number of matrices of width F that the published MLP width counts
