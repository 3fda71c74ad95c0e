"""python -m moi_jax.convert import|export|verify: published weights in and out, and the proof."""

import argparse
import ctypes
import json
import re
import signal
import sys
from contextlib import suppress
from pathlib import Path

from moi_jax.common.errors import run_command

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
    importer.set_defaults(run=_import)

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

    from moi_jax.common.log import show_logs

    show_logs(stderr=True)  # standard output is for reports
    # A half-written directory is removed on SIGTERM, too.
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


def _import(args: argparse.Namespace) -> None:
    from moi_jax.checkpoints.hf.importer import import_checkpoint

    import_checkpoint(args.source, args.out, args.tokenizer, args.dtype)


def _export(args: argparse.Namespace) -> None:
    from moi_jax.checkpoints.hf.exporter import export_checkpoint
    from moi_jax.checkpoints.hf.hub import check_token, push

    if args.push:
        check_token()  # before an hour of writing
    export_checkpoint(args.checkpoint, args.out, args.dtype, args.max_shard_size, args.as_family)
    if args.push:
        print(f"uploaded {push(args.out, args.push, private=not args.public)}")


def _verify(args: argparse.Namespace) -> int:
    from moi_jax.checkpoints.hf.verify import describe, verify_checkpoint

    report = verify_checkpoint(args.checkpoint, args.against, args.tensors_only)
    print(json.dumps(report, indent=1) if args.json else describe(report))
    return 0 if report["verdict"] == "equal" else 1


if __name__ == "__main__":
    run_command(main)
