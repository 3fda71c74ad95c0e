"""Paths that begin with ~."""

from pathlib import Path

from moi_jax.common.errors import UserError


def expand_home(path: Path) -> Path:
    """`path` with the home directory in the place of a leading ~ or ~name.

    Raises:
      UserError: nobody knows the home directory, as in a container whose user has no name.
    """
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(
            f"{path} begins in a home directory that is not known; write the whole path, or set "
            f"the environment variable HOME"
        ) from None
