"""python -m moi_jax.convert: import, export and check published weights; average and merge."""

import argparse
import ctypes
import json
import math
import re
from contextlib import suppress
from pathlib import Path
from typing import TypeAlias

from moi_jax.cli.arguments import COUNT, PROBABILITY, add_base, add_no_verify, local_path
from moi_jax.cli.command import run_command
from moi_jax.common.errors import UserError
from moi_jax.config.section import full_dtype

M_MMAP_THRESHOLD = -3  # in glibc's malloc.h
Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"

DTYPES = ("float32", "bfloat16")


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m moi_jax.convert", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    _add_import(commands)
    _add_export(commands)
    _add_verify(commands)
    _add_average(commands)
    _add_merge(commands)
    _add_ema(commands)
    args = parser.parse_args()

    from moi_jax.common.log import show_logs

    show_logs(stderr=True)  # standard output is for reports
    _return_freed_memory()
    return args.run(args) or 0


def _add_import(commands: Commands) -> None:
    importer = commands.add_parser(
        "import",
        help="published weights -> checkpoint",
        description="Reads a directory with config.json, *.safetensors and a tokenizer, a .gguf "
        "file, or a repository of the Hugging Face hub, and writes a checkpoint. Licence files are "
        "copied too.",
    )
    importer.add_argument(
        "source",
        type=local_path,
        metavar="SRC",
        help="directory, .gguf file or OWNER/NAME[@REVISION]",
    )
    importer.add_argument(
        "--out", type=local_path, required=True, metavar="CKPT", help="must not exist"
    )
    importer.add_argument(
        "--tokenizer",
        type=local_path,
        metavar="DIR",
        help="directory of the tokenizer files, if they are not in SRC",
    )
    importer.add_argument(
        "--base",
        type=Path,
        metavar="CKPT",
        help="of a PEFT adapter in SRC (adapter_config.json): the checkpoint of its base",
    )
    importer.add_argument(
        "--dtype",
        type=full_dtype,
        choices=DTYPES,
        help="dtype of the stored parameters (default: as published)",
    )
    importer.set_defaults(run=_import)


def _add_export(commands: Commands) -> None:
    exporter = commands.add_parser(
        "export",
        help="checkpoint -> published layout",
        description="Writes the parameters of a checkpoint, or of the newest step of a run, as "
        "safetensors with config.json, tokenizer, chat template and model card, or as one GGUF "
        "file. LoRA adapters are merged into their base.",
    )
    exporter.add_argument("checkpoint", type=Path, metavar="CKPT")
    place = exporter.add_mutually_exclusive_group(required=True)
    place.add_argument("--out", type=local_path, metavar="DIR", help="must not exist")
    place.add_argument(
        "--gguf",
        type=local_path,
        metavar="FILE",
        help="write one GGUF file for llama.cpp and Ollama instead; must not exist",
    )
    exporter.add_argument(
        "--type",
        choices=["F32", "F16", "Q8_0"],
        help="with --gguf: type of the matrices (default: F16); norms and biases are F32",
    )
    exporter.add_argument(
        "--dtype",
        type=full_dtype,
        choices=DTYPES,
        help="dtype of the published tensors (default: as stored)",
    )
    exporter.add_argument("--max-shard-size", type=parse_size, metavar="SIZE", help="default: 5GB")
    exporter.add_argument(
        "--as",
        dest="as_family",
        choices=["qwen2"],
        help="write Qwen v1 with the names of Qwen2, for tools that do not know Qwen v1",
    )
    exporter.add_argument(
        "--peft",
        action="store_true",
        help="write the LoRA adapters alone, as a directory that peft loads, instead of merging "
        "them into the weights of their base",
    )
    add_base(exporter)
    exporter.add_argument(
        "--push", metavar="REPO", help="upload DIR as a new private repository; needs HF_TOKEN"
    )
    exporter.add_argument(
        "--public", action="store_true", help="with --push: make the repository public"
    )
    add_no_verify(exporter)
    exporter.set_defaults(run=_export)


def _add_verify(commands: Commands) -> None:
    verifier = commands.add_parser(
        "verify",
        help="compare a checkpoint with published weights",
        description="Compares every tensor with those in PUBLISHED, and logits with "
        "transformers' model of it in float32. Exit status 0: equal, 1: different.",
    )
    verifier.add_argument("checkpoint", type=Path, metavar="CKPT")
    verifier.add_argument(
        "--against",
        type=local_path,
        required=True,
        metavar="PUBLISHED",
        help="directory of safetensors, or a .gguf file",
    )
    add_base(verifier)
    verifier.add_argument("--json", action="store_true", help="print the report as one JSON object")
    verifier.add_argument(
        "--tensors-only",
        action="store_true",
        help="do not compare logits, which needs the whole model in memory",
    )
    verifier.set_defaults(run=_verify)


def _add_average(commands: Commands) -> None:
    average = commands.add_parser(
        "average",
        help="average the parameters of checkpoints",
        description="Writes the average of checkpoints of one model, or of adapters of one kind on "
        "one base. A single run stands for all of its checkpoints.",
    )
    average.add_argument("checkpoints", type=Path, nargs="+", metavar="CKPT")
    _add_combined(average)
    average.add_argument(
        "--ema",
        type=PROBABILITY,
        metavar="DECAY",
        help="exponential moving average in the order of the checkpoints: each one counts 1 - "
        "DECAY, and what was averaged before DECAY",
    )
    average.set_defaults(run=_average)


