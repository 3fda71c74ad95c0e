"""Arguments that several commands take: numbers, texts, and which model is asked how."""

import argparse
import math
from collections.abc import Callable

from moi_jax.text.templates import TEMPLATES

LARGEST = 2**31 - 1  # what an int32 holds
DTYPES = ("auto", "float32", "bfloat16")


def _number(
    convert: Callable[[str], float], valid: Callable[[float], bool], what: str
) -> Callable[[str], float]:
    """A type of argparse for the numbers that are valid."""

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
MONEY = _number(float, lambda n: 0 <= n < math.inf, "number of dollars")
PROBABILITY = _number(float, lambda n: 0 < n <= 1, "probability above 0")


def text(given: str) -> str:
    """A text of the command line: Python hides bytes that are no UTF-8 in surrogates."""
    try:
        given.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError("it is not valid UTF-8") from None
    return given


def add_model(group: "argparse._ArgumentGroup") -> None:
    """What `open_checkpoint` is told, and the system prompt."""
    system = group.add_mutually_exclusive_group()
    system.add_argument(
        "--system",
        type=text,
        metavar="TEXT",
        help="system prompt of chats that bring none (default: the one saved in the checkpoint)",
    )
    system.add_argument("--no-system", action="store_true", help="no system block for them")
    group.add_argument(
        "--chat-template", choices=TEMPLATES, help="default: the one the checkpoint was made with"
    )
    group.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="of parameters and cache (default: float32 on a CPU, bfloat16 elsewhere)",
    )
    group.add_argument(
        "--mesh",
        metavar="AXES",
        help="devices along the axes, such as fsdp=2,tensor=4 (default: tensor, all devices)",
    )


def chosen_system(args: argparse.Namespace, saved: str | None) -> str | None:
    """The one that `add_model`'s arguments choose; None for no system block."""
    if args.no_system:
        return None
    return saved if args.system is None else args.system
