"""Where a config or a command keeps something: a local path, or a URL of an object store.

Both are a `Path`. A Path writes gs://bucket/run as gs:/bucket/run; `location_text` writes it back.
Whatever works with files works on the local copy of a URL, see `staged_path`.
"""

import os
from pathlib import Path

from moi_jax.common.errors import UserError

SCHEMES = ("gs", "s3")
# The environment variable that names the folder of all local copies. It belongs to the machine, so
# it is no key of the config, which machines share.
STAGING_VARIABLE = "MOI_JAX_STAGING"
STAGING = Path("~/.cache/moi_jax/staging")


def is_url(place: Path) -> bool:
    """Whether it is a URL of an object store, and no local path."""
    return place.parts[:1] in [(f"{scheme}:",) for scheme in SCHEMES]


def location_text(place: Path) -> str:
    """The place as users write it."""
    if not is_url(place):
        return str(place)
    return f"{place.parts[0]}//{'/'.join(place.parts[1:])}"


def url_parts(place: Path) -> tuple[str, str, str]:
    """The scheme of a URL, its bucket, and the path in the bucket ("" for all of it).

    Raises:
      UserError: it names no bucket, or climbs out of it.
    """
    scheme, *parts = place.parts
    if not parts or ".." in parts:
        raise UserError(
            f"{location_text(place)} is no place in an object store; write "
            f"{scheme}//BUCKET/PATH, without '..'"
        )
    return scheme.removesuffix(":"), parts[0], "/".join(parts[1:])


def staged_path(place: Path, kind: str = "work") -> Path:
    """Where the local copy of a URL lies: $MOI_JAX_STAGING/<kind>/<scheme>/<bucket>/<path>.

    It may begin with ~, see `expand_home`.

    Args:
      kind: "work" is written here and sent to the store, "copies" were only fetched from there.
    """
    scheme, bucket, path = url_parts(place)
    root = Path(os.environ.get(STAGING_VARIABLE) or STAGING)
    return root / kind / scheme / bucket / path
