"""The model card of a checkpoint: base, licence, prompts, data, held-out losses."""

import json
from pathlib import Path
from typing import Any

import jinja2

from moi_jax.checkpoints.items import ModelItems, read_json_item

# The sections of a run's config that the card shows; config.yaml has the rest.
SETTINGS = ("model", "loss", "optimizer", "train")

# Of parameters that began at random.
NO_PROVENANCE: dict[str, Any] = {"base": None, "license": None, "files": {}}


def model_card(items: ModelItems, step: Path | None = None) -> str:
    """README.md of a checkpoint, with the front matter that the hub reads.

    Args:
      step: a step in a run directory, where the mixture and the metrics are found. Without it, and
        for a step that was only converted, the card says nothing about training.
    """
    training = _training(step) if step else None
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["yaml"] = lambda value: json.dumps(value, ensure_ascii=False)
    page = environment.get_template("model_card.md.jinja").render(
        model=items.model,
        prompts=items.prompts,
        provenance=items.provenance or NO_PROVENANCE,
        training=training,
    )
    return page.rstrip() + "\n"


def _training(step: Path) -> dict[str, Any] | None:
    """Config, mixture and held-out losses of a training step, as far as they exist."""
    if not (step / "config").is_dir():
        return None
    config = read_json_item(step, "config")
    run = step.absolute().parent.parent
    return {
        "step": int(step.name) if step.name.isdigit() else None,
        "sources": [
            {"domain": domain["name"], **_source(source)}
            for domain in config["data"]["domains"]
            for source in domain["sources"]
        ],
        "settings": {
            f"{section}.{key}": value
            for section in SETTINGS
            for key, value in config[section].items()
            if key not in ("init_from", "compilation_cache")  # paths on the trainer's machine
        },
        "mixture": _mixture(run / "mixture.json"),
        "held_out": _held_out(run / "metrics.jsonl", step.name),
    }


def _source(source: dict[str, Any]) -> dict[str, Any]:
    kind = next(kind for kind in ("path", "tfds", "hf") if source.get(kind))
    told = {"weight": source["weight"], "license": source["license"] or "not told"}
    return {"kind": kind, "name": source[kind], **told}


def _mixture(path: Path) -> dict[str, Any] | None:
    return json.loads(path.read_text(encoding="utf-8"))["domains"] if path.is_file() else None


def _held_out(path: Path, step: str) -> dict[str, float]:
    """The last held-out losses at or before the step."""
    losses: dict[str, float] = {}
    if not (path.is_file() and step.isdigit()):
        return losses
    for line in path.read_text(encoding="utf-8").splitlines():
        record = json.loads(line)
        found = {k: v for k, v in record.items() if k.startswith("eval/") and k.endswith("/loss")}
        if found and record["step"] <= int(step):
            losses = found
    return losses
