"""Arguments that several commands take: numbers, texts, and the options of a checkpoint."""

import argparse
import math
import os
from collections.abc import Callable
from pathlib import Path

from moi_jax.config.section import full_dtype
from moi_jax.text.templates import CHOICES

LARGEST = 2**31 - 1  # the largest int32
DTYPES = ("auto", "float32", "bfloat16")


def _number(
    convert: Callable[[str], float], valid: Callable[[float], bool], what: str
) -> Callable[[str], float]:
    """An argparse type for valid numbers; `what` names them in the message."""

    def parse(text: str) -> float:
        try:
            number = convert(text)
        except ValueError:
            number = math.nan
        if not valid(number):
            raise argparse.ArgumentTypeError(f"{text!r} is no {what}")
        return number

    return parse


POSITIVE = _number(int, lambda n: 0 < n <= LARGEST, f"whole number from 1 to {LARGEST:,}")
COUNT = _number(int, lambda n: 0 <= n <= LARGEST, f"whole number from 0 to {LARGEST:,}")
TEMPERATURE = _number(float, lambda n: 0 <= n < math.inf, "temperature from 0 on")
SECONDS = _number(float, lambda n: 0 < n < math.inf, "number of seconds above 0")
MONEY = _number(float, lambda n: 0 <= n < math.inf, "number of dollars")
PROBABILITY = _number(float, lambda n: 0 < n <= 1, "probability above 0")


def text(given: str) -> str:
    """An argparse type for texts, which are UTF-8 whatever the locale's encoding is."""
    try:
        return os.fsencode(given).decode()
    except UnicodeError:
        raise argparse.ArgumentTypeError("it is not valid UTF-8") from None


def add_config(parser: argparse.ArgumentParser) -> None:
    """Adds the config and the settings that override it, for `config.load.load_config`."""
    parser.add_argument("--config", required=True, metavar="FILE", help="YAML, see docs/config.md")
    parser.add_argument(
        "overrides",
        nargs="*",
        type=text,
        metavar="section.key=value",
        help="settings that override FILE",
    )


def add_hosts(parser: argparse.ArgumentParser) -> None:
    """Adds the options of `cli.hosts.join_hosts`."""
    group = parser.add_argument_group(
        "many hosts",
        "Start the same command on every host. SLURM, Open MPI, GKE and TPU VMs say by themselves "
        "which processes belong together; elsewhere give these three. See docs/clusters.md.",
    )
    group.add_argument("--coordinator", metavar="HOST:PORT", help="where process 0 is found")
    group.add_argument(
        "--num-processes", type=POSITIVE, metavar="N", help="how many processes there are"
    )
    group.add_argument("--process-id", type=COUNT, metavar="I", help="which one this is, from 0")


def add_model(group: "argparse._ArgumentGroup") -> None:
    """Adds the options of `open_checkpoint` and the system prompt."""
    system = group.add_mutually_exclusive_group()
    system.add_argument(
        "--system",
        type=text,
        metavar="TEXT",
        help="system prompt of conversations without one (default: the one in the checkpoint)",
    )
    system.add_argument(
        "--no-system", action="store_true", help="no system block for these conversations"
    )
    group.add_argument(
        "--chat-template",
        type=text,
        metavar="TEMPLATE",
        help=f"{', '.join(CHOICES)}, or a .jinja file (default: the template that the checkpoint "
        "was made with)",
    )
    group.add_argument(
        "--dtype",
        type=full_dtype,
        choices=DTYPES,
        default="auto",
        help="dtype of parameters and cache (default: float32 on a CPU, bfloat16 elsewhere)",
    )
    group.add_argument(
        "--mesh",
        metavar="AXES",
        help="devices along the mesh axes, such as fsdp=2,tensor=4 (default: tensor=-1, all)",
    )
    add_base(group)
    add_no_verify(group)


def add_base(group: "argparse._ActionsContainer") -> None:
    """Adds the option that names the base of a checkpoint of adapters."""
    group.add_argument(
        "--base",
        type=Path,
        metavar="CKPT",
        help="of LoRA adapters: the model beside which they were trained, as a checkpoint, "
        "published weights or OWNER/NAME of the hub (default: where it was then)",
    )


def add_no_verify(group: "argparse._ActionsContainer") -> None:
    """Adds the option that leaves the checksums of the parameters out."""
    group.add_argument(
        "--no-verify",
        dest="verify",
        action="store_false",
        help="do not compare the parameters with their checksums (which reads a checkpoint twice)",
    )


def chosen_system(args: argparse.Namespace, saved: str | None) -> str | None:
    """The system prompt that the options of `add_model` choose; None for no system block."""
    if args.no_system:
        return None
    return saved if args.system is None else args.system
