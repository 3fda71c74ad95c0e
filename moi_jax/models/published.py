"""Reading a published checkpoint: a directory of config.json and safetensors shards."""

import json
from pathlib import Path

import numpy as np
import safetensors

from moi_jax.errors import UserError
from moi_jax.models.config import ModelConfig, read_hf_config
from moi_jax.models.parameters import Tree, map_parameters
from moi_jax.models.weights import import_parameters, published_shapes


def read_published(directory: Path, dtype: np.typing.DTypeLike | None) -> tuple[ModelConfig, Tree]:
    """Architecture and parameters (numpy) of a published checkpoint.

    Args:
      dtype: of the parameters; None keeps the published one.

    Raises:
      UserError: naming the file, when one is missing or damaged, or when the tensors are not
        exactly those of the architecture in config.json.
    """
    config_path = directory / "config.json"
    if not config_path.is_file():
        raise UserError(f"{config_path} does not exist; name a directory with config.json")
    config = read_hf_config(config_path.read_bytes(), str(config_path))
    shards = _shards(directory)
    expected = published_shapes(config)
    _check_names(directory, set(shards), set(expected))
    _check_shapes(shards, expected)

    def read(name: str) -> np.ndarray:
        with safetensors.safe_open(shards[name], framework="numpy") as shard:
            return shard.get_tensor(name)

    flat = dict(import_parameters(config, read, dtype or read(next(iter(expected))).dtype))
    return config, map_parameters(config, lambda path, _: flat[path])


def _shards(directory: Path) -> dict[str, Path]:
    """Tensor name -> the file that holds it, each file opened once to see that it is whole."""
    files = sorted(directory.glob("*.safetensors"))
    index_path = directory / "model.safetensors.index.json"
    if index_path.is_file():
        try:
            weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
            files = sorted({directory / name for name in weight_map.values()})
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{index_path} is damaged ({error!r}); copy it again") from None
    if not files:
        pickles = [*directory.glob("*.bin"), *directory.glob("*.pt")]
        reason = "pickled weights can run code and are not read" if pickles else "none found"
        raise UserError(f"{directory} has no *.safetensors files ({reason})")
    shards: dict[str, Path] = {}
    for path in files:
        if not path.is_file():
            raise UserError(f"{path} is named by {index_path.name} but missing; copy it here")
        try:
            with safetensors.safe_open(path, framework="numpy") as shard:
                shards.update(dict.fromkeys(shard.keys(), path))
        except (safetensors.SafetensorError, OSError) as error:
            raise UserError(f"{path} is damaged or cut short ({error}); copy it again") from None
    return shards


def _check_names(directory: Path, found: set[str], expected: set[str]) -> None:
    for what, names in (("lacks", expected - found), ("has unexpected", found - expected)):
        if names:
            first = ", ".join(sorted(names)[:3])
            raise UserError(f"{directory} {what} {len(names)} tensors by its config: {first}...")


def _check_shapes(shards: dict[str, Path], expected: dict[str, tuple[int, ...]]) -> None:
    for path in sorted(set(shards.values())):
        with safetensors.safe_open(path, framework="numpy") as shard:
            for name in list(shard.keys()):
                shape = tuple(shard.get_slice(name).get_shape())
                if shape != expected[name]:
                    raise UserError(
                        f"{path}: {name} has shape {shape}, config.json says {expected[name]}"
                    )
