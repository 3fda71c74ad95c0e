"""The backends that isolate a program, and the command that starts a runner in each."""

import os
import shutil
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from moi_jax.evaluation.sandbox.inside import namespaces
from moi_jax.evaluation.sandbox.packages import NONE, Packages

Backend = Literal["bubblewrap", "namespaces", "weak"]

# The path of this package within bubblewrap.
CODE = "/code"
_PACKAGE = Path(__file__).parent
_TOP = Path(__file__).parents[3]
_PYTHON = os.path.realpath(getattr(sys, "_base_executable", sys.executable))


@dataclass(frozen=True)
class Limits:
    """The limits of one program.

    Attributes:
      wall: seconds from the start of the program to the end of its tests. 3 as in
        openai/human-eval.
      cpu: seconds of processor time of each process.
      memory: bytes of address space of each process.
      processes: number of processes and threads; three belong to the sandbox. The program can use
        at most `processes` times `memory` bytes.
      file_size: bytes of one file.
      disk: bytes of all files.
      open_files: number for each process.
    """

    wall: float = 3.0
    cpu: int = 4
    memory: int = 512 << 20
    processes: int = 8
    file_size: int = 16 << 20
    disk: int = 64 << 20
    open_files: int = 64


def candidates() -> list[Backend]:
    """The backends that could enforce every limit on this machine, in order of preference."""
    if sys.platform != "linux":
        return []
    return ["bubblewrap", "namespaces"] if shutil.which("bwrap") else ["namespaces"]


def read_only(packages: Packages = NONE) -> list[str]:
    """The paths that a program can read: libraries of Python and the system, and links to them.

    The files of the packages are among them.
    """
    prefix = Path(sys.base_prefix)
    paths = [prefix / "lib", prefix / "lib64"]
    paths += [Path(p) for p in ("/usr/lib", "/usr/lib64", "/lib", "/lib64", "/etc/ld.so.cache")]
    paths += [Path(path) for path in packages.files]
    return [str(path) for path in dict.fromkeys(paths) if path.exists()]


def environment(directory: str) -> dict[str, str]:
    """The environment variables of a program. The hash seed is fixed, so set order is too."""
    libraries = str(Path(sys.base_prefix) / "lib")
    return {
        "HOME": directory,
        "TMPDIR": directory,
        "LANG": "C.UTF-8",
        "LD_LIBRARY_PATH": libraries,
        "PYTHONHASHSEED": "0",
        # Linear algebra in one thread: threads count as processes.
        "OPENBLAS_NUM_THREADS": "1",
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


def command(backend: Backend, packages: Packages = NONE) -> list[str]:
    """The command that starts a runner, see inside.runner.main.

    Raises:
      FileNotFoundError: bubblewrap is not installed.
    """
    top = CODE if backend == "bubblewrap" else str(_TOP)
    start = (
        f"import sys; sys.path.append({top!r}); "
        f"from moi_jax.evaluation.sandbox.inside.runner import main; sys.path.pop(); "
        f"main({backend!r})"
    )
    python = [_PYTHON, "-s", "-S", "-P", "-B", "-c", start]
    if backend != "bubblewrap":
        return python
    path = shutil.which("bwrap")
    if path is None:
        raise FileNotFoundError("bwrap is not on PATH")
    bwrap = [path, "--unshare-all", "--die-with-parent", "--new-session"]
    bwrap += [
        "--uid",
        str(namespaces.NOBODY),
        "--gid",
        str(namespaces.NOBODY),
        "--hostname",
        "sandbox",
    ]
    # The runner needs it to mount a directory with a limit on its files, then drops it.
    bwrap += ["--cap-add", "CAP_SYS_ADMIN"]
    for path in (*read_only(packages), _PYTHON):
        if os.path.islink(path):
            bwrap += ["--symlink", os.readlink(path), path]
        else:
            bwrap += ["--ro-bind", path, path]
    for device in namespaces.DEVICES:
        bwrap += ["--dev-bind", device, device]
    bwrap += ["--ro-bind", str(_PACKAGE), f"{CODE}/moi_jax/evaluation/sandbox"]
    return [*bwrap, "--dir", namespaces.DIRECTORY, "--remount-ro", "/", "--chdir", "/", *python]
