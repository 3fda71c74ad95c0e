"""Exporting a checkpoint as one GGUF file, which llama.cpp and Ollama run."""

import dataclasses
import logging
import math
from pathlib import Path
from typing import Any

import numpy as np

from moi_jax.checkpoints.hf.companion_files import companion_files, where_exact
from moi_jax.checkpoints.hf.gguf import llama3_factors
from moi_jax.checkpoints.hf.gguf_tokenizer import add_tokenizer
from moi_jax.checkpoints.hf.weights import export_tensors, published_shapes
from moi_jax.checkpoints.init_from import chosen_base
from moi_jax.checkpoints.items import ModelItems, find_step, read_items
from moi_jax.checkpoints.merged import merged_parameters
from moi_jax.common.atomic_files import atomic_directory, check_new
from moi_jax.common.errors import UserError
from moi_jax.common.progress import byte_bar
from moi_jax.models.config import ModelConfig, in_family

TYPES = ("F32", "F16", "Q8_0")
# Family -> the family as which llama.cpp reads it. Its own `qwen` has no dynamic NTK and no log-n
# attention either, and fewer tools know it.
FAMILIES = {"llama": "llama", "qwen2": "qwen2", "qwen_v1": "qwen2", "qwen3": "qwen3"}

log = logging.getLogger(__name__)


def export_gguf(
    checkpoint: Path, out: Path, kind: str = "F16", verify: bool = True, base: Path | None = None
) -> None:
    """Writes the parameters of a checkpoint with its tokenizer and chat template as a GGUF file.

        export_gguf(Path("runs/qwen_7b_moi"), Path("qwen_7b_moi.gguf"), "Q8_0")

    One tensor is in memory at a time. Norms and biases are float32.

    Args:
      checkpoint: a step, or a run (its newest step).
      out: must not exist.
      kind: of the matrices, one of TYPES. Those whose rows are no whole blocks of 32 are F16
        instead of Q8_0, as in llama.cpp.
      verify: compare the files of the parameters with their checksums first.
      base: of a checkpoint of adapters, which are merged, see `moi_jax.load`.

    Raises:
      UserError: the package gguf is missing, llama.cpp has no architecture for the model or no
        name for its tokenizer, `checkpoint` is damaged, its base is missing, a value is too large
        for float16, or `out` exists or cannot be written. Nothing is left behind.
    """
    try:
        import gguf
    except ImportError:
        raise UserError("--gguf needs the package gguf: pip install 'moi_jax[gguf]'") from None
    if out.suffix != ".gguf":
        raise UserError(f"{out} must end in .gguf, by which other programs know such a file")
    check_new(out)
    step = find_step(checkpoint)
    items = read_items(step)
    model = _as_llama_cpp(items.model.base, step)
    stored = merged_parameters(step, items, verify, chosen_base(step, items, base))
    items = dataclasses.replace(items, model=items.model.base)
    kinds = {name: _kind(shape, kind) for name, shape in published_shapes(model).items()}
    total = sum(_nbytes(shape, kinds[name]) for name, shape in published_shapes(model).items())
    with atomic_directory(out) as staging, byte_bar("writing", total) as progress:
        writer = gguf.GGUFWriter(staging, model.family)
        _add_metadata(writer, model, items, kind)
        files = companion_files(items, model.family, kind, step)
        add_tokenizer(writer, files, model.vocab_size)
        _announce(writer, model, kinds)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if model.rope_scaling:
            writer.write_tensor_data(_rope_factors(model))
        for name, tensor in export_tensors(items.model, stored.get, model.family):
            written = _encoded(name, _permuted(name, tensor, model), kinds[name])
            writer.write_tensor_data(written)
            progress(written.nbytes)
        writer.close()
    log.info(f"wrote {out}: {len(kinds)} tensors, {total / 1e9:.2f} GB, {kind}")
    if model != items.model:
        log.info(where_exact(items))