def _add_merge(commands: Commands) -> None:
    merge = commands.add_parser(
        "merge",
        help="merge fine-tuned runs of one base",
        description="Adds what each run has changed in the base, its task vector, to the base: "
        "averaged, by TIES, or by DARE. Runs may be fully fine-tuned or have adapters.",
    )
    merge.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    merge.add_argument(
        "--base", type=Path, required=True, metavar="CKPT", help="from which all runs began"
    )
    merge.add_argument("--method", choices=("average", "ties", "dare"), required=True)
    merge.add_argument(
        "--density",
        type=PROBABILITY,
        default=0.2,
        metavar="SHARE",
        help="of the values of a matrix that ties and dare keep (default: 0.2)",
    )
    merge.add_argument("--seed", type=COUNT, default=0, metavar="N", help="of what dare drops")
    _add_combined(merge)
    merge.set_defaults(run=_merge)


def _add_ema(commands: Commands) -> None:
    ema = commands.add_parser(
        "ema",
        help="the moving average that a run has kept (optimizer.ema_decay)",
        description="Writes a checkpoint with the moving average of the parameters that a run with "
        "optimizer.ema_decay keeps. evaluate, generate and convert export read it as any other.",
    )
    ema.add_argument("checkpoint", type=Path, metavar="CKPT")
    ema.add_argument("--out", type=local_path, required=True, metavar="CKPT", help="must not exist")
    add_no_verify(ema)
    ema.set_defaults(run=_ema)


def _add_combined(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--out", type=local_path, required=True, metavar="CKPT", help="must not exist"
    )
    command.add_argument(
        "--weights",
        type=parse_weights,
        metavar="W,W",
        help="one number for each, which are divided by their sum (default: equal)",
    )
    add_no_verify(command)


def parse_weights(given: str) -> list[float]:
    """The finite numbers of a comma-separated list."""
    try:
        weights = [float(number) for number in given.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(map(math.isfinite, weights)):
        raise argparse.ArgumentTypeError(f"{given!r} is no list of numbers such as 1,0.5")
    return weights


def _return_freed_memory() -> None:
    """Makes glibc return every buffer over 1 MB to the system when it is freed.

    By default it soon keeps buffers of up to 32 MB, and the chunks of a conversion then leave
    gigabytes of holes. Does nothing on systems without glibc.
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
    from moi_jax.checkpoints.hf.peft_importer import import_adapter, is_adapter

    if is_adapter(args.source):
        if args.base is None or args.tokenizer or args.dtype:
            raise UserError(
                f"{args.source} is a PEFT adapter: name the checkpoint of its base with --base, "
                f"whose tokenizer it takes, and leave out --tokenizer and --dtype"
            )
        import_adapter(args.source, args.base, args.out)
        return
    if args.base:
        raise UserError(f"{args.source} is no PEFT adapter; leave out --base")
    import_checkpoint(args.source, args.out, args.tokenizer, args.dtype)


def _export(args: argparse.Namespace) -> None:
    from moi_jax.checkpoints.hf.exporter import MAX_SHARD_SIZE, export_checkpoint
    from moi_jax.checkpoints.hf.hub import check_token, push
    from moi_jax.checkpoints.hf.peft_exporter import export_adapter

    if args.gguf:
        _export_gguf(args)
        return
    if args.type:
        raise UserError("--type is for GGUF files; name one with --gguf, or use --dtype")
    if args.push:
        check_token()  # before an hour of writing
    if args.peft:
        if args.base or args.dtype or args.as_family:
            raise UserError(
                "--peft writes adapters in float32 under the names of their family, and reads no "
                "base; leave out --base, --dtype and --as"
            )
        export_adapter(args.checkpoint, args.out, args.verify)
    else:
        export_checkpoint(
            args.checkpoint,
            args.out,
            args.dtype,
            args.max_shard_size or MAX_SHARD_SIZE,
            args.as_family,
            args.verify,
            args.base,
        )
    if args.push:
        print(f"uploaded {push(args.out, args.push, private=not args.public)}")


def _export_gguf(args: argparse.Namespace) -> None:
    from moi_jax.checkpoints.hf.gguf_exporter import export_gguf

    of_folders = (args.peft, args.dtype, args.as_family, args.max_shard_size)
    if any((*of_folders, args.push, args.public)):
        raise UserError(
            "--gguf writes merged weights into one file, in the type of --type; leave out --peft, "
            "--dtype, --as, --max-shard-size, --push and --public"
        )
    export_gguf(args.checkpoint, args.gguf, args.type or "F16", args.verify, args.base)


def _verify(args: argparse.Namespace) -> int:
    from moi_jax.checkpoints.hf.verify import describe, verify_checkpoint

    report = verify_checkpoint(args.checkpoint, args.against, args.tensors_only, args.base)
    print(json.dumps(report, indent=1) if args.json else describe(report))
    return 0 if report["verdict"] == "equal" else 1


def _average(args: argparse.Namespace) -> None:
    from moi_jax.checkpoints.average import average_checkpoints

    if args.ema and args.weights:
        raise UserError("--ema gives the weights; leave out --weights")
    average_checkpoints(args.checkpoints, args.out, args.weights, args.ema, args.verify)


def _merge(args: argparse.Namespace) -> None:
    from moi_jax.checkpoints.merge import MergeOptions, merge_runs

    options = MergeOptions(args.method, args.weights, args.density, args.seed)
    merge_runs(args.runs, args.base, args.out, options, args.verify)


def _ema(args: argparse.Namespace) -> None:
    from moi_jax.checkpoints.moving_average import write_moving_average

    write_moving_average(args.checkpoint, args.out, args.verify)


if __name__ == "__main__":
    run_command(main)
