"""Where published files are: a directory, a .gguf file, or a repository of the Hugging Face hub."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from moi_jax.checkpoints.hf.hub import download
from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home

# OWNER/NAME, or OWNER/NAME@REVISION.
HUB_ID = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(\S+))?", re.ASCII)
HUB_FORM = "the id of a Hugging Face repository (OWNER/NAME or OWNER/NAME@REVISION)"

# Configuration, tokenizer, chat template, card and licences: everything except the weights.
COMPANIONS = (
    *("*.json", "*.txt", "*.md", "*.jinja", "*.tiktoken"),
    *("*LICENSE*", "*LICENCE*", "*NOTICE*", "*COPYING*"),
)
WEIGHTS = ("*.safetensors",)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PublishedSource:
    """Published files.

    Attributes:
      path: the directory or the .gguf file. For a repository, the directory of its files.
      base: the name under which they are published: of the directory or file, or OWNER/NAME.
      commit: of the repository; None for local files.
    """

    path: Path
    base: str
    commit: str | None = None

    @property
    def pinned(self) -> Path | None:
        """The id of a repository with the commit that was read; None for local files."""
        return Path(f"{self.base}@{self.commit}") if self.commit else None

    @property
    def weight_files(self) -> list[Path]:
        """The local files that hold weights."""
        return [self.path] if self.path.is_file() else sorted(self.path.glob("*.safetensors"))

    def fetch_weights(self) -> None:
        """Fetches the weights of a repository; local ones are there.

        Raises:
          UserError: the hub does not give them.
        """
        if not self.commit:
            return
        download(self.base, self.commit, WEIGHTS)
        if not self.weight_files:  # without a network, what was fetched before is used
            raise UserError(
                f"the weights of {self.base} at {self.commit} cannot be fetched; check the "
                f"network, and whether the repository has .safetensors files"
            )


def find_source(named: Path) -> PublishedSource:
    """What a path or an id of the hub names. Of a repository, all but the weights is fetched.

    A local file or directory wins over a repository of the same name.

    Raises:
      UserError: it is the id of a repository that cannot be fetched.
    """
    local = expand_home(named)
    match = HUB_ID.fullmatch(str(named))
    if local.exists() or not match:
        return PublishedSource(local, local.resolve().name)
    base, revision = match.groups()
    path = download(base, revision, COMPANIONS)
    log.info(f"{base}: read configuration and tokenizer at commit {path.name}")
    return PublishedSource(path, base, path.name)
