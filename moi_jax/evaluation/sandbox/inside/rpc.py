"""Remote calls between the runner and the program: plain data by value, the rest by handle.

The runner makes only values of built-in types and of a few types of the standard library (with
numpy allowed, also arrays), and `Remote` objects. So no method of the program ever runs in the
runner, not even its `__eq__` or `__bool__`.
"""

import io
import os
import pickle
from collections.abc import Callable, Mapping
from typing import Any

from moi_jax.evaluation.sandbox.inside.values import build, form_of

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
# Other types that the runner makes by their names. A forged pickle can set the attributes of what
# it names, so none of these types may be written in Python: its `__eq__` could be replaced. Values
# of other types go by a form, see `values`.
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
CONSTRUCTORS = VALUE_TYPES | {("builtins", kind.__name__) for kind in BUILT_IN}
_PLAIN = frozenset({*BUILT_IN, type(None)})


class Closed(BaseException):
    """The other process has ended. A test that expects an exception does not catch it."""


def send(fd: int, frame: bytes) -> None:
    """Writes a frame."""
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


def _name(kind: type) -> tuple[str, str]:
    return kind.__module__, kind.__qualname__


class _Packer(pickle.Pickler):
    def __init__(self, file: io.BytesIO, reference: Callable[[Any], Any]):
        super().__init__(file, protocol=5)
        self._reference = reference

    def persistent_id(self, obj: Any) -> Any:
        return self._reference(obj)

    def reducer_override(self, obj: Any) -> Any:
        """Sends an instance of a subclass of a built-in type as that type."""
        if type(obj) in BUILT_IN or _name(type(obj)) in VALUE_TYPES:
            return NotImplemented
        for base in BUILT_IN:
            if isinstance(obj, base):
                return base, (str.__str__(obj) if base is str else base(obj),)
        return NotImplemented


class _Unpacker(pickle.Unpickler):
    def __init__(self, frame: bytes, resolve: Callable[[Any], Any]):
        super().__init__(io.BytesIO(frame))
        self._resolve = resolve

    def persistent_load(self, reference: Any) -> Any:
        return self._resolve(reference)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in CONSTRUCTORS:
            raise pickle.UnpicklingError(f"{module}.{name} is not a plain value")
        return super().find_class(module, name)


def pack(
    value: Any, handle_of: Callable[[Any], int], places: Mapping[int, int] | None = None
) -> bytes:
    """A value as bytes, for the runner.

    Args:
      handle_of: gives the handle, from 0, of an object that is not passed by value.
      places: id of an argument of the call -> its place; it is passed as the handle -1 - place.
    """
    places = places or {}

    def reference(obj: Any) -> Any:
        if id(obj) in places:
            return -1 - places[id(obj)]
        if type(obj) in _PLAIN:  # nearly all objects
            return None
        form = form_of(obj)
        if form is not None:
            return form
        if isinstance(obj, BUILT_IN) or _name(type(obj)) in VALUE_TYPES:
            return None
        if isinstance(obj, type) and _name(obj) in CONSTRUCTORS:
            return None
        return handle_of(obj)

    file = io.BytesIO()
    _Packer(file, reference).dump(value)
    return file.getvalue()


def unpack(frame: bytes, object_of: Callable[[Any], Any]) -> Any:
    """The value that `pack` wrote. `object_of` gives the object of a handle."""

    def resolve(reference: Any) -> Any:
        return build(*reference) if type(reference) is tuple else object_of(reference)

    return _Unpacker(frame, resolve).load()
