"""python -m moi_jax.convert import|export|verify: published weights in and out, and the proof."""

import argparse
import ctypes
import json
import math
import re
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moi_jax.common.atomic_files import atomic_directory, check_new, write_texts
from moi_jax.common.errors import UserError, run_command

if TYPE_CHECKING:
    import numpy as np

    from moi_jax.checkpoints.hf.published import Published

M_MMAP_THRESHOLD = -3  # in glibc's malloc.h
DTYPES = ("float32", "bfloat16")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moi_jax.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)

    importer = commands.add_parser(
        "import",
        help="published weights -> checkpoint",
        description="Reads config.json, *.safetensors and the tokenizer of a directory, or a .gguf "
        "file, and writes a checkpoint. Licence files come along.",
    )
    importer.add_argument("source", type=Path, metavar="SRC", help="directory or .gguf file")
    importer.add_argument("--out", type=Path, required=True, metavar="CKPT", help="written whole")
    importer.add_argument(
        "--tokenizer", type=Path, metavar="DIR", help="where tokenizer files are, if not in SRC"
    )
    importer.add_argument(
        "--dtype", choices=DTYPES, help="of the stored parameters (default: as published)"
    )
    importer.set_defaults(run=lambda a: import_checkpoint(a.source, a.out, a.tokenizer, a.dtype))

    exporter = commands.add_parser(
        "export",
        help="checkpoint -> published layout",
        description="Writes safetensors, config.json, tokenizer, chat template and model card of a "
        "checkpoint or a run (its newest step; the parameters only).",
    )
    exporter.add_argument("checkpoint", type=Path, metavar="CKPT")
    exporter.add_argument("--out", type=Path, required=True, metavar="DIR", help="written whole")
    exporter.add_argument(
        "--dtype", choices=DTYPES, help="of the published tensors (default: as stored)"
    )
    exporter.add_argument(
        "--max-shard-size", type=parse_size, default=5 * 10**9, metavar="SIZE", help="default: 5GB"
    )
    exporter.add_argument(
        "--as",
        dest="as_family",
        choices=["qwen2"],
        help="Qwen v1 by the names of Qwen2, for tools without Qwen v1",
    )
    exporter.add_argument(
        "--push", metavar="REPO", help="then upload DIR as a new private repository; needs HF_TOKEN"
    )
    exporter.add_argument("--public", action="store_true", help="with --push: for all to see")
    exporter.set_defaults(run=_export)

    verifier = commands.add_parser(
        "verify",
        help="compare a checkpoint with published weights",
        description="Compares every tensor with those in DIR, and logits with transformers' "
        "model of DIR in float32. Exit status 0: equal, 1: different.",
    )
    verifier.add_argument("checkpoint", type=Path, metavar="CKPT")
    verifier.add_argument("--against", type=Path, required=True, metavar="DIR")
    verifier.add_argument("--json", action="store_true", help="the report as one JSON object")
    verifier.add_argument(
        "--tensors-only", action="store_true", help="no logits: whole models do not fit here"
    )
    verifier.set_defaults(run=_verify)

    args = parser.parse_args()
    # What is half written goes away when the process is asked to stop, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    _return_freed_memory()
    return args.run(args) or 0


def _return_freed_memory() -> None:
    """Has glibc give every buffer over 1 MB back to the system when it is freed.

    By itself it soon keeps those of up to 32 MB, and the chunks of one conversion after another
    then leave holes of gigabytes. Elsewhere than on Linux with glibc nothing happens.
    """
    with suppress(AttributeError, OSError, TypeError):
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 1 << 20)


