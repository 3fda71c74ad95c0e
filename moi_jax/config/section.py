"""What every section of a config is made of: strict and frozen models, and types of values."""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of every section: an unknown key is an error, and values never change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
# Strict: the text "3" and the value true are not numbers.
Positive = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]
FloatType = Literal["float32", "bfloat16", "float64"]
