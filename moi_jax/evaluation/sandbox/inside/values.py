"""Objects that are passed by value although their type cannot be named in a pickle."""

import collections
import fractions
import functools
import pickle
import sys
from collections.abc import Callable
from typing import Any

VIEWS: dict[str, Any] = {
    "keys": type({}.keys()),
    "values": type({}.values()),
    "items": type({}.items()),
}
_ARRAYS = "biufcSU"  # the kinds of numpy arrays without objects


class Fraction(fractions.Fraction):
    """A fraction whose attributes no pickle can set, for example a denominator of 0."""

    __slots__ = ()

    def __setstate__(self, state: object) -> None:
        raise pickle.UnpicklingError("a fraction has no state")


def form_of(obj: Any) -> tuple[Any, ...] | None:
    """How an object that is not a plain value is written, for `build`; None for other objects."""
    kind = type(obj)
    if isinstance(obj, fractions.Fraction):
        return "fraction", obj.numerator, obj.denominator
    if isinstance(obj, collections.Counter):
        return "counter", dict(obj)
    if isinstance(obj, collections.OrderedDict):
        return "ordered", dict(obj)
    if isinstance(obj, collections.defaultdict):
        return "default", obj.default_factory, dict(obj)
    if isinstance(obj, tuple) and kind is not tuple and hasattr(kind, "_fields"):
        return "record", kind.__name__, tuple(kind._fields), tuple(obj)
    for name, view in VIEWS.items():
        if isinstance(obj, view):
            return "view", name, list(obj)
    for wrapper, base in _WRAPPERS.items():
        if isinstance(obj, wrapper):
            return "plain", base(obj.data)
    if sys.modules.get("numpy") is not None:
        return _form_of_numpy(obj)
    return None


_WRAPPERS: dict[Any, Callable[[Any], Any]] = {
    collections.UserList: list,
    collections.UserDict: dict,
    collections.UserString: str,
}


def _form_of_numpy(obj: Any) -> tuple[Any, ...] | None:
    import numpy as np

    if isinstance(obj, np.generic):
        value = obj.item()
        return "plain", float(value) if isinstance(value, np.generic) else value
    if type(obj) is np.ndarray and obj.dtype.kind in _ARRAYS:
        return "array", obj.dtype.str, obj.shape, obj.tobytes()
    return None


def build(form: str, *parts: Any) -> Any:
    """The value that `form_of` described. The program may have forged it.

    Raises:
      ValueError: it is not the description of a value.
    """
    match form, *parts:
        case "fraction", int(numerator), int(denominator):
            return Fraction(numerator, denominator)
        # A forged pickle can set attributes of the next two. They hide methods, but a comparison
        # does not look them up.
        case "counter", dict(counts):
            return collections.Counter(counts)
        case "ordered", dict(items):
            return collections.OrderedDict(items)
        case "default", factory, dict(items):
            return collections.defaultdict(factory, items)
        case "record", str(name), tuple(fields), tuple(values):
            return _record(name, fields)(*values)
        case "view", "keys", list(keys):
            return dict.fromkeys(keys).keys()
        case "view", "values", list(values):
            return dict(enumerate(values)).values()
        case "view", "items", list(items):
            return dict(items).items()
        case "plain", value:
            return value
        case "array", str(dtype), tuple(shape), bytes(data):
            import numpy as np

            return np.frombuffer(data, dtype).reshape(shape).copy()
    raise ValueError(f"{form!r} is not the form of a value")


@functools.lru_cache
def _record(name: str, fields: tuple[str, ...]) -> Any:
    """A type of named tuples, whose fields cannot hide a method.

    namedtuple() gives a field with an underscore in front the name of its place, such as "_0". The
    program has such fields only if it asked for these names.
    """
    return collections.namedtuple(name, fields, rename=True)
