"""Small source files, the data section over them, and what a cache of them holds."""

import json
from pathlib import Path
from typing import Any

from moi_jax import config
from moi_jax.data.cache.prepare import DomainCache, prepare
from moi_jax.text.tokenizer import Tokenizer, load_tokenizer

from support.places import SAMPLES

TOKENIZER = load_tokenizer(SAMPLES / "tokenizer")


def chat(*turns: str, **keys: Any) -> dict:
    roles = ["user", "assistant"] * len(turns)
    return {
        "messages": [
            {"role": r, "content": t, **(keys if r == "assistant" else {})}
            for r, t in zip(roles, turns, strict=False)
        ]
    }


def write(path: Path, *rows: dict | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(
        b"".join((r if isinstance(r, bytes) else json.dumps(r).encode()) + b"\n" for r in rows)
    )


def section(root: Path, *names: str, source: dict | None = None, **keys: Any) -> config.Data:
    """One domain for each folder name below root."""
    return config.Data(
        **{
            "root": root,
            "cache_dir": root.parent / "cache",
            "default_domain": names[0],
            "default_system_prompt": "Be kind.",
            "domains": [
                {"name": n, "sources": [{"path": f"{n}/*.jsonl", **(source or {})}]} for n in names
            ],
            **keys,
        }
    )


def run(data: config.Data, tokenizer: Tokenizer = TOKENIZER) -> list[DomainCache]:
    return prepare(data, tokenizer)


def texts(cache: DomainCache, indices: Any = None) -> list[str]:
    """The turns of the instructions as text, without the system block."""
    rows = cache.read(range(len(cache.lengths)) if indices is None else indices)
    return [TOKENIZER.decode(row.tokens[row.system_length :]) for row in rows]
