"""The section `lora`: small adapters that are trained beside frozen matrices."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from moi_jax.config.section import Count, Section, full_dtype, listed

BaseType = Annotated[
    Literal["auto", "float32", "bfloat16", "float64", "int8", "nf4"], BeforeValidator(full_dtype)
]


class LoRA(Section):
    """Adapters of the matrices of the layers, see docs/lora.md. All other parameters are frozen."""

    rank: Count = 0  # 0: no adapters
    alpha: float = Field(32.0, gt=0)
    scaling: Literal["standard", "rslora"] = "standard"  # alpha / rank; alpha / sqrt(rank)
    # Patterns of the matrices that are adapted; by default all seven of the layers.
    targets: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        ("layers.*.kernel",), min_length=1
    )
    # Of the frozen parameters; auto: model.compute_dtype. int8 and nf4 quantise the matrices of the
    # layers; the other frozen parameters then have model.compute_dtype.
    base_dtype: BaseType = "auto"

    @property
    def quantization(self) -> Literal["int8", "nf4"] | None:
        """The scheme of the matrices of the layers; None where they are plain numbers."""
        return self.base_dtype if self.base_dtype in ("int8", "nf4") else None

    @model_validator(mode="after")
    def check(self) -> "LoRA":
        if not self.rank and self != type(self).model_construct():
            raise ValueError(
                "has no effect without a rank; set lora.rank, or leave the section out"
            )
        return self
