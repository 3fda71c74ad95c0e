"""Published folders for the tests: fixtures with a tokenizer, and damaged in every way."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers

from moi_jax.checkpoints.hf.safetensors_reader import TensorFiles
from moi_jax.checkpoints.hf.safetensors_writer import write_tensors
from moi_jax.checkpoints.hf.weights import published_shapes
from moi_jax.models.config import to_hf_config
from moi_jax.models.presets import preset

from support.runs import ENVIRONMENT, ROOT, SAMPLES


def convert(*arguments) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "moi_jax.convert", *map(str, arguments)],
        capture_output=True, text=True, cwd=ROOT, env=ENVIRONMENT, check=False,
    )  # fmt: skip


def add_tokenizer(folder: Path) -> None:
    """A tokenizer of 256 bytes and the three tokens of ChatML."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer.save(str(folder / "tokenizer.json"))


def micro_published(folder: Path, dtype, scale: float = 0.02, **changes) -> Path:
    """The preset micro with random weights, as its publisher would lay it out.

    Args:
      scale: the standard deviation of the weights.
      changes: of the preset, such as num_layers.
    """
    shutil.copytree(SAMPLES / "tokenizer", folder)
    config, rng = dataclasses.replace(preset("micro"), **changes), np.random.default_rng(0)
    (folder / "config.json").write_text(json.dumps(to_hf_config(config)))
    shapes = published_shapes(config)
    tensors = (
        (name, (scale * rng.standard_normal(shape)).astype(dtype)) for name, shape in shapes.items()
    )
    write_tensors(folder, shapes, dtype, tensors, 10**9, lambda _: None)
    return folder


def tensors(folder: Path) -> dict[str, np.ndarray]:
    files = TensorFiles(folder)
    return {name: files.read(name) for name in files.headers}


def same_bits(left: Path, right: Path) -> bool:
    """Whether two folders hold the same tensors, names, dtypes and bits."""
    ours, theirs = tensors(left), tensors(right)
    return ours.keys() == theirs.keys() and all(
        (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
        for a, b in ((ours[name], theirs[name]) for name in ours)
    )


def edit_config(**values):
    def edit(folder):
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), **values}))

    return edit


def edit_index(edit):
    """Damage to the weight map of the index."""

    def damage(folder):
        path = folder / "model.safetensors.index.json"
        index = json.loads(path.read_text())
        edit(index["weight_map"])
        path.write_text(json.dumps(index))

    return damage


def edit_shard(number, edit):
    """Damage to the tensors of a shard of fixture B."""

    def damage(folder):
        path = folder / f"model-0000{number}-of-00003.safetensors"
        held = load_file(path)
        edit(held)
        save_file(held, path, metadata={"format": "pt"})

    return damage


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def remove(name):
    return lambda folder: (folder / name).unlink()
