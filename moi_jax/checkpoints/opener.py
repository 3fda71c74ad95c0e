"""Opening a checkpoint for inference: parameters on a mesh, model, tokenizer and prompts."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from moi_jax import config as config_lib
from moi_jax.checkpoints.init_from import chosen_base
from moi_jax.checkpoints.items import (
    ModelItems,
    find_step,
    parameters_fingerprint,
    read_items,
)
from moi_jax.checkpoints.parameters import Bases, read_parameters
from moi_jax.common.errors import UserError
from moi_jax.data.sources.formats import Typing
from moi_jax.models.attention import choose_attention
from moi_jax.models.compute import Compute, resolve_dtype
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind, Decoder, Tree, make_model
from moi_jax.models.decoding import LayerViews, take_layers
from moi_jax.parallel import hosts
from moi_jax.parallel.context import context_shards
from moi_jax.parallel.mesh import make_mesh, parse_mesh
from moi_jax.text.prompts import saved_template
from moi_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class OpenCheckpoint:
    """A model that is ready to generate.

    Attributes:
      step: the directory that was read.
      parameters: as `bind` takes them; layer by layer if they were asked for so.
      tokenizer: with the chat template that the checkpoint was made with, or the one asked for.
      prompts: the checkpoint's prompts item, see text/prompts.py.
      bind: parameters -> model.
      dtype: of the parameters and the computation.
    """

    step: Path
    config: ModelConfig
    parameters: Tree | LayerViews
    tokenizer: Tokenizer
    prompts: dict[str, Any]
    bind: Bind
    mesh: Mesh
    dtype: str

    @property
    def stacked(self) -> Tree:
        """The parameters as `bind` takes them."""
        assert not isinstance(self.parameters, LayerViews)
        return self.parameters

    @property
    def system_prompt(self) -> str | None:
        """The default system prompt that is saved in the checkpoint."""
        return self.prompts["default_system_prompt"]


def open_checkpoint(
    path: Path,
    *,
    devices: Sequence[jax.Device],
    dtype: str = "auto",
    mesh: str | None = None,
    chat_template: str | None = None,
    verify: bool = True,
    base: Path | None = None,
    by_layer: bool = False,
    bases: Bases | None = None,
) -> OpenCheckpoint:
    """Reads a step directory, or the newest step of a run.

    Args:
      devices: the devices of the mesh.
      dtype: auto is float32 on a CPU and bfloat16 elsewhere.
      mesh: devices along the axes, such as "fsdp=2,tensor=4"; an axis that is not named has 1.
        None splits the model over all devices (tensor).
      chat_template: its name or its file; None for the one that the checkpoint was made with.
      verify: compare the files of the parameters with their checksums first.
      base: of a checkpoint of adapters, see `load`.
      by_layer: give the parameters layer by layer. A sampler then uses them as they are, and holds
        no second copy; nothing else can use them.
      bases: see `read_parameters`; not with by_layer, which deletes what it takes apart.

    Raises:
      UserError: there is no checkpoint, it is damaged or not finite, it has no tokenizer, its chat
        template is unknown or has changed since, its base is missing or another one, or the mesh
        does not fit the devices.
    """
    axes = parse_mesh(mesh) if mesh else config_lib.Mesh(data=1, fsdp=1, tensor=-1)
    placed_on = make_mesh(axes, devices)  # refused before the parameters are read
    step = find_step(path)
    hosts.check_same({"checkpoint": parameters_fingerprint(step)})
    items = read_items(step)
    tokenizer = _tokenizer(step, items, chat_template)
    dtype = resolve_dtype(dtype, devices[0].platform)
    bind, stacked = _read_model(step, items, dtype, devices[0], placed_on, verify, base, bases)
    parameters: Tree | LayerViews = stacked
    if by_layer:
        with jax.set_mesh(placed_on):
            parameters = take_layers(items.model, stacked, jnp.dtype(dtype))
    return OpenCheckpoint(
        step=step,
        config=items.model,
        parameters=parameters,
        tokenizer=tokenizer,
        prompts=items.prompts,
        bind=bind,
        mesh=placed_on,
        dtype=dtype,
    )


def open_tokenizer(path: Path, chat_template: str | None = None) -> tuple[Tokenizer, Typing]:
    """The tokenizer of a checkpoint, and what stood apart in the messages of its training.

    Args:
      path, chat_template: see `open_checkpoint`.
    """
    step = find_step(path)
    items = read_items(step)
    tokenizer = _tokenizer(step, items, chat_template)
    template = tokenizer.template
    tools = template.renders_tools and items.prompts.get("tools") != "react"
    return tokenizer, Typing(tools, template.typed)


def _tokenizer(step: Path, items: ModelItems, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a step with the chat template of `open_checkpoint`."""
    template = chat_template or saved_template(items.prompts, step, "--chat-template")
    try:
        return Tokenizer.from_files(items.tokenizer, template)
    except UserError as error:
        raise UserError(f"{step}: {error}") from None


def load(
    path: str | Path,
    dtype: jax.typing.DTypeLike = "float32",
    mesh: Mesh | None = None,
    chat_template: str | None = None,
    verify: bool = True,
    base: str | Path | None = None,
) -> tuple[Decoder, Tokenizer]:
    """A model in inference mode and its tokenizer, from a checkpoint of moi_jax.

        model, tokenizer = moi_jax.load("runs/quickstart")
        logits = model(np.array([tokenizer.encode("Hello")]))  # float32 [1, S, V]

    Args:
      path: a step directory, or a run (its newest step).
      dtype: of the parameters and the computation.
      mesh: where the parameters are laid out; None is one device. Its context axis must be 1.
      chat_template: its name or its file; None for the one that the checkpoint was made with.
      verify: compare the files of the parameters with their checksums first, which reads them once
        more. All other files are always verified.
      base: of a checkpoint of LoRA adapters: the model beside which they were trained, as a
        checkpoint or a run, published weights, or OWNER/NAME of the hub. None for where it was
        then.

    Raises:
      UserError: `path` holds no checkpoint, it is damaged or not finite, its chat template has
        changed since, its base is missing or another one, or the mesh splits rows.
    """
    if (shards := context_shards(mesh)) > 1:
        raise UserError(
            f"load: the mesh has context {shards}, but a model that is called takes whole rows; "
            f"use fsdp or tensor"
        )
    step = find_step(Path(path))
    items = read_items(step)
    if chat_template is None and items.prompts["chat_template"] is not None:
        chat_template = saved_template(items.prompts, path, "chat_template")
    device = jax.devices()[0] if mesh is None else mesh.devices.flat[0]
    bind, parameters = _read_model(
        step, items, dtype, device, mesh, verify, Path(base) if base else None
    )
    return bind(parameters), Tokenizer.from_files(items.tokenizer, chat_template)


def _read_model(
    step: Path,
    items: ModelItems,
    dtype: jax.typing.DTypeLike,
    device: jax.Device,
    mesh: Mesh | None,
    verify: bool,
    named: Path | None,
    bases: Bases | None = None,
) -> tuple[Bind, Tree]:
    """A function parameters -> model for the device, and the parameters on the mesh.

    Args:
      named: the base, see `base` of `load`.
      bases: see `read_parameters`.
    """
    config = items.model
    attention = choose_attention(config_lib.Model(), config, device, mesh, dtype)
    bind = make_model(config, Compute(dtype, attention=attention))
    base = chosen_base(step, items, named)
    return bind, read_parameters(step, config, dtype, mesh, verify, base, bases)
