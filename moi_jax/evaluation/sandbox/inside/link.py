"""The runner's side of the calls: sends requests to the program, and reads its replies."""

import builtins
import io
import pickle
import types
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from moi_jax.evaluation.sandbox.inside import rpc
from moi_jax.evaluation.sandbox.inside.arguments import MUTABLE, apply, containers
from moi_jax.evaluation.sandbox.inside.program import printable
from moi_jax.evaluation.sandbox.inside.remote import Remote
from moi_jax.evaluation.sandbox.inside.values import VIEWS, form_of

# The exceptions of a program that its tests can catch, also by their bases. StopIteration is none:
# it would silently end a loop over map(f, ...) in the tests.
CATCHABLE = (
    "ArithmeticError", "AssertionError", "AttributeError", "EOFError", "FileNotFoundError",
    "IndexError", "KeyError", "LookupError", "MemoryError", "NameError", "NotImplementedError",
    "OSError", "OverflowError", "RecursionError", "RuntimeError", "TypeError", "ValueError",
    "ZeroDivisionError",
)  # fmt: skip

_BY_FORM = (tuple, *VIEWS.values())


class ProgramError(Exception):
    """The program raised an exception.

    Attributes:
      kind: "error", or "syntax error".
      described: the exception as the last line of a traceback.
    """

    def __init__(self, kind: str, described: str):
        super().__init__(described.partition(": ")[2])
        self.kind, self.described = kind, described

    def __str__(self) -> str:
        return str(self.args[0])  # a KeyError would quote it once more


@lru_cache
def _raised(name: str) -> type[ProgramError]:
    """ProgramError as an exception that a test can catch by its own name."""
    return type(name, (ProgramError, getattr(builtins, name)), {})


class Link:
    """The program's process as the tests see it.

    Attributes:
      namespace: the global names of the tests. The program may call the functions that are defined
        there if a test passes them, and no others.
    """

    def __init__(self, requests: int, replies: int):
        self.namespace: dict[str, Any] = {"__name__": "tests"}
        self._requests, self._replies = requests, replies
        self._remotes: dict[int, Remote] = {}
        self._functions: list[Callable[..., Any]] = []

    def ask(self, operation: str, *operands: Any) -> Any:
        """The result of an operation of `program.OPERATIONS`.

        Raises:
          ProgramError: the program raised an exception.
          rpc.Closed: the program has ended.
        """
        self._send(operation, *operands)
        return self.answer(containers([*operands[1:]]) if operation == "call" else ())

    def answer(self, arguments: Sequence[Any] = ()) -> Any:
        """The program's reply. Calls the functions of the tests that it asks for before.

        Args:
          arguments: the containers that were sent; the reply may change them.
        """
        while True:
            frame = rpc.receive(self._replies)
            kind, value, *more = rpc.unpack(frame, lambda handle: self._object(handle, arguments))
            if kind == "call back":
                self._call_back(value, *more)
                continue
            changes, *names = more or [{}]
            apply(changes, arguments)
            if kind is None:
                return value
            raise _program_error(kind, value, *names)

    def _send(self, *request: Any) -> None:
        file = io.BytesIO()
        try:
            _Packer(file, self.namespace, self._functions).dump(request)
        except (pickle.PicklingError, AttributeError, TypeError) as error:
            raise TypeError(f"a test passes what cannot be sent to the program: {error}") from None
        rpc.send(self._requests, file.getvalue())

    def _object(self, handle: int, arguments: Sequence[Any]) -> Any:
        """The object of a handle: always the same one, so that tests can compare by `is`."""
        if handle < 0:
            return arguments[-1 - handle]
        if handle not in self._remotes:
            self._remotes[handle] = Remote(self.ask, handle)
        return self._remotes[handle]

    def _call_back(self, number: int, args: Any, kwargs: Any) -> None:
        try:
            result = self._functions[number](*args, **kwargs)
        except Exception as error:
            name = _first_catchable([kind.__name__ for kind in type(error).__mro__])
            kind = StopIteration if isinstance(error, StopIteration) else getattr(builtins, name)
            self._send("returned", kind, str(error))
        else:
            self._send("returned", None, result)


def _program_error(kind: Any, described: Any, names: Any = ()) -> ProgramError:
    """The exception of a reply, which the program may have forged."""
    kind = "syntax error" if kind == "syntax error" else "error"
    if type(described) is not str:
        described = "no reason given"
    return _raised(_first_catchable(names))(kind, printable(described))


def _first_catchable(names: Any) -> str:
    return next((name for name in names if name in CATCHABLE), "Exception")


class _Packer(pickle.Pickler):
    """Writes a request. The program may see everything in it, but no code of the tests."""

    def __init__(
        self, file: io.BytesIO, namespace: dict[str, Any], functions: list[Callable[..., Any]]
    ):
        super().__init__(file, protocol=5)
        self._namespace, self._functions = namespace, functions

    def persistent_id(self, obj: Any) -> tuple[str, Any] | None:
        kind = type(obj)
        if kind is Remote:
            return "object", object.__getattribute__(obj, "_handle")
        if self._is_of_the_tests(obj):
            self._functions.append(obj)
            return "function", len(self._functions) - 1
        if kind is types.GeneratorType:
            self._functions.append(obj.__next__)
            return "generator", len(self._functions) - 1
        # A view, or a named tuple that the program returned: its type cannot be imported there.
        if isinstance(obj, _BY_FORM) and kind is not tuple and (form := form_of(obj)):
            return "value", form
        return None

    def _is_of_the_tests(self, obj: Any) -> bool:
        """Whether a call of this function runs in the runner: a function of the tests, or a method
        of a container of theirs, such as `seen.append`."""
        if type(obj) is types.FunctionType:
            return obj.__globals__ is self._namespace
        return type(obj) is types.BuiltinFunctionType and type(obj.__self__) in MUTABLE
