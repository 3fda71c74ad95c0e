"""Restricts a process permanently: resources, capabilities and system calls."""

import ctypes
import os
import resource
import signal
from collections.abc import Mapping
from contextlib import suppress

PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_CHILD_SUBREAPER, PR_SET_NO_NEW_PRIVS = 4, 22, 36, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522

# System calls that are refused with EPERM: memory that no limit counts, memory of other processes,
# new namespaces (with an unlimited tmpfs), sockets (a namespace does not block those to the host of
# a virtual machine), what the kernel counts for the whole user or machine, and calls that are only
# useful to attack the kernel. Numbers on x86_64 and aarch64; None where there is no such call.
REFUSED: dict[str, tuple[int, int | None]] = {
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "msgget": (68, 186),
    "semget": (64, 190),
    "mq_open": (240, 180),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "pidfd_getfd": (438, 438),
    "unshare": (272, 97),
    "setns": (308, 268),
    "socket": (41, 198),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "userfaultfd": (323, 282),
    "io_uring_setup": (425, 425),
    "io_setup": (206, 0),
    "inotify_init": (253, None),
    "inotify_init1": (294, 26),
    "fanotify_init": (300, 262),
}
CLONE = (56, 220)
CLONE3 = 435
CLONE_NEW_NAMESPACES = 0x7E020080
MACHINES = {"x86_64": (0xC000003E, 0), "aarch64": (0xC00000B7, 1)}

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL, _EPERM, _ENOSYS = 0x7FFF0000, 0x80000000, 0x00050001, 0x00050026

libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: object) -> int:
    """Calls a function of the C library.

    Raises:
      OSError: it failed; the message names the function.
    """
    result = getattr(libc, name)(*args)
    if result < 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")
    return result


def confine(limits: Mapping[str, int], strict: bool) -> None:
    """Restricts this process and every process that it starts.

    Args:
      limits: see backends.Limits.
      strict: whether every limit must hold. Otherwise limits that the system lacks are left out,
        and so are the limits on processes (outside a namespace all of the user's processes count)
        and on system calls.

    Raises:
      OSError: a limit could not be set.
    """
    per_process = {
        "RLIMIT_AS": limits["memory"],
        "RLIMIT_FSIZE": limits["file_size"],
        "RLIMIT_NOFILE": limits["open_files"],
        "RLIMIT_CORE": 0,
    }
    if strict:
        per_process["RLIMIT_NPROC"] = limits["processes"]
        per_process["RLIMIT_SIGPENDING"] = 256
        per_process["RLIMIT_MEMLOCK"] = 0
        per_process["RLIMIT_MSGQUEUE"] = 0
    for name, limit in per_process.items():
        _limit(name, limit, limit, strict)
    # First SIGXCPU, which a program may ignore; a second later SIGKILL, which it cannot ignore.
    _limit("RLIMIT_CPU", limits["cpu"], limits["cpu"] + 1, strict)
    if hasattr(libc, "prctl"):
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # With root's capabilities a program could read the nonce in the runner's memory.
        _drop_capabilities()
    if strict:
        _filter_system_calls()


def adopt_orphans() -> None:
    """Makes what the program's processes leave running children of this process, on Linux."""
    if hasattr(libc, "prctl"):
        call("prctl", PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def end_children() -> None:
    """Kills the children of this process, and theirs, where the system lists them."""
    path = f"/proc/self/task/{os.getpid()}/children"
    with suppress(OSError):
        while children := _words(path):
            for child in map(int, children):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)


def _words(path: str) -> list[str]:
    with open(path) as file:
        return file.read().split()


def _limit(name: str, soft: int, hard: int, strict: bool) -> None:
    with suppress(*() if strict else (AttributeError, ValueError, OSError)):
        resource.setrlimit(getattr(resource, name), (soft, hard))


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())


def _filter_system_calls() -> None:
    """Installs a seccomp filter. It runs from the top; a jump skips that many instructions."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"the system calls of {machine} are not known")
    architecture, column = MACHINES[machine]
    program = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number
    ]
    if machine == "x86_64":  # x32 calls have other numbers
        program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _EPERM)]
    for numbers in REFUSED.values():
        if (number := numbers[column]) is not None:
            program += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _EPERM)]
    program += [
        # A filter cannot read its flags, which are in memory; libraries fall back to clone.
        (_EQUAL, 0, 1, CLONE3),
        (_RETURN, 0, 0, _ENOSYS),
        (_EQUAL, 0, 3, CLONE[column]),
        (_LOAD, 0, 0, 16),  # the first argument's lower half
        (_ANY_BIT, 0, 1, CLONE_NEW_NAMESPACES),
        (_RETURN, 0, 0, _EPERM),
        (_RETURN, 0, 0, _ALLOW),
    ]

    class Instruction(ctypes.Structure):
        _fields_ = [
            ("code", ctypes.c_uint16),
            ("if_true", ctypes.c_uint8),
            ("if_false", ctypes.c_uint8),
            ("value", ctypes.c_uint32),
        ]

    class Filter(ctypes.Structure):
        _fields_ = [("length", ctypes.c_uint16), ("program", ctypes.POINTER(Instruction))]

    instructions = (Instruction * len(program))(*(Instruction(*line) for line in program))
    whole = Filter(len(program), instructions)
    call("prctl", PR_SET_SECCOMP, SECCOMP_MODE_FILTER, ctypes.byref(whole), 0, 0)
