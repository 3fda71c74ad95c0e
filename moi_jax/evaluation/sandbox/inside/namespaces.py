"""A world of its own by Linux namespaces: processes, files, network, users, names."""

import os
import signal
import sys
from collections.abc import Mapping, Sequence

from moi_jax.evaluation.sandbox.inside.confine import call

CLONE_NEWNS, CLONE_NEWCGROUP, CLONE_NEWUTS, CLONE_NEWIPC = 0x20000, 0x2000000, 0x4000000, 0x8000000
CLONE_NEWUSER, CLONE_NEWPID, CLONE_NEWNET = 0x10000000, 0x20000000, 0x40000000
MS_NOSUID, MS_NODEV, MS_BIND, MS_REC, MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
MNT_DETACH = 2
PR_SET_PDEATHSIG = 1
# The C library has no function for it before glibc 2.36.
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1

NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
DIRECTORY = "/box"  # the program's
FILES = 4096  # in it: each takes memory, be it empty


def enter(read_only: Sequence[str], limits: Mapping[str, int]) -> None:
    """Goes on as the first process of new namespaces: as nobody, in an empty directory.

    The caller's own process stays behind until this one ends. When it is killed this one is too,
    and with a namespace's first process the kernel kills all others.

    Args:
      read_only: what of the machine's files is seen, at its own paths, and nothing else.
      limits: see backends.Limits.

    Raises:
      OSError: the kernel refuses.
    """
    _unshare()
    # Opened while this is still the user: nobody may not look below root's directories.
    sources: dict[str, int | str] = {}
    for path in (*read_only, *DEVICES):
        link = os.path.islink(path)
        sources[path] = os.readlink(path) if link else os.open(path, os.O_PATH)
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    parent_lives, held_by_parent = os.pipe()
    first = os.fork()
    if first:
        _, status = os.waitpid(first, 0)
        os._exit(status != 0)
    os.close(held_by_parent)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os.set_blocking(parent_lives, False)
    try:
        if os.read(parent_lives, 1) == b"":
            sys.exit("the parent was killed")
    except BlockingIOError:
        pass
    os.close(parent_lives)
    _build_root(sources, limits)
    call("sethostname", b"sandbox", len("sandbox"))


def _unshare() -> None:
    """Into new namespaces, where nobody is the user outside, or nobody there too for root."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        # The kernel's limit on processes does not bind root, by whatever name.
        user = group = NOBODY
        os.setgroups([])
    pid = os.getpid()
    unshared, done = os.pipe()
    # It is for a process outside to say who is who within.
    mapper = os.fork()
    if mapper == 0:
        try:
            os.close(done)
            os.read(unshared, 1)
            for name, line in (
                ("setgroups", "deny"),
                ("uid_map", f"{NOBODY} {user} 1"),
                ("gid_map", f"{NOBODY} {group} 1"),
            ):
                with open(f"/proc/{pid}/{name}", "w") as file:
                    file.write(line)
            os._exit(0)
        finally:
            os._exit(1)
    os.close(unshared)
    try:
        new = CLONE_NEWNS | CLONE_NEWCGROUP | CLONE_NEWUTS | CLONE_NEWIPC
        call("unshare", new | CLONE_NEWUSER | CLONE_NEWPID | CLONE_NEWNET)
    finally:
        os.close(done)
        _, status = os.waitpid(mapper, 0)
    if status:
        raise OSError("the user namespace's uid_map cannot be written")


def _build_root(sources: Mapping[str, int | str], limits: Mapping[str, int]) -> None:
    """A root of the sources (open paths, or what links point to) and DIRECTORY; no /proc either."""
    base = "/tmp"
    call("mount", None, b"/", None, MS_REC | MS_PRIVATE, None)
    _mount_tmpfs(base, f"size=1m,nr_inodes={FILES},mode=755")
    for path, source in sources.items():
        target = base + path
        os.makedirs(os.path.dirname(target), exist_ok=True)
        if isinstance(source, str):
            os.symlink(source, target)
            continue
        _bind(source, target)
        if path not in DEVICES:
            _set_read_only(target, AT_RECURSIVE)
    os.mkdir(base + DIRECTORY)
    mount_directory(base + DIRECTORY, limits)
    os.chdir(base)
    call("pivot_root", b".", b".")
    call("umount2", b".", MNT_DETACH)
    _set_read_only("/", 0)
    os.chdir(DIRECTORY)


def mount_directory(path: str, limits: Mapping[str, int]) -> None:
    """The one place that can be written: in memory, and it holds so much and no more."""
    _mount_tmpfs(path, f"size={limits['disk']},nr_inodes={FILES},mode=700")


def _mount_tmpfs(path: str, options: str) -> None:
    call("mount", b"tmpfs", path.encode(), b"tmpfs", MS_NOSUID | MS_NODEV, options.encode())


def _bind(source: int, target: str) -> None:
    path = f"/proc/self/fd/{source}"
    if os.path.isdir(path):
        os.mkdir(target)
    else:
        os.close(os.open(target, os.O_CREAT | os.O_WRONLY))
    call("mount", path.encode(), target.encode(), None, MS_BIND | MS_REC, None)
    os.close(source)


def _set_read_only(path: str, flags: int) -> None:
    attributes = (MOUNT_ATTR_RDONLY).to_bytes(8, "little") + bytes(24)
    call("syscall", MOUNT_SETATTR, AT_FDCWD, path.encode(), flags, attributes, len(attributes))
