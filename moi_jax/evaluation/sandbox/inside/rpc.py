"""Remote calls between the runner and the program: plain data by value, the rest by handle.

The runner receives only values of built-in types and `Remote` objects. So no method of the program
ever runs in the runner, not even its `__eq__` or `__bool__`.
"""

import io
import os
import pickle
from collections.abc import Callable
from typing import Any

LARGEST = 1 << 26  # bytes of a frame at most

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
# Other types that are passed by value. The runner makes their instances by these names. All of them
# are written in C: a forged pickle could set any attribute of a type in Python, such as Fraction.
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
    """The other process has ended."""


def send(fd: int, frame: bytes) -> None:
    """Writes a frame: its length in four bytes, then its content."""
    whole = memoryview(len(frame).to_bytes(4, "big") + frame)
    try:
        while whole:
            whole = whole[os.write(fd, whole) :]
    except BrokenPipeError:
        raise Closed from None


def receive(fd: int) -> bytes:
    """Reads exactly one frame; the bytes after it stay in the pipe."""
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
    """A handle of an object of the program. It can be called and iterated.

    Calls and attributes are requests to the program. A `Remote` equals only itself.
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
        # Copying and pickling look for these methods; the program must not define them.
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
        """Sends an instance of a subclass of a built-in type, e.g. a named tuple, as that type."""
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
    """A value as bytes. `handle_of` gives the handle of an object that is not a plain value."""
    file = io.BytesIO()
    _Packer(file, handle_of).dump(value)
    return file.getvalue()


def unpack(frame: bytes, object_of: Callable[[int], Any]) -> Any:
    """The value that `pack` wrote. `object_of` gives the object of a handle."""
    return _Unpacker(frame, object_of).load()
