"""Joins this process to the others of a run on many hosts, and leaves them again."""

import ctypes
import logging
import os
import signal
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from moi_jax import config
from moi_jax.common.errors import LOST, UserError
from moi_jax.common.log import EVERY_HOST
from moi_jax.parallel import hosts
from moi_jax.parallel.agreed_stop import end_listeners
from moi_jax.parallel.cluster_environment import Place, find_place
from moi_jax.parallel.watch import Watch

log = logging.getLogger(__name__)

# jax watches the processes too, by the wall clock, which may jump, and crashes the process. Ours
# names the lost one. This many seconds are never over.
NEVER = 10**7
# How long a coordinator that is there may take to accept a connection, in seconds.
ACCEPTS = 3


def join(
    coordinator: str | None, count: int | None, index: int | None, timeouts: config.Cluster
) -> None:
    """Joins the processes of this run, if there are others. Call it before jax is used.

    Without arguments the others are found as the cluster describes them.

    Args:
      coordinator: host:port where process 0 is found.
      count, index: how many processes there are, and which of them this is.

    Raises:
      UserError: the arguments are wrong, or process 0 cannot use its address.
    """
    place = find_place(coordinator, count, index, timeouts.join_seconds)
    if place is None:
        return
    import jax
    from jax._src import distributed  # its store of keys and values has no public name

    # It would take SIGTERM away from the handlers of ours, which agree on a stop in the same way.
    jax.config.update("jax_enable_preemption_service", False)
    me = f"process {place.index} of {place.count} on {socket.gethostname()}"
    with _within(timeouts.join_seconds, _not_joined(me, place, timeouts.join_seconds)):
        try:
            jax.distributed.initialize(
                place.coordinator,
                place.count,
                place.index,
                local_device_ids=place.local_devices,
                cluster_detection_method="deactivate",
                initialization_timeout=NEVER,
                heartbeat_timeout_seconds=NEVER,
                shutdown_timeout_seconds=timeouts.lost_seconds,
            )
        except (RuntimeError, ValueError) as error:
            why = " ".join(str(error).split())[:200]
            raise UserError(f"{me} cannot join the others at {place.coordinator}: {why}") from None
        store: Any = distributed.global_state.client
        names = _exchange_names(store, place)
    watch = Watch(store, place.index, names, timeouts.lost_seconds)
    _end_on_abort(place.coordinator, watch)
    hosts.enter(hosts.Hosts(store, place.index, names, watch))
    devices = jax.local_devices()
    log.info(
        f"{me}: {len(devices)} of {jax.device_count()} {devices[0].platform} devices; process 0 is "
        f"at {place.coordinator} ({place.found_by})",
        extra={EVERY_HOST: True},
    )


def leave() -> None:
    """Leaves the others at the end of the work, when all of them are at their end."""
    if joined := hosts.joined():
        import jax

        hosts.wait_for_all("the end")
        joined.watch.stop()
        end_listeners()
        signal.signal(signal.SIGABRT, signal.SIG_DFL)
        jax.distributed.shutdown()
        hosts.enter(None)


def _exchange_names(store: Any, place: Place) -> list[str]:
    """The names of all processes, with their hosts, as messages show them."""
    store.key_value_set(f"moi_jax/host/{place.index}", socket.gethostname())
    found = []
    for number in range(place.count):
        host = None
        while host is None:
            with hosts.suppress_no_answer():
                host = store.blocking_key_value_get(f"moi_jax/host/{number}", 1000)
        found.append(f"process {number} ({host})")
    return found


@contextmanager
def _within(seconds: int, message: str) -> Iterator[None]:
    """Ends the process with the message if the block takes longer."""

    def end() -> None:
        os.write(2, f"error: {message}\n".encode(errors="backslashreplace"))
        os._exit(LOST)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _not_joined(me: str, place: Place, seconds: int) -> str:
    if place.index == 0:
        return (
            f"{me} waited {seconds} s at {place.coordinator}, and not all the others came; see "
            f"that they were started and reach this address; a config may set cluster.join_seconds"
        )
    return (
        f"{me} could not join the others at {place.coordinator} within {seconds} s; see that all "
        f"were started and that this is process 0's address; a config may set cluster.join_seconds"
    )


def _end_on_abort(coordinator: str, watch: Watch) -> None:
    """Lets a process that jax aborts, since another one is gone, say so and end in order.

    jax aborts it from a thread of its own, and no handler of Python's `signal` would run then.
    """
    host, _, port = coordinator.rpartition(":")

    def on_abort(_: int) -> None:
        signal.alarm(ACCEPTS + 5)  # whatever happens here, the process ends
        try:
            socket.create_connection((host.strip("[]"), int(port)), ACCEPTS).close()
        except OSError:
            watch.end_without_coordinator("its connection is closed")
        watch.end_after_abort()

    global _handler
    _handler = ctypes.CFUNCTYPE(None, ctypes.c_int)(on_abort)
    ctypes.CDLL(None).signal(signal.SIGABRT, _handler)


_handler: Any = None  # Python must not free it
