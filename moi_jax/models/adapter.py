"""What sets a model with LoRA adapters apart (Hu et al. 2021, arXiv 2106.09685)."""

import dataclasses
import math
from typing import Any

from moi_jax.models.quantized import Scheme


@dataclasses.dataclass(frozen=True, kw_only=True)
class Adapter:
    """The adapters of a model: x W becomes x W + scale (x A) B, and only A and B are trained.

    Attributes:
      rank: the width r between A [inputs, r] and B [r, outputs].
      scaling: standard is alpha / r; rslora is alpha / sqrt(r) (Kalajdzievski 2023, arXiv
        2312.03732).
      targets: the dotted paths of the adapted modules, such as layers.attention.query, sorted.
      quantization: of all matrices of the layers, the targets or not (Dettmers et al. 2023, QLoRA,
        arXiv 2305.14314); None where they are plain numbers.
    """

    rank: int
    alpha: float
    scaling: str
    targets: tuple[str, ...]
    quantization: Scheme | None = None

    @property
    def scale(self) -> float:
        return self.alpha / (math.sqrt(self.rank) if self.scaling == "rslora" else self.rank)

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "Adapter":
        """Makes it from its fields as JSON values."""
        return cls(**{**values, "targets": tuple(values["targets"])})
