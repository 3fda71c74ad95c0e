"""TFDS builders of public datasets, found by their short names: gsm8k, math, mbpp, ..."""

import importlib
from pathlib import Path
from typing import Any

NAMES = sorted(path.parent.name for path in Path(__file__).parent.glob("*/*_dataset_builder.py"))


def builder_class(name: str) -> Any:
    """The builder class of one of `NAMES`; it needs tensorflow_datasets, but not TensorFlow."""
    from tensorflow_datasets.core import registered

    # TFDS has a gsm8k too, and refuses a second dataset of the same name.
    with registered.skip_registration():
        module = importlib.import_module(f"{__name__}.{name}.{name}_dataset_builder")
    return module.Builder
