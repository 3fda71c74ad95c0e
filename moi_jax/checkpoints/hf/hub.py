"""Uploading an exported directory to the Hugging Face hub."""

import os
from pathlib import Path
from typing import Any

from moi_jax.common.errors import UserError


def check_token() -> str:
    """The hub's token from the environment variable HF_TOKEN.

    Raises:
      UserError: it is not set, or huggingface_hub is not installed.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UserError("--push needs huggingface_hub: pip install 'moi_jax[hub]'") from None
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
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{directory} is written but was not uploaded as {repository}: {reason}"
        ) from None
    return str(address)
