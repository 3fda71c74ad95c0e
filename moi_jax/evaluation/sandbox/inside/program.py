"""The program's process: runs the code, then answers the runner's requests until it is killed."""

import io
import operator
import os
import pickle
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from moi_jax.evaluation.sandbox.inside import rpc
from moi_jax.evaluation.sandbox.inside.arguments import Watched
from moi_jax.evaluation.sandbox.inside.values import build

LONGEST_ERROR = 500


def _items(obj: Any) -> list[Any] | None:
    """The items of a collection; None of an iterator."""
    items = iter(obj)
    return None if items is obj else list(items)


def _next(iterator: Any) -> tuple[Any] | None:
    """The next item; None at the end."""
    try:
        return (next(iterator),)
    except StopIteration:
        return None


OPERATIONS: dict[str, Callable[..., Any]] = {
    "call": lambda target, args, kwargs: target(*args, **kwargs),
    "getattr": getattr,
    "setattr": setattr,
    "items": _items,
    "next": _next,
    "len": len,
    "getitem": operator.getitem,
    "setitem": operator.setitem,
    "delitem": operator.delitem,
    "isinstance": isinstance,
    "bool": bool,
    "int": int,
    "float": float,
    "index": operator.index,
    "str": str,
    "repr": repr,
    "hash": hash,
    "eq": operator.eq,
    "lt": operator.lt,
    "le": operator.le,
    "gt": operator.gt,
    "ge": operator.ge,
}


def serve(requests: int, replies: int, trusted: str, code: str, names: Sequence[str]) -> None:
    """Runs the code and replies with its objects of these names. Then answers each request.

    From its first line on, the code controls this process: it can see and change everything here.
    But nothing that it does to this loop can make a wrong result equal the expected one.

    Args:
      requests, replies: file descriptors.
    """
    objects: list[Any] = []
    handles: dict[int, int] = {}  # id of an object -> its handle

    def handle_of(obj: Any) -> int:
        if id(obj) not in handles:
            handles[id(obj)] = len(objects)
            objects.append(obj)
        return handles[id(obj)]

    def reply(work: Callable[[], Any], watched: Watched) -> None:
        try:
            said = None, work(), watched.changes()
            frame = rpc.pack(said, handle_of, watched.places)
        except BaseException as error:
            frame = _failure(error, watched, handle_of)
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

    def answer_until_returned() -> tuple[Any, ...]:
        """Answers requests. Returns what a function of the tests returned."""
        while True:
            what, *rest = _Unpacker(rpc.receive(requests), objects, call_back).load()
            if what == "returned":
                return tuple(rest)
            watched = Watched(rest[1:] if what == "call" else None)
            reply(partial(OPERATIONS[what], *rest), watched)

    def call_back(number: int, args: Any, kwargs: Any) -> Any:
        """Calls a function of the tests, which runs in the runner."""
        rpc.send(replies, rpc.pack(("call back", number, args, kwargs), handle_of))
        error, value = answer_until_returned()
        if error is not None:
            raise error(value)
        return value

    reply(start, Watched(None))
    answer_until_returned()


def _failure(error: BaseException, watched: Watched, handle_of: Callable[[Any], int]) -> bytes:
    """The reply to a request that raised an exception."""
    kind = "syntax error" if isinstance(error, _NoProgram) else "error"
    kinds = [base.__name__ for base in type(error).__mro__]
    said = describe(error)
    try:
        return rpc.pack((kind, said, watched.changes(), kinds), handle_of, watched.places)
    except BaseException:  # the changes may be what cannot be sent
        return rpc.pack((kind, said, {}, kinds), handle_of)


class _Unpacker(pickle.Unpickler):
    """Reads the runner's requests. This process trusts them."""

    def __init__(self, frame: bytes, objects: Sequence[Any], call_back: Callable[..., Any]):
        super().__init__(io.BytesIO(frame))
        self._objects, self._call_back = objects, call_back

    def persistent_load(self, reference: Any) -> Any:
        kind, value = reference
        if kind == "object":
            return self._objects[value]
        if kind == "function":
            return lambda *args, **kwargs: self._call_back(value, args, kwargs)
        if kind == "value":
            return build(*value)
        return _iterate(lambda: self._call_back(value, (), {}))


def _iterate(following: Callable[[], Any]) -> Iterator[Any]:
    """The items of a generator of the tests."""
    while True:
        try:
            item = following()
        except StopIteration:
            return
        yield item


class _NoProgram(Exception):
    """The code does not compile."""

    def __str__(self) -> str:
        return str(self.args[0])


def describe(error: BaseException) -> str:
    """The error as the last line of a traceback, short and printable."""
    if isinstance(error, _NoProgram):
        return str(error)
    said = str(error).strip().split("\n")[-1]
    text = f"{type(error).__name__}: {said}" if said else type(error).__name__
    return printable(text)


def printable(text: str) -> str:
    """A text on one line, not longer than LONGEST_ERROR."""
    return "".join(c if c.isprintable() else "?" for c in text[:LONGEST_ERROR])


def leave_standard_streams() -> None:
    """Makes standard input empty and discards standard output and error."""
    null = os.open("/dev/null", os.O_RDWR)
    for fd in (0, 1, 2):
        os.dup2(null, fd)
    os.close(null)
