"""What every section of a config is made of: strict and frozen models, and types of values."""

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

from moi_jax.common.errors import UserError
from moi_jax.common.locations import SCHEMES, is_url, location_text, url_parts


class Section(BaseModel):
    """Base of every section: an unknown key is an error, and values never change once read."""

    model_config = ConfigDict(extra="forbid", frozen=True)


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$")]
# Strict: the text "3" and the value true are not numbers.
Positive = Annotated[int, Field(gt=0, strict=True)]
Count = Annotated[int, Field(ge=0, strict=True)]


def _check_location(place: Path) -> Path:
    """Refuses a URL that is none of ours; pydantic shows the text of a ValueError."""
    first = place.parts[0] if place.parts else ""
    if is_url(place):
        try:
            url_parts(place)
        except UserError as error:
            raise ValueError(str(error)) from None
    elif re.fullmatch(r"[a-z][a-z0-9]+:", first):
        stores = " and ".join(f"{scheme}://" for scheme in SCHEMES)
        raise ValueError(f"{first}// is no store that is supported; these are: {stores}")
    return place


# A local path, or a URL of an object store: see `locations`.
Location = Annotated[
    Path, AfterValidator(_check_location), PlainSerializer(location_text, when_used="json")
]

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
