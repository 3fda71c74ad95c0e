"""The versions of the code on which the values of a run depend."""

import functools
import hashlib
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = ("moi_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


def code_versions() -> dict[str, str | None]:
    """The version of each package and of Python, and under "code" a fingerprint of this package."""
    return {
        **{name: _version(name) for name in PACKAGES},
        "code": _code_fingerprint(),
        "python": platform.python_version(),
    }


def code_commit() -> str | None:
    """The git commit of this package, "+ changes" if its files differ; None outside a checkout."""
    root = Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None

    def git(*words: str) -> str:
        done = subprocess.run(
            ["git", "-C", str(root), *words], capture_output=True, text=True, check=True
        )
        return done.stdout.strip()

    try:
        changes = " + changes" if git("status", "--porcelain", "--", "moi_jax") else ""
        return git("rev-parse", "HEAD") + changes
    except (OSError, subprocess.CalledProcessError):  # no git, or a repository of somebody else
        return None


@functools.cache
def _code_fingerprint() -> str:
    """16 hex digits of all Python files of this package."""
    root = Path(__file__).parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root).as_posix()}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:16]


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # a checkout that is not installed
        return None
