"""The Hugging Face hub: published files come down, exported directories go up."""

import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from moi_jax.common.errors import UserError

INSTALL = "needs huggingface_hub: pip install 'moi_jax[hub]'"


def download(repository: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """The directory of a repository's files in the cache of huggingface_hub; fetches what it lacks.

    Where the hub cannot be reached, the files that were fetched before are used.

    Args:
      repository: OWNER/NAME.
      revision: a branch, tag or commit; None means the newest commit of main.
      patterns: which files at the top of the repository, such as "*.json".

    Returns:
      A directory that is named after the commit.

    Raises:
      UserError: huggingface_hub is not installed, or the hub does not give the files.
    """
    try:
        from huggingface_hub import snapshot_download
        from huggingface_hub.utils import disable_progress_bars
    except ImportError:
        raise UserError(
            f"there is no directory {repository}; to read it as a Hugging Face repository, moi_jax "
            f"{INSTALL}"
        ) from None
    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        directory = snapshot_download(
            repository,
            revision=revision,
            allow_patterns=list(patterns),
            ignore_patterns=["*/*"],
            library_name="moi_jax",
        )
    except Exception as error:  # among them all errors of its HTTP client
        raise UserError(
            f"there is no directory {repository}, and as a Hugging Face repository it cannot be "
            f"fetched: {_reason(error, revision)}"
        ) from None
    return Path(directory)


def _reason(error: Exception, revision: str | None) -> str:
    """Why the hub did not give the files, and what to do."""
    from huggingface_hub import errors

    if isinstance(error, errors.GatedRepoError):
        return "accept its terms on huggingface.co, and set HF_TOKEN to a token of your account"
    if isinstance(error, errors.RepositoryNotFoundError):
        return "the hub has no such repository, or it is private and HF_TOKEN is not set"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"it has no revision {revision}"
    return (
        f"{_one_line(error.__cause__ or error)}; check the network, or download it and give the "
        f"directory"
    )


def check_token() -> str:
    """The hub's token from the environment variable HF_TOKEN.

    Raises:
      UserError: it is not set, or huggingface_hub is not installed.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UserError(f"--push {INSTALL}") from None
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError(
            "--push needs a token with write access in the environment variable HF_TOKEN"
        )
    return token


def push(directory: Path, repository: str, private: bool) -> str:
    """Uploads a directory as a new model repository; returns its address.

    Raises:
      UserError: the hub refuses, for example because the repository exists.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub: Any = huggingface_hub.HfApi(token=check_token())
    try:
        # An existing repository is an error: its files are never overwritten.
        address = hub.create_repo(repository, private=private, exist_ok=False)
        hub.upload_folder(repo_id=repository, folder_path=directory)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        raise UserError(
            f"{directory} is written but was not uploaded as {repository}: {_one_line(error)}"
        ) from None
    return str(address)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
