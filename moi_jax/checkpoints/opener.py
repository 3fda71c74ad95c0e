"""A checkpoint opened to be asked: parameters on a mesh, tokenizer, template and prompts."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from moi_jax.checkpoints.checkpoints import find_step, read_items, read_parameters
from moi_jax.common.errors import UserError
from moi_jax.config import schema as config_lib
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Decoder
from moi_jax.models.parameters import Tree
from moi_jax.parallel.sharding import AXES, make_mesh
from moi_jax.text.prompts import saved_template
from moi_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpenCheckpoint:
    """A model that answers.

    Attributes:
      step: the directory it was read from.
      tokenizer: with the chat template that the checkpoint was made with, or the one asked for.
      prompts: the checkpoint's prompts item, see text/prompts.py.
      dtype: of the parameters and the computation.
    """

    step: Path
    config: ModelConfig
    parameters: Tree
    tokenizer: Tokenizer
    prompts: dict[str, Any]
    make_model: Callable[[Tree], Decoder]
    mesh: Mesh
    dtype: str


def open_checkpoint(
    path: Path, *, dtype: str = "auto", mesh: str | None = None, chat_template: str | None = None
) -> OpenCheckpoint:
    """Reads a step directory, or the newest step of a run.

    Args:
      dtype: auto is float32 on a CPU and bfloat16 elsewhere.
      mesh: devices along the axes, such as "fsdp=2,tensor=4"; an axis not named has 1. None
        splits the model over all devices there are (tensor).
      chat_template: its name; None for the one that the checkpoint was made with.

    Raises:
      UserError: there is no checkpoint or a damaged one, it has no tokenizer, its chat template
        is none of ours or was rendered otherwise, or the mesh does not fit the devices.
    """
    devices = make_mesh(_parse_mesh(mesh))  # before what takes long
    step = find_step(path)
    items = read_items(step)
    template = chat_template or saved_template(items.prompts, step, "--chat-template")
    try:
        tokenizer = Tokenizer.from_files(items.tokenizer, template)
    except UserError as error:
        raise UserError(f"{step}: {error}") from None
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    return OpenCheckpoint(
        step=step,
        config=items.model,
        parameters=read_parameters(step, items.model, dtype, devices),
        tokenizer=tokenizer,
        prompts=items.prompts,
        make_model=partial(Decoder, items.model, compute_dtype=dtype),
        mesh=devices,
        dtype=dtype,
    )


def _parse_mesh(text: str | None) -> config_lib.Mesh:
    """The axes of "fsdp=2,tensor=4"."""
    if text is None:
        return config_lib.Mesh(data=1, fsdp=1, tensor=-1)
    sizes = dict.fromkeys(AXES, 1)
    seen = set()
    for part in text.split(","):
        axis, _, number = (piece.strip() for piece in part.partition("="))
        if axis not in sizes or axis in seen or not number.removeprefix("-").isdecimal():
            raise _no_mesh(text)
        seen.add(axis)
        sizes[axis] = int(number)
    try:
        return config_lib.Mesh(**sizes)
    except ValueError:
        raise _no_mesh(text) from None


def _no_mesh(text: str) -> UserError:
    return UserError(
        f"--mesh {text!r} is no mesh; write the number of devices along {', '.join(AXES)}, each "
        f"once at most, as fsdp=2,tensor=4 (-1, for one of them, is all the rest)"
    )
