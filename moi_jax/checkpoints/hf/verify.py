"""Verifying that a checkpoint is the published model: the parity report and its verdict."""

import dataclasses
import importlib.util
import json
from collections.abc import Iterable, Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np

from moi_jax.checkpoints.checksums import verify_arrays, verify_small_items
from moi_jax.checkpoints.hf.compare import (
    PROMPT_TOKENS,
    PublishedTensors,
    Report,
    batches,
    compare_configs,
    compare_logits,
    compare_tensors,
    prompt_ids,
    total_bytes,
)
from moi_jax.checkpoints.hf.compare_templates import compare_templates, why_not_compared
from moi_jax.checkpoints.hf.gguf import GgufCheckpoint, open_gguf
from moi_jax.checkpoints.hf.safetensors_reader import TensorFiles, read_bytes
from moi_jax.checkpoints.hf.weights import export_tensors, redundant_tensors
from moi_jax.checkpoints.init_from import chosen_base
from moi_jax.checkpoints.items import ModelItems, find_step, read_items
from moi_jax.checkpoints.merged import merged_parameters
from moi_jax.checkpoints.opener import load
from moi_jax.common.progress import byte_bar
from moi_jax.models.config import ModelConfig, in_family, read_hf_config
from moi_jax.text.tokenizer import Tokenizer

# Relative to the largest logit. float32 sums in another order stay below it at every depth we
# tried; a wrong detail of the architecture does not.
LOGITS_BAR = 2e-5
KL_BAR = 1e-7


def verify_checkpoint(
    checkpoint: Path, against: Path, tensors_only: bool = False, base: Path | None = None
) -> Report:
    """Compares a checkpoint with published weights.

    Args:
      checkpoint: a step, or a run (its newest step).
      against: a directory of safetensors, or a .gguf file, whose weights are dequantised.
      tensors_only: leaves the logits out, which need a whole model in memory.
      base: of a checkpoint of adapters, see `moi_jax.load`. Their sums with the base are rounded
        to the dtype of the published tensors, as an export rounds them.

    Returns:
      checkpoint and against (paths), checksums (how many files are as they were written; 0 where
      the checkpoint has none), config, tensors and logits (see the functions of compare.py),
      template (see compare_templates.py; None if it was not compared), not_checked (reasons),
      verdict ("equal" or "different").

    Raises:
      UserError: one of the two is missing or damaged, or they are of different families.
    """
    step = find_step(checkpoint)
    checksums = verify_small_items(step) + verify_arrays(step)
    items = read_items(step)
    theirs, files = _open(against)
    ours = in_family(items.model.base, theirs.family)
    rounded = None
    if isinstance(files, GgufCheckpoint):
        rounded = files.rounded
        # No GGUF file tells it.
        theirs = dataclasses.replace(theirs, initializer_range=ours.initializer_range)
    place = chosen_base(step, items, base)
    stored = merged_parameters(step, items, verify=False, base=place)
    merged = items.model.adapter is not None
    ignored = redundant_tensors(theirs)
    with byte_bar("comparing", total_bytes(files)) as progress:
        tensors = export_tensors(items.model.base, stored.get, theirs.family)
        if merged:
            tensors = _rounded(tensors, files)
        report: Report = {
            "checkpoint": str(step),
            "against": str(against),
            "checksums": checksums,
            "config": compare_configs(ours, theirs),
            "tensors": compare_tensors(tensors, files, ignored, progress, rounded),
            "logits": {"max_abs": None, "mean_kl": None},
        }
    report["template"], no_template = _template(items, against)
    reason = "--tensors-only was given" if tensors_only else _why_no_reference(theirs)
    if rounded and reason is None:
        reason = _why_not_read(theirs)
    if merged and reason is None:
        reason = _why_rounded(files)
    if report["tensors"]["rounded"] and reason is None:
        reason = "the weights are rounded there; export with --type F32 to compare"
    if reason is None:
        # Under another family's names the models are equal up to seq_length only.
        longest = PROMPT_TOKENS if ours == items.model.base else ours.seq_length
        ids, logits = _our_logits(step, items, longest, place)
        dtype = np.result_type(stored.dtype, np.float32) if merged else stored.dtype
        report["logits"] = compare_logits(logits, ids, against, dtype)
    unchecked = {"logits": reason, "chat template": no_template}
    report["not_checked"] = [f"{what}: {why}" for what, why in unchecked.items() if why]
    report["verdict"] = verdict(report)
    return report


def _our_logits(
    step: Path, items: ModelItems, longest: int, base: Path | None
) -> tuple[np.ndarray, list[np.ndarray]]:
    """The ids of the prompt and the logits of `batches`; the model leaves the memory again.

    Two models at a time, with the one that it is compared with, would need twice the memory.
    """
    template = items.prompts["chat_template"]
    model, tokenizer = load(step, chat_template=template, verify=False, base=base)
    ids = prompt_ids(tokenizer, longest)
    logits = [
        np.asarray(model(jnp.asarray(tokens), segment_ids=jnp.asarray(segment_ids)))
        for tokens, segment_ids in batches(ids)
    ]
    return ids, logits


