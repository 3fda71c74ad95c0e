"""Values between the runner and the program: plain data by value, everything else by handle.

Whatever the program sends reaches the runner as values of built-in types or as a `Remote`, so no
method that the program wrote ever runs in the runner: not its `__eq__`, not its `__bool__`.
"""

import io
import os
import pickle
from collections.abc import Callable
from typing import Any

LARGEST = 1 << 26  # bytes of a frame

BUILT_IN: tuple[Any, ...] = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    tuple,
    list,
    dict,
    set,
    frozenset,
)
# What else is a value: instances of these pass, and the runner makes them anew by these names. All
# are written in C. To one in Python, such as Fraction, a forged pickle gives any attributes.
VALUE_TYPES = {
    ("builtins", "bytearray"),
    ("builtins", "range"),
    ("collections", "deque"),
    ("datetime", "date"),
    ("datetime", "datetime"),
    ("datetime", "time"),
    ("datetime", "timedelta"),
    ("datetime", "timezone"),
    ("decimal", "Decimal"),
}
_CONSTRUCTORS = VALUE_TYPES | {("builtins", kind.__name__) for kind in BUILT_IN}


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


class Closed(Exception):
    """The other side is gone."""


def send(fd: int, frame: bytes) -> None:
    """Writes a frame: its length in four bytes, then itself."""
    whole = memoryview(len(frame).to_bytes(4, "big") + frame)
    try:
        while whole:
            whole = whole[os.write(fd, whole) :]
    except BrokenPipeError:
        raise Closed from None


def receive(fd: int) -> bytes:
    """Reads one frame and not a byte more: what follows stays in the pipe."""
    length = int.from_bytes(_exactly(fd, 4), "big")
    if length > LARGEST:
        raise ValueError(f"a value of {length:,} bytes is too large to compare")
    return _exactly(fd, length)


def _exactly(fd: int, count: int) -> bytes:
    chunks = []
    while count:
        chunk = os.read(fd, min(count, 1 << 20))
        if not chunk:
            raise Closed
        chunks.append(chunk)
        count -= len(chunk)
    return b"".join(chunks)


class Remote:
    """An object of the program, in the runner: it can be called, iterated, read and written.

    Its attributes and results come over the wire; it equals nothing but itself.
    """

    __slots__ = ("_ask", "_handle")

    def __init__(self, ask: Callable[..., Any], handle: int):
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_handle", handle)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", self, args, kwargs)

    def __iter__(self) -> Any:
        return iter(self._ask("list", self))

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling look for such methods; they are not the program's to give.
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("set", self, name, value)


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, handle_of: Callable[[Any], int]):
        super().__init__(file, protocol=5)
        self._handle_of = handle_of

    def persistent_id(self, obj: Any) -> int | None:
        if obj is None or isinstance(obj, BUILT_IN) or _name(type(obj)) in VALUE_TYPES:
            return None
        if isinstance(obj, type) and _name(obj) in _CONSTRUCTORS:
            return None
        return self._handle_of(obj)

    def reducer_override(self, obj: Any) -> Any:
        """Instances of a subclass of a built-in type, such as named tuples, as that type."""
        if type(obj) in BUILT_IN:
            return NotImplemented
        for base in BUILT_IN:
            if isinstance(obj, base):
                return base, (str.__str__(obj) if base is str else base(obj),)
        return NotImplemented


class _Unpacker(pickle.Unpickler):
    def __init__(self, frame: bytes, object_of: Callable[[int], Any]):
        super().__init__(io.BytesIO(frame))
        self._object_of = object_of

    def persistent_load(self, handle: int) -> Any:
        return self._object_of(handle)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _CONSTRUCTORS:
            raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")
        return super().find_class(module, name)


def pack(value: Any, handle_of: Callable[[Any], int]) -> bytes:
    """A value as bytes; what is no plain value is asked of `handle_of`."""
    file = io.BytesIO()
    _Packer(file, handle_of).dump(value)
    return file.getvalue()


def unpack(frame: bytes, object_of: Callable[[int], Any]) -> Any:
    """The value of `pack`, with handles given to `object_of`."""
    return _Unpacker(frame, object_of).load()
