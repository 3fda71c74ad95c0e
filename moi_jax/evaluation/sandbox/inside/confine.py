"""What a process gives up for good: resources, capabilities, and system calls."""

import ctypes
import os
import resource
from collections.abc import Mapping
from contextlib import suppress

PR_SET_DUMPABLE, PR_SET_SECCOMP, PR_SET_NO_NEW_PRIVS = 4, 22, 38
SECCOMP_MODE_FILTER = 2
CAPABILITY_VERSION_3 = 0x20080522

# Refused with EPERM: memory that no limit counts, other processes' memory, new namespaces (with
# their own unlimited tmpfs), sockets (those to a virtual machine's host know no namespace), and
# calls that have no use here but to attack the kernel. The numbers on x86_64 and aarch64.
REFUSED = {
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
    """Binds this process and all it starts.

    Args:
      limits: see backends.Limits.
      strict: whether every limit must hold. Otherwise what the system lacks is left out, the
        number of processes (elsewhere it counts all of the user's) and the system calls too.

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
    # SIGXCPU, which a program may ignore, and a second later SIGKILL, which it may not.
    _limit("RLIMIT_CPU", limits["cpu"], limits["cpu"] + 1, strict)
    if hasattr(libc, "prctl"):
        call("prctl", PR_SET_DUMPABLE, 0, 0, 0, 0)
        call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
        # Those of root would let a program read the runner's memory, where the nonce is.
        _drop_capabilities()
    if strict:
        _filter_system_calls()


def _limit(name: str, soft: int, hard: int, strict: bool) -> None:
    with suppress(*() if strict else (AttributeError, ValueError, OSError)):
        resource.setrlimit(getattr(resource, name), (soft, hard))


def _drop_capabilities() -> None:
    header = (ctypes.c_uint32 * 2)(CAPABILITY_VERSION_3, 0)
    call("capset", header, (ctypes.c_uint32 * 6)())


def _filter_system_calls() -> None:
    """A seccomp filter. It is read top down; a jump counts the instructions it passes over."""
    machine = os.uname().machine
    if machine not in MACHINES:
        raise OSError(f"system calls of {machine} are not known")
    architecture, column = MACHINES[machine]
    program = [
        (_LOAD, 0, 0, 4),  # the architecture
        (_EQUAL, 1, 0, architecture),
        (_RETURN, 0, 0, _KILL),
        (_LOAD, 0, 0, 0),  # the number
    ]
    if machine == "x86_64":  # the x32 calls have numbers of their own
        program += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _EPERM)]
    for numbers in REFUSED.values():
        program += [(_EQUAL, 0, 1, numbers[column]), (_RETURN, 0, 0, _EPERM)]
    program += [
        # Its flags are in memory, where a filter cannot look; libraries then fall back to clone.
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