def _rounded(
    tensors: Iterable[tuple[str, np.ndarray]], files: PublishedTensors
) -> Iterator[tuple[str, np.ndarray]]:
    """The tensors in the dtypes of the published ones, where these are narrower."""
    for name, tensor in tensors:
        theirs = files.headers[name].dtype if name in files.headers else tensor.dtype
        yield name, tensor.astype(theirs) if theirs.itemsize < tensor.itemsize else tensor


def _why_rounded(files: PublishedTensors) -> str | None:
    """Why the logits of adapters differ from those of the rounded sums; None if they do not."""
    if all(header.dtype.itemsize >= 4 for header in files.headers.values()):
        return None
    return "the adapters are merged and rounded there; export with --dtype float32 to compare"


def _open(published: Path) -> tuple[ModelConfig, PublishedTensors]:
    """The architecture and the tensors of a directory or a .gguf file."""
    if published.suffix == ".gguf":
        file = open_gguf(published)
        return read_hf_config(json.dumps(file.config_json), str(published)), file
    path = published / "config.json"
    return read_hf_config(read_bytes(path), str(path)), TensorFiles(published)


def _template(items: ModelItems, directory: Path) -> tuple[Report | None, str | None]:
    """The comparison of the chat templates, and why there is none."""
    name = items.prompts["chat_template"]
    if directory.is_file():
        return None, "transformers reads no chat template from a .gguf file"
    reason = why_not_compared(directory)
    if reason is not None or name is None:
        return None, reason
    tokenizer = Tokenizer.from_files(items.tokenizer, name)
    try:
        return compare_templates(tokenizer, items.prompts["default_system_prompt"], directory), None
    except (OSError, ValueError) as error:  # of transformers, about the tokenizer of the directory
        return None, str(error).splitlines()[0]


def _why_no_reference(config: ModelConfig) -> str | None:
    """Why transformers can give no logits to compare with; None if it can."""
    for library in ("torch", "transformers"):
        if importlib.util.find_spec(library) is None:
            return f"{library} is not installed (pip install 'moi_jax[parity]')"
    if config.family == "qwen_v1":
        return (
            "transformers has no Qwen v1; export with --as qwen2 and verify against the result, "
            "which is equal up to the model's seq_length"
        )
    return None


def _why_not_read(config: ModelConfig) -> str | None:
    """Why transformers reads another model from a GGUF file; None if it does not."""
    if config.family == "llama" and (config.rope_scaling or config.qkv_bias):
        return "transformers ignores the biases and the scaling of RoPE of a Llama in a .gguf file"
    return None


def verdict(report: Report) -> str:
    """equal or different, by tensors, configuration, and if compared, logits and template."""
    tensors, logits = report["tensors"], report["logits"]
    unequal = [report["config"], *(tensors[k] for k in ("missing", "unexpected", "mismatched"))]
    if logits["max_abs"] is not None:
        bar = LOGITS_BAR * max(1.0, logits["largest"])
        unequal += [not logits["max_abs"] <= bar, not logits["mean_kl"] <= KL_BAR]
    if report.get("template"):
        unequal.append(report["template"]["different"])
    return "different" if any(unequal) else "equal"


def describe(report: Report) -> str:
    """The report as text for people."""
    tensors, logits = report["tensors"], report["logits"]
    lines = [f"{report['checkpoint']} against {report['against']}"]
    if report["checksums"]:
        lines.append(f"checksums: {report['checksums']} files are as they were written")
    for field, values in report["config"].items():
        lines.append(f"config: {field} is {values['ours']} here, {values['theirs']} there")
    cast = ""
    if tensors["cast"]:
        cast = f" ({tensors['cast']} of them cast from {tensors['dtypes']['theirs']} first)"
    if tensors["rounded"]:
        cast += f" ({tensors['rounded']} of them once they are rounded as the file's are)"
    lines.append(f"tensors: {tensors['matched']} equal bit by bit{cast}")
    for what, where in (("missing", "only there"), ("unexpected", "only here")):
        lines += [f"  {what} ({where}): {name}" for name in tensors[what]]
    for bad in tensors["mismatched"]:
        if bad["what"] == "shape":
            lines.append(f"  {bad['name']}: shape {bad['ours']} here, {bad['theirs']} there")
        else:
            lines.append(
                f"  {bad['name']}: {bad['count']:,} of {bad['of']:,} values differ, by up to "
                f"{bad['max_abs']:.3g}"
            )
    if logits["max_abs"] is not None:
        for part in ("prompt", "packed"):
            lines.append(
                f"logits, {part} ({logits[part]['tokens']} tokens): max abs difference "
                f"{logits[part]['max_abs']:.2e}, mean KL {logits[part]['mean_kl']:.2e}"
            )
        lines.append(f"  (the largest logit is {logits['largest']:.3g})")
        lines.append("next token of the prompt: id, logit here, logit there")
        for row in logits["top5"]:
            lines.append(f"  {row['token']:>7} {row['ours']:10.4f} {row['theirs']:10.4f}")
    if template := report["template"]:
        lines.append(
            f"chat template: {template['samples'] - template['different']} of "
            f"{template['samples']} samples of {template['conversations']} conversations equal; "
            f"labels compared with {template['labels']}; {template['refused']} refused"
        )
        lines += [f"  {template['first']}"] if template["first"] else []
    lines += [f"not checked: {what}" for what in report["not_checked"]]
    return "\n".join([*lines, f"verdict: {report['verdict']}"])
