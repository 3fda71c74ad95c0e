"""What sets a family's published checkpoints apart: the keys of config.json, the tensors."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class HFTensor:
    """One published tensor; `{}` in its name is the layer's number.

    Its rows are split over our `paths` in order (Qwen v1's c_attn holds q, k, v as whole
    blocks). A matrix is published as [out, in]: `inputs` counts our leading axes that are its
    columns.
    """

    name: str
    paths: tuple[str, ...]
    inputs: int = 0


@dataclasses.dataclass(frozen=True, kw_only=True)
class Family:
    """The differences of one family; everything else is shared."""

    name: str
    model_type: str  # in config.json
    architecture: str  # of transformers, or of the family's own code
    # Field of ModelConfig: the keys of config.json that may hold it, the one we write first.
    keys: dict[str, tuple[str, ...]]
    fixed: dict[str, Any]  # fields of ModelConfig that no config.json of the family tells
    defaults: dict[str, Any]  # what a key means that is missing
    supported: dict[str, Any]  # keys for which we build one value alone
    written: dict[str, Any]  # keys of its config.json that are always the same
    # A tensor none of whose paths the architecture has (a bias, a tied head) is not published.
    tensors: tuple[HFTensor, ...]
    # Tensors that old files hold besides, and that say nothing the config does not.
    redundant: tuple[str, ...] = ()
    scales_rope: bool = True  # rope_theta, rope_scaling or rope_parameters are its keys
    derives_head_dim: bool = True  # a missing head_dim is hidden_size / heads
    mlp_matrices: int = 1  # of width F that the published MLP width counts
