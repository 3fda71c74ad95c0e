"""The section `lora`: small adapters that are trained beside frozen matrices."""

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator

from moi_jax.config.section import AutoFloatType, Count, Section, listed


class LoRA(Section):
    """Adapters of the matrices of the layers, see docs/lora.md. All other parameters are frozen."""

    rank: Count = 0  # 0: no adapters
    alpha: float = Field(32.0, gt=0)
    scaling: Literal["standard", "rslora"] = "standard"  # alpha / rank; alpha / sqrt(rank)
    # Patterns of the matrices that are adapted; by default all seven of the layers.
    targets: Annotated[tuple[str, ...], BeforeValidator(listed)] = Field(
        ("layers.*.kernel",), min_length=1
    )
    base_dtype: AutoFloatType = "auto"  # of the frozen parameters; auto: model.compute_dtype

    @model_validator(mode="after")
    def check(self) -> "LoRA":
        if not self.rank and self != type(self).model_construct():
            raise ValueError(
                "has no effect without a rank; set lora.rank, or leave the section out"
            )
        return self
