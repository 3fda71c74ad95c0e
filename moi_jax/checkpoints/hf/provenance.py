"""Where published weights come from: base, licence, and the files that must go with them."""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from moi_jax.checkpoints.hf.safetensors_reader import read_bytes
from moi_jax.checkpoints.hf.source import PublishedSource

# LICENSE, LICENSE.txt, NOTICE.md, USE_POLICY.md, "Tongyi Qianwen LICENSE AGREEMENT", ...
_CARRIED = re.compile(r"licen[cs]e|notice|copying|use_policy", re.IGNORECASE)


def read_provenance(source: PublishedSource, token_ids: Mapping[str, Any]) -> dict[str, Any]:
    """The provenance item of a checkpoint that is made from `source`.

    Args:
      token_ids: bos_token_id and the like, of config.json.

    Returns:
      base (name of the source), commit (of a repository of the hub, or None), license (from its
      model card, or None), files (name -> text of licence and notice files), generation_config
      (or None), token_ids.

    Raises:
      UserError: one of the files cannot be read.
    """
    directory = source.path if source.path.is_dir() else source.path.parent
    card = _card(directory / "README.md")
    license_name = card.get("license_name") or card.get("license")
    generation = directory / "generation_config.json"
    return {
        "base": source.base,
        "commit": source.commit,
        "license": str(license_name) if license_name else None,
        "files": {
            path.name: read_bytes(path).decode(errors="replace")
            for path in sorted(directory.iterdir())
            if path.is_file() and _CARRIED.search(path.name)
        },
        "generation_config": _json_object(generation),
        "token_ids": dict(token_ids),
    }


def _card(path: Path) -> dict[str, Any]:
    """The front matter of a model card; empty if there is none or it is invalid."""
    if not path.is_file():
        return {}
    text = read_bytes(path).decode(errors="replace")
    head = re.match(r"---\s*\n(.*?)\n---\s*\n", text, re.DOTALL)
    try:
        values = yaml.safe_load(head[1]) if head else {}
    except yaml.YAMLError:
        return {}
    return values if isinstance(values, dict) else {}


def _json_object(path: Path) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        values = json.loads(read_bytes(path))
    except ValueError:
        return None
    return values if isinstance(values, dict) else None
