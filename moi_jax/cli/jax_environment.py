"""What a command that uses devices asks of jax, before jax is imported."""

import os
from contextlib import suppress
from pathlib import Path

from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.parallel.xla_flags import apply_flags, likely_platform


def prepare_jax(compilation_cache: Path | None) -> None:
    """Sets the flags of XLA and the place of compiled programs; the environment of the user wins.

    jax warns, and compiles, where it cannot read or write that place.

    Args:
      compilation_cache: None keeps no programs. A place in a home directory that nobody knows
        keeps none either. Of a URL it is the local copy, which is sent nowhere.
    """
    apply_flags(likely_platform())
    if compilation_cache is not None:
        with suppress(UserError):
            place = str(expand_home(compilation_cache))
            os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", place)