def parse_size(text: str) -> int:
    """Bytes of "5GB", "800MB" or "2GiB"."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)(i?)B", text, re.IGNORECASE)
    size = 0
    if match:
        power = " KMGT".index(match[2].upper() or " ")
        size = int(float(match[1]) * (1024 if match[3] else 1000) ** power)
    if not size:
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write it as 5GB or 800MB")
    return size


def import_checkpoint(
    source: Path, out: Path, tokenizer: Path | None = None, dtype: str | None = None
) -> None:
    """Writes the published checkpoint `source` as one of ours at `out`, a tensor at a time.

    Raises:
      UserError: a file is missing or damaged, or `out` exists or cannot be written; nothing is
        left behind.
    """
    import ml_dtypes  # noqa: F401  # brings bfloat16 to numpy
    import numpy as np

    from moi_jax.checkpoints.hf.model_card import model_card
    from moi_jax.checkpoints.hf.provenance import read_provenance
    from moi_jax.checkpoints.hf.published import open_published
    from moi_jax.checkpoints.hf.weights import import_parameters
    from moi_jax.checkpoints.items import ModelItems
    from moi_jax.checkpoints.parameters import save_model
    from moi_jax.text.jinja_templates import check_template
    from moi_jax.text.prompts import prompts_metadata
    from moi_jax.text.tokenizer import Tokenizer, load_tokenizer

    check_new(out)
    published = open_published(source)
    model = published.config
    if published.tokenizer_files and not tokenizer:
        files = Tokenizer.from_files(published.tokenizer_files)
    else:
        files = load_tokenizer(tokenizer or source)
    if files.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {files.vocab_size} ids, the embedding in {source} only "
            f"{model.vocab_size} rows; is it the tokenizer of this model?"
        )
    wanted = np.dtype(dtype or published.common_dtype)
    report = check_template(files.files, files)
    default = report.default_system_prompt if report.own else model.default_system_prompt
    if report.difference:
        print(f"chat template: {report.template} is the nearest; {report.difference}")
    prompts = prompts_metadata(default, report.template)
    provenance = read_provenance(source, published.token_ids)
    items = ModelItems(model, files.files, prompts, provenance)
    with atomic_directory(out) as staging, _reading(published) as read:
        save_model(staging, import_parameters(model, read, wanted), wanted, items)
        (staging / "README.md").write_text(model_card(items), encoding="utf-8")
        write_texts(staging, provenance["files"])
    print(f"wrote {out}: {model.num_layers} layers, width {model.hidden_size}, {wanted}")


def export_checkpoint(
    checkpoint: Path,
    out: Path,
    dtype: str | None = None,
    max_shard_size: int = 5 * 10**9,
    as_family: str | None = None,
) -> None:
    """Writes the parameters of a checkpoint in their family's published layout, with all files.

    Args:
      dtype: of the tensors; None keeps the stored one.
      as_family: "qwen2" writes a Qwen v1 model by Qwen2's names.

    Raises:
      UserError: `checkpoint` is damaged, or `out` exists or cannot be written; nothing is left
        behind.
    """
    import ml_dtypes  # noqa: F401  # brings bfloat16 to numpy
    import numpy as np

    from moi_jax.checkpoints.hf.model_card import model_card
    from moi_jax.checkpoints.hf.published_files import published_files, where_exact
    from moi_jax.checkpoints.hf.weights import export_tensors, published_shapes
    from moi_jax.checkpoints.hf.writer import write_tensors
    from moi_jax.checkpoints.items import find_step, read_items
    from moi_jax.checkpoints.parameters import stored_parameters
    from moi_jax.common.progress import byte_bar
    from moi_jax.models.config import in_family

    check_new(out)
    step = find_step(checkpoint)
    items = read_items(step)
    model = in_family(items.model, as_family or items.model.family)
    stored = stored_parameters(step, items.model)
    wanted = np.dtype(dtype or stored.dtype)
    shapes = published_shapes(model)
    total = sum(math.prod(shape) for shape in shapes.values()) * wanted.itemsize
    with atomic_directory(out) as staging, byte_bar("writing", total) as wrote:
        staging.mkdir()
        tensors = export_tensors(items.model, stored.get, as_family)
        write_tensors(staging, shapes, wanted, tensors, max_shard_size, wrote)
        (staging / "README.md").write_text(model_card(items, step), encoding="utf-8")
        write_texts(staging, published_files(items, as_family, str(wanted), step))
    print(f"wrote {out}: {len(shapes)} tensors, {total / 1e9:.2f} GB, {wanted}")
    if model != items.model:
        print(where_exact(items))
    if items.provenance and not items.provenance["files"]:
        _warn(f"{items.provenance['base']} came without a licence file; find out its terms first")


def _export(args: argparse.Namespace) -> None:
    from moi_jax.checkpoints.hf.hub import check_token, push

    if args.push:
        check_token()  # before an hour of writing
    export_checkpoint(args.checkpoint, args.out, args.dtype, args.max_shard_size, args.as_family)
    if args.push:
        print(f"uploaded {push(args.out, args.push, private=not args.public)}")


def verify_checkpoint(
    checkpoint: Path, directory: Path, tensors_only: bool = False
) -> dict[str, Any]:
    """The parity report of a checkpoint against the published weights in `directory`.

    Returns:
      See `parity.compare_tensors` and `parity.compare_logits`; verdict is "equal" or "different".

    Raises:
      UserError: one of the two is missing or damaged, or they are of different families.
    """
    import jax.numpy as jnp
    import numpy as np

    from moi_jax.checkpoints.hf import verify as parity
    from moi_jax.checkpoints.hf.published import TensorFiles, read_bytes
    from moi_jax.checkpoints.hf.weights import export_tensors, redundant_tensors
    from moi_jax.checkpoints.items import find_step, read_items
    from moi_jax.checkpoints.parameters import read_parameters, stored_parameters
    from moi_jax.common.progress import byte_bar
    from moi_jax.models.config import in_family, read_hf_config
    from moi_jax.models.decoder import make_model
    from moi_jax.text.tokenizer import Tokenizer

    step = find_step(checkpoint)
    items = read_items(step)
    path = directory / "config.json"
    theirs = read_hf_config(read_bytes(path), str(path))
    model = in_family(items.model, theirs.family)
    stored = stored_parameters(step, items.model)
    files, ignored = TensorFiles(directory), redundant_tensors(theirs)
    with byte_bar("comparing", parity.total_bytes(files)) as advance:
        tensors = export_tensors(items.model, stored.get, theirs.family)
        report = {
            "checkpoint": str(step),
            "against": str(directory),
            "config": parity.compare_configs(model, theirs),
            "tensors": parity.compare_tensors(tensors, files, ignored, advance),
        }
    # In another family's terms it is the same model up to its seq_length alone.
    longest = parity.PROMPT_TOKENS if model == items.model else model.seq_length
    ids = parity.prompt_ids(
        Tokenizer.from_files(items.tokenizer, items.prompts["chat_template"]), longest
    )
    reason = "--tensors-only was given" if tensors_only else parity.why_no_reference(theirs)
    if reason is None:

        def ours(tokens: "np.ndarray", segment_ids: "np.ndarray") -> "np.ndarray":
            return np.asarray(decoder(jnp.asarray(tokens), segment_ids=jnp.asarray(segment_ids)))

        decoder = make_model(items.model)(read_parameters(step, items.model, "float32", None))
        logits = [ours(*batch) for batch in parity.batches(ids)]
        del decoder  # two models at a time need twice the memory
        report["logits"] = parity.compare_logits(logits, ids, directory, stored.dtype)
    else:
        report["logits"] = {"max_abs": None, "mean_kl": None}
    report["not_checked"] = [] if reason is None else [f"logits: {reason}"]
    report["verdict"] = parity.verdict(report)
    return report


def _verify(args: argparse.Namespace) -> int:
    from moi_jax.checkpoints.hf.verify import describe

    report = verify_checkpoint(args.checkpoint, args.against, args.tensors_only)
    print(json.dumps(report, indent=1) if args.json else describe(report))
    return 0 if report["verdict"] == "equal" else 1


@contextmanager
def _reading(published: "Published") -> Iterator[Callable[[str], "np.ndarray"]]:
    """Reads the tensors of a published checkpoint with a bar of bytes; warns of NaN and inf."""
    from moi_jax.checkpoints.hf.published import count_not_finite
    from moi_jax.common.progress import byte_bar

    seen: set[str] = set()
    damaged: dict[str, int] = {}
    with byte_bar("reading", published.nbytes) as advance:

        def read(name: str) -> "np.ndarray":
            value = published.read(name)
            if name not in seen:  # one that holds several parameters is read for each
                seen.add(name)
                advance(value.size * published.dtypes[name].itemsize)
                if count := count_not_finite(value):
                    damaged[name] = count
            return value

        yield read
    for name, count in list(damaged.items())[:5]:
        _warn(f"{name} has {count} values that are NaN or infinite")
    if len(damaged) > 5:
        _warn(f"{len(damaged)} tensors in all have values that are NaN or infinite")


def _warn(line: str) -> None:
    print(f"warning: {line}", file=sys.stderr)


if __name__ == "__main__":
    run_command(main)
