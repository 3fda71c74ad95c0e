"""jax's store of keys and values, for threads that stand for processes."""

import threading

from jax.errors import JaxRuntimeError


class Store:
    """The part of the store that agreements and shared work use."""

    def __init__(self):
        self.values, self._changed = {}, threading.Condition()

    def key_value_set(self, key, value):
        with self._changed:
            if key in self.values:
                raise JaxRuntimeError("ALREADY_EXISTS")
            self.values[key] = value
            self._changed.notify_all()

    def key_value_try_get(self, key):
        if key not in self.values:
            raise JaxRuntimeError("NOT_FOUND")
        return self.values[key]

    def blocking_key_value_get(self, key, milliseconds):
        with self._changed:
            if not self._changed.wait_for(lambda: key in self.values, milliseconds / 1000):
                raise JaxRuntimeError("DEADLINE_EXCEEDED")
            return self.values[key]

    def blocking_key_value_get_bytes(self, key, milliseconds):
        return self.blocking_key_value_get(key, milliseconds).encode()

    def key_value_delete(self, key):
        for each in list(self.values):
            if each == key or each.startswith(f"{key}/"):
                del self.values[each]
