"""Isolates a process by Linux namespaces: processes, files, network, users and host name."""

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
# System call number and constants; glibc has a function for it only from 2.36 on.
MOUNT_SETATTR, AT_FDCWD, AT_RECURSIVE, MOUNT_ATTR_RDONLY = 442, -100, 0x8000, 1

NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
DIRECTORY = "/box"  # the directory of the program
FILES = 4096  # largest number of files in it: even an empty file needs memory


def enter(read_only: Sequence[str], limits: Mapping[str, int]) -> None:
    """Continues as the first process of new namespaces: as user nobody, in an empty directory.

    The calling process waits until this one ends. If the evaluation is killed, the calling process
    is killed too, and then this one. When the first process of a namespace ends, the kernel kills
    all others in it.

    Args:
      read_only: the files of the machine that are visible, at their own paths.
      limits: see backends.Limits.

    Raises:
      OSError: the kernel refuses.
    """
    _unshare()
    # Opened as the current user, because nobody cannot read below root's directories.
    sources: dict[str, int | str] = {}
    for path in (*read_only, *DEVICES):
        link = os.path.islink(path)
        sources[path] = os.readlink(path) if link else os.open(path, os.O_PATH)
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    call("prctl", PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
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
    """Enters new namespaces. Nobody inside is the user outside; for root it is nobody outside."""
    user, group = os.geteuid(), os.getegid()
    if user == 0:
        # The kernel's limit on processes does not apply to root, even under another name.
        user = group = NOBODY
        os.setgroups([])
    pid = os.getpid()
    unshared, done = os.pipe()
    # Only a process outside the namespace can write its user map.
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
    """Builds a root with the sources (open paths, or targets of links) and DIRECTORY, no /proc."""
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
    """Mounts the only writable directory: in memory, with limits on bytes and files."""
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
