"""The program's process: runs the code, then answers the runner's calls until it is killed."""

import os
import sys
import types
from collections.abc import Sequence
from typing import Any

from moi_jax.evaluation.sandbox.inside import rpc

LONGEST_ERROR = 500


def serve(requests: int, replies: int, trusted: str, code: str, names: Sequence[str]) -> None:
    """Runs the code and replies with its objects of these names. Then answers each request.

    From its first line on, the code controls this process: it can see and change everything here.
    But nothing that it does to this loop can make a wrong result equal the expected one.

    Args:
      requests, replies: file descriptors.
    """
    objects: list[Any] = []

    def handle_of(obj: Any) -> int:
        objects.append(obj)
        return len(objects) - 1

    def reply(work: Any) -> None:
        try:
            frame = rpc.pack((None, work()), handle_of)
        except BaseException as error:
            kind = "syntax error" if isinstance(error, _NoProgram) else "error"
            frame = rpc.pack((kind, describe(error)), handle_of)
        rpc.send(replies, frame)

    def start() -> dict[str, Any]:
        # Not "__main__": the code below a main guard is usually a demonstration.
        module = types.ModuleType("program")
        sys.modules["program"] = module
        try:
            compiled = compile(code, "<program>", "exec")
        except Exception as error:
            raise _NoProgram(describe(error)) from None
        exec(trusted, vars(module))
        exec(compiled, vars(module))
        return {name: vars(module)[name] for name in names if name in vars(module)}

    reply(start)
    while True:
        what, target, *rest = rpc.unpack(rpc.receive(requests), objects.__getitem__)
        reply(lambda what=what, target=target, rest=rest: _do(what, target, *rest))


class _NoProgram(Exception):
    """The code does not compile."""

    def __str__(self) -> str:
        return str(self.args[0])


def _do(what: str, target: Any, *rest: Any) -> Any:
    match what:
        case "call":
            args, kwargs = rest
            return target(*args, **kwargs)
        case "list":
            return list(target)
        case "get":
            return getattr(target, *rest)
        case "set":
            return setattr(target, *rest)


def describe(error: BaseException) -> str:
    """The error as the last line of a traceback, short and printable."""
    if isinstance(error, _NoProgram):
        return str(error)
    said = str(error).strip().split("\n")[-1]
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return "".join(c if c.isprintable() else "?" for c in text[:LONGEST_ERROR])


def leave_standard_streams() -> None:
    """Makes standard input empty and discards standard output and error."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
