"""Paths that begin with ~, and those of an object store: the local path that they stand for."""

from pathlib import Path

from moi_jax.common.errors import UserError
from moi_jax.common.locations import is_url, staged_path


def expand_home(path: Path) -> Path:
    """`path` with the home directory in the place of a leading ~ or ~name.

    A URL of an object store becomes the path of its local copy, see `locations`.

    Raises:
      UserError: nobody knows the home directory, as in a container whose user has no name.
    """
    if is_url(path):
        path = staged_path(path)
    try:
        return path.expanduser()
    except RuntimeError:
        raise UserError(
            f"{path} begins in a home directory that is not known; write the whole path, or set "
            f"the environment variable HOME"
        ) from None
