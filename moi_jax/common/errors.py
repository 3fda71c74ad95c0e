"""Errors that a user can fix, each in one line, and the reasons that the system gives."""

import errno
import os
import re
import shutil
from pathlib import Path

from rich.filesize import decimal

# The exit status of a process that ends because another host is lost, a step is stuck, or an object
# store does not answer. The same command, given again, goes on. It is EX_TEMPFAIL of sysexits.h.
LOST = 75
FULL = (errno.ENOSPC, errno.EDQUOT)
# How libraries say it: the system, tensorstore and ArrayRecord, and numpy ("9 requested and 4
# written").
FULL_TEXTS = ("No space left", "Disk quota exceeded", "requested and")


class UserError(Exception):
    """A mistake that the user can fix; its one-line message says what is wrong and what to do.

    Attributes:
      exit_status: of a command that ends with it.
    """

    exit_status = 2


class Unreachable(UserError):
    """What passes without the user: the same command, given again later, goes on."""

    exit_status = LOST


def cannot_write(path: Path, error: Exception) -> UserError:
    """The error for a failed write that left nothing behind."""
    return UserError(f"cannot write {path}: {reason(error)}; nothing was left behind")


def reason(error: Exception, directory: Path | None = None, needed: int = 0) -> str:
    """The system's reason for an error, also where a library wraps it.

    Args:
      directory: if the disk is full, the reason says what is free there. It need not exist.
      needed: about how many bytes were to be written there, if that is known.
    """
    if not is_full(error):
        if number := re.search(r"os_error_code='(\d+)'", str(error)):  # of tensorstore
            return os.strerror(int(number[1]))
        return (isinstance(error, OSError) and error.strerror) or " ".join(str(error).split())[:200]
    sizes = [f"about {decimal(needed)} are needed"] * bool(needed)
    quota = "quota" in str(error)
    if directory and not quota:
        existing = next(path for path in (directory, *directory.parents) if path.exists())
        sizes.append(f"{decimal(shutil.disk_usage(existing).free)} are free")
    what = "your disk quota is used up" if quota else "no space left on the device"
    return what + f" ({', '.join(sizes)})" * bool(sizes)


def is_full(error: Exception) -> bool:
    """Whether a write failed because the disk, or the user's share of it, is full."""
    if isinstance(error, OSError) and error.errno in FULL:
        return True
    return any(text in str(error) for text in FULL_TEXTS)
