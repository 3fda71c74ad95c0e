"""Importing a published checkpoint: its weights, tokenizer, template and licence as one of ours."""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax.checkpoints.finite import count_not_finite
from moi_jax.checkpoints.hf.model_card import model_card
from moi_jax.checkpoints.hf.provenance import read_provenance
from moi_jax.checkpoints.hf.reader import PublishedCheckpoint, PublishedModel, open_published
from moi_jax.checkpoints.hf.source import PublishedSource, find_source
from moi_jax.checkpoints.hf.weights import import_parameters
from moi_jax.checkpoints.items import ModelItems
from moi_jax.checkpoints.parameters import save_model
from moi_jax.common.atomic_files import atomic_directory, check_new, write_texts
from moi_jax.common.errors import UserError
from moi_jax.common.progress import byte_bar
from moi_jax.text.jinja.tool_formats import describe_template
from moi_jax.text.prompts import prompts_metadata
from moi_jax.text.template_choice import default_system_prompt, has_own_template
from moi_jax.text.tokenizer import Tokenizer, check_whole, load_tokenizer

MOST_WARNINGS = 5

log = logging.getLogger(__name__)


def import_checkpoint(
    source: Path, out: Path, tokenizer: Path | None = None, dtype: str | None = None
) -> None:
    """Writes the published checkpoint `source` as one of ours at `out`, a tensor at a time.

        import_checkpoint(Path("Qwen-7B-Chat"), Path("checkpoints/qwen-7b-chat"))

    Args:
      source: a directory with config.json, safetensors and a tokenizer, a .gguf file, or the id of
        a Hugging Face repository (OWNER/NAME or OWNER/NAME@REVISION).
      tokenizer: a directory with tokenizer files, if they are not in `source`.
      dtype: of the stored parameters, float32 or bfloat16; None keeps the published one.

    Raises:
      UserError: a file is missing or damaged, or `out` exists or cannot be written. Nothing is
        left behind.
    """
    check_new(out)
    found = find_source(source)
    found.fetch_weights()
    published = open_published(found.path)
    write_checkpoint(published, published_items(found, published, tokenizer), out, dtype)


def published_items(
    source: PublishedSource, published: PublishedModel, tokenizer: Path | None = None
) -> ModelItems:
    """Everything but the parameters of the checkpoint that is made from `source`.

    Args:
      published: `source`, opened with its weights or without them.
      tokenizer: a directory with tokenizer files, if they are not in `source`.

    Raises:
      UserError: there is no tokenizer, or it does not fit the embedding.
    """
    model = published.config
    files = _tokenizer(source, published, tokenizer)
    check_whole(files, model.vocab_size, tokenizer or source.path)
    if files.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {files.vocab_size} ids, the embedding in {source.path} only "
            f"{model.vocab_size} rows; is it the tokenizer of this model?"
        )
    prompts = _prompts(files, model.default_system_prompt)
    return ModelItems(model, files.files, prompts, read_provenance(source, published.token_ids))


def _prompts(tokenizer: Tokenizer, otherwise: str | None) -> dict[str, Any]:
    """The prompts of a tokenizer with its own chat template.

    Args:
      otherwise: the default system prompt where there is no such template.
    """
    try:
        template = tokenizer.template
        default = default_system_prompt(tokenizer) if has_own_template(tokenizer) else otherwise
    except UserError as error:
        log.warning(f"{error}")
        return prompts_metadata(otherwise, None)
    log.info(f"chat template: {describe_template(template)}")
    return prompts_metadata(default, template)


def _tokenizer(source: PublishedSource, published: PublishedModel, named: Path | None) -> Tokenizer:
    """The tokenizer in the directory `named` or, without one, that of the published model."""
    if named:
        return load_tokenizer(named)
    if published.tokenizer_files:
        return Tokenizer.from_files(published.tokenizer_files)
    try:
        return load_tokenizer(source.path)
    except UserError as error:
        raise UserError(
            f"{error}; name a directory with the tokenizer of this model: tokenizer.path in a "
            f"config, --tokenizer of convert import"
        ) from None


def write_checkpoint(
    published: PublishedCheckpoint, items: ModelItems, out: Path, dtype: str | None = None
) -> None:
    """Writes published weights, a tensor at a time, and their items as a checkpoint of ours.

    Raises:
      UserError: a file is damaged, or `out` exists or cannot be written. Nothing is left behind.
    """
    model, wanted = items.model, np.dtype(dtype or published.common_dtype)
    with atomic_directory(out) as staging, _reading(published) as read:
        save_model(staging, import_parameters(model, read, wanted), wanted, items)
        (staging / "README.md").write_text(model_card(items), encoding="utf-8")
        write_texts(staging, items.provenance["files"])
    log.info(f"wrote {out}: {model.num_layers} layers, width {model.hidden_size}, {wanted}")


@contextmanager
def _reading(published: PublishedCheckpoint) -> Iterator[Callable[[str], np.ndarray]]:
    """A function that reads a tensor, with a progress bar; warns of NaN and infinity at the end."""
    seen: set[str] = set()
    damaged: dict[str, int] = {}
    with byte_bar("reading", published.nbytes) as progress:

        def read(name: str) -> np.ndarray:
            value = published.read(name)
            if name not in seen:  # a tensor that holds several parameters is read for each of them
                seen.add(name)
                progress(value.size * published.dtypes[name].itemsize)
                if count := count_not_finite(value):
                    damaged[name] = count
            return value

        yield read
    for name, count in list(damaged.items())[:MOST_WARNINGS]:
        log.warning(f"{name} has {count} values that are NaN or infinite")
    if damaged:
        log.warning(
            f"{len(damaged)} tensors have values that are NaN or infinite; the checkpoint is "
            f"refused wherever its parameters are read"
        )
