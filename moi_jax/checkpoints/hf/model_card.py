"""The model card of a checkpoint: base, licence, prompts, data, held-out losses."""

import json
from pathlib import Path
from typing import Any

import jinja2

from moi_jax.checkpoints.items import ModelItems, read_json_item
from moi_jax.text.jinja.template import JinjaTemplate
from moi_jax.text.jinja.tool_formats import ToolFormat, describe_template, tool_format
from moi_jax.text.templates import FROM_CHECKPOINT
from moi_jax.text.tokenizer import Tokenizer

# The sections of a run's config that the card shows; config.yaml has the rest.
SETTINGS = ("model", "lora", "loss", "optimizer", "train")

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
        template=_template(items),
        provenance=NO_PROVENANCE | items.provenance,
        training=training,
    )
    return page.rstrip() + "\n"


def _template(items: ModelItems) -> dict[str, Any]:
    """What the card says of the chat template: name, tools, and whether it adds a prompt."""
    name = items.prompts["chat_template"]
    if name != FROM_CHECKPOINT:
        return {"name": name, "tools": "", "adds_prompt": False}
    template = Tokenizer.from_files(items.tokenizer, name).template
    assert isinstance(template, JinjaTemplate)
    tools = _tools(tool_format(template)) if template.renders_tools else ""
    default = items.prompts["default_system_prompt"]
    adds_prompt = default is None and template.default_prompt is not None
    return {"name": describe_template(template), "tools": tools, "adds_prompt": adds_prompt}


def _tools(known: ToolFormat | None) -> str:
    """How calls are written, and which parser of a server reads them."""
    if known is None:
        return "Calls of tools have a form that is none of those that servers have parsers for."
    servers = {"vLLM": known.vllm, "SGLang": known.sglang}
    parsers = [f"{server} `--tool-call-parser {name}`" for server, name in servers.items() if name]
    return f"Calls of tools have the form {known.name}; the parser is, in {', in '.join(parsers)}."


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
            for key, value in config.get(section, {}).items()
            if section != "lora" or config["lora"]["rank"]
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
        found = {
            key: value
            for key, value in record.items()
            if key.startswith("eval/") and key.endswith("/loss") and value is not None
        }
        if found and record["step"] <= int(step):
            losses = found
    return losses
