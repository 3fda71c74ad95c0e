"""Uploading an exported directory to the Hugging Face hub, for those who ask for it."""

import os
from pathlib import Path
from typing import Any

from moi_jax.common.errors import UserError


def check_token() -> str:
    """The token of the environment.

    Raises:
      UserError: there is none, or the client is not installed.
    """
    try:
        import huggingface_hub  # noqa: F401
    except ImportError:
        raise UserError("--push needs huggingface_hub: pip install 'moi_jax[hub]'") from None
    token = os.environ.get("HF_TOKEN")
    if not token:
        raise UserError("--push needs the environment's HF_TOKEN, a token that may write")
    return token


def push(directory: Path, repository: str, private: bool) -> str:
    """Uploads a directory as a new repository of models; returns its address.

    Raises:
      UserError: the hub refuses, for one because the repository exists.
    """
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    hub: Any = huggingface_hub.HfApi(token=check_token())
    try:
        # Another's files are not written over: a repository that exists is an error.
        address = hub.create_repo(repository, private=private, exist_ok=False)
        hub.upload_folder(repo_id=repository, folder_path=directory)
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{directory} is written, but was not uploaded as {repository}: {reason}"
        ) from None
    return str(address)
