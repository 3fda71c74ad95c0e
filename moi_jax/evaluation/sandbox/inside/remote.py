"""What the runner has of an object that stays with the program."""

from collections.abc import Callable
from typing import Any


def _asks(operation: str) -> Callable[..., Any]:
    """A method that the program carries out, see `program.OPERATIONS`."""

    def method(self: "Remote", *args: Any) -> Any:
        return self._ask(operation, self, *args)

    return method


def _asks_once(operation: str) -> Callable[..., Any]:
    """As `_asks`, but the first answer holds. A number that changed from one use to the next could
    fulfil any equation."""

    def method(self: "Remote") -> Any:
        if operation not in self._numbers:
            self._numbers[operation] = self._ask(operation, self)
        return self._numbers[operation]

    return method


def _compares(operation: str) -> Callable[..., Any]:
    def method(self: "Remote", other: Any) -> Any:
        return self._ask(operation, self, other) if type(other) is Remote else NotImplemented

    return method


class Remote:
    """A handle of an object of the program.

    What a test does with it is a request to the program, and the result is compared here. The
    other side of a comparison is never sent, so a `Remote` equals no plain value. Two objects of
    the program are compared by the program: it could as well return equal values.
    """

    __slots__ = ("_ask", "_handle", "_numbers")

    def __init__(self, ask: Callable[..., Any], handle: int):
        object.__setattr__(self, "_ask", ask)
        object.__setattr__(self, "_handle", handle)
        object.__setattr__(self, "_numbers", {})

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._ask("call", self, args, kwargs)

    def __getattr__(self, name: str) -> Any:
        # Copying and pickling look for these methods; the program must not define them.
        if name.startswith("__"):
            raise AttributeError(name)
        return self._ask("getattr", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._ask("setattr", self, name, value)

    def __iter__(self) -> Any:
        """All items of a collection; those of an iterator one by one, for it may be endless."""
        items = self._ask("items", self)
        return self if items is None else iter(items)

    def __next__(self) -> Any:
        item = self._ask("next", self)
        if item is None:
            raise StopIteration
        return item[0]

    def __instancecheck__(self, instance: Any) -> bool:
        return type(instance) is Remote and self._ask("isinstance", instance, self)

    __len__ = _asks("len")
    __getitem__ = _asks("getitem")
    __setitem__ = _asks("setitem")
    __delitem__ = _asks("delitem")
    __bool__ = _asks("bool")
    __int__ = _asks_once("int")
    __float__ = _asks_once("float")
    __index__ = _asks_once("index")
    __str__ = _asks("str")
    __repr__ = _asks("repr")
    __hash__ = _asks("hash")
    __eq__ = _compares("eq")
    __lt__ = _compares("lt")
    __le__ = _compares("le")
    __gt__ = _compares("gt")
    __ge__ = _compares("ge")
