"""What a call changes in its arguments: found in the program's process, applied in the runner.

Both sides list the containers of the arguments in the same order, so a place in the list names a
container on either side.
"""

from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Mapping, Sequence
from operator import is_
from typing import Any

_MAPPINGS = (dict, Counter, OrderedDict, defaultdict)
_SEQUENCES = (list, deque)
MUTABLE = frozenset({*_MAPPINGS, *_SEQUENCES, set, bytearray})
_CONTAINERS = MUTABLE | {tuple}


def containers(value: Any) -> list[Any]:
    """The containers in a value, each once; tuples are among them, since they may hold others."""
    found: dict[int, Any] = {}
    waiting = [value]
    while waiting:
        obj = waiting.pop()
        kind = type(obj)
        if kind not in _CONTAINERS or id(obj) in found:
            continue
        found[id(obj)] = obj
        if kind in _MAPPINGS:
            waiting.extend(obj.values())
        elif kind in _SEQUENCES or kind is tuple:
            waiting.extend(obj)
    return list(found.values())


class Watched:
    """The containers in the arguments of a call, as they were before it."""

    def __init__(self, value: Any):
        self.containers = containers(value)
        self.places = {id(obj): place for place, obj in enumerate(self.containers)}
        self._before = [_content(obj) for obj in self.containers]

    def changes(self) -> dict[int, Any]:
        """Place -> content of each container that has another content than before."""
        now = enumerate(map(_content, self.containers))
        return {place: content for place, content in now if not _same(self._before[place], content)}


def _content(obj: Any) -> Any:
    kind = type(obj)
    if kind in _MAPPINGS:
        return dict(obj)
    if kind in _SEQUENCES:
        return list(obj)
    return bytes(obj) if kind is bytearray else kind(obj)


def _same(before: Any, now: Any) -> bool:
    """Whether two contents hold the same objects. Methods of the objects are not called."""
    if type(now) is dict:
        return _same([*before, *before.values()], [*now, *now.values()])
    if type(now) is set:
        return set(map(id, before)) == set(map(id, now))
    if type(now) is bytes:
        return before == now
    return len(before) == len(now) and all(map(is_, before, now))


def apply(changes: Mapping[int, Any], targets: Sequence[Any]) -> None:
    """Gives the containers their new content. The program may have forged the changes.

    Raises:
      ValueError, IndexError: a change does not fit its container.
    """
    for place, content in changes.items():
        target = targets[place]
        kind = type(target)
        if (kind in _MAPPINGS and type(content) is dict) or (kind is set and type(content) is set):
            target.clear()
            target.update(content)
        elif kind in _SEQUENCES and type(content) is list:
            target.clear()
            target.extend(content)
        elif kind is bytearray and type(content) is bytes:
            target[:] = content
        else:
            raise ValueError("a change of an argument does not fit it")