def _as_llama_cpp(config: ModelConfig, step: Path) -> ModelConfig:
    """The config of the family as which llama.cpp reads the model."""
    if config.family not in FAMILIES:
        raise UserError(
            f"{step} is of the family {config.family}, which is not written as GGUF (only "
            f"{', '.join(FAMILIES)} are); export safetensors, and convert these with llama.cpp"
        )
    model = in_family(config, FAMILIES[config.family])
    if model.rope_scaling and model.family != "llama":
        raise UserError(
            f"{step} scales RoPE as Llama 3 does, which llama.cpp does not for the family "
            f"{config.family}"
        )
    return model


def _add_metadata(writer: Any, model: ModelConfig, items: ModelItems, kind: str) -> None:
    from gguf import LlamaFileType

    file_types = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_file_type(LlamaFileType[file_types[kind]])
    writer.add_name(Path(items.provenance.get("base") or "moi_jax").name)
    if licence := items.provenance.get("license"):
        writer.add_license(licence)
    writer.add_vocab_size(model.vocab_size)
    writer.add_context_length(model.seq_length)
    writer.add_embedding_length(model.hidden_size)
    writer.add_block_count(model.num_layers)
    writer.add_feed_forward_length(model.mlp_width)
    writer.add_head_count(model.num_heads)
    writer.add_head_count_kv(model.num_kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.norm_eps)
    writer.add_rope_dimension_count(model.head_dim)
    writer.add_rope_freq_base(model.rope_base)


def _announce(writer: Any, model: ModelConfig, kinds: dict[str, str]) -> None:
    """Adds name, shape and type of every tensor, in the order in which they are written."""
    from gguf import MODEL_ARCH, GGMLQuantizationType, get_tensor_name_map
    from gguf.quants import quant_shape_to_byte_shape

    names = get_tensor_name_map(MODEL_ARCH[model.family.upper()], model.num_layers)
    if model.rope_scaling:
        factors = _rope_factors(model)
        writer.add_tensor_info("rope_freqs.weight", factors.shape, factors.dtype, factors.nbytes)
    for name, shape in published_shapes(model).items():
        kind = GGMLQuantizationType[kinds[name]]
        theirs = names.get_name(name, try_suffixes=(".weight", ".bias"))
        assert theirs, name
        nbytes = _nbytes(shape, kinds[name])
        if kind == GGMLQuantizationType.Q8_0:
            blocks = quant_shape_to_byte_shape(shape, kind)
            writer.add_tensor_info(theirs, blocks, np.dtype(np.uint8), nbytes, kind)
        else:
            writer.add_tensor_info(theirs, shape, np.dtype(np.float32), nbytes, kind)


def _kind(shape: tuple[int, ...], kind: str) -> str:
    """The type of a tensor in a file of matrices of `kind`."""
    if len(shape) == 1:
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % 32 else kind


def _nbytes(shape: tuple[int, ...], kind: str) -> int:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    return math.prod(shape) // block * size


def _encoded(name: str, tensor: np.ndarray, kind: str) -> np.ndarray:
    from gguf import GGMLQuantizationType, quantize

    with np.errstate(over="ignore"):  # told below
        written = quantize(tensor.astype(np.float32), GGMLQuantizationType[kind])
    if kind == "F16" and not np.isfinite(written).all():
        raise UserError(f"{name} has values that float16 cannot hold; export with --type F32")
    return written


def _permuted(name: str, tensor: np.ndarray, model: ModelConfig) -> np.ndarray:
    """The rows of q and k of Llama in llama.cpp's order, which rotates neighbours, not halves.

    The row of a head that pairs i with i + N/2 here pairs 2 i with 2 i + 1 there.
    """
    heads = {"q_proj": model.num_heads, "k_proj": model.num_kv_heads}.get(name.split(".")[-2])
    if model.family != "llama" or heads is None:
        return tensor
    halves = tensor.reshape(heads, 2, -1, *tensor.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2)).reshape(tensor.shape)


def _rope_factors(model: ModelConfig) -> np.ndarray:
    assert model.rope_scaling
    scaling = dataclasses.asdict(model.rope_scaling)
    return llama3_factors(model.rope_base, model.head_dim, scaling)
