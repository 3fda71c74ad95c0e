"""What every section of a config is made of: strict and frozen models, and types of values."""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field


class Section(BaseModel):
    """Base of every section: an unknown key is an error, and values never change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
# Strict: the text "3" and the value true are not numbers.
Positive = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]

# What other tools call the dtypes. A config and a command show the full names.
SHORT_DTYPES = {
    "bf16": "bfloat16",
    **dict.fromkeys(("fp32", "f32"), "float32"),
    **dict.fromkeys(("fp64", "f64"), "float64"),
}


def full_dtype(name: Any) -> Any:
    """The full name of a dtype that may be written short; anything else as it is."""
    return SHORT_DTYPES.get(name, name) if isinstance(name, str) else name


FloatType = Annotated[Literal["float32", "bfloat16", "float64"], BeforeValidator(full_dtype)]
AutoFloatType = Annotated[
    Literal["auto", "float32", "bfloat16", "float64"], BeforeValidator(full_dtype)
]


def listed(value: Any) -> Any:
    """A list of one where a text stands alone; anything else as it is."""
    return [value] if isinstance(value, str) else value
