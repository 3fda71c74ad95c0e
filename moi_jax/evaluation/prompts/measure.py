"""The held-out prompt matrix of an opened checkpoint: its data, its untrained model, its files."""

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moi_jax.common.errors import UserError, cannot_write
from moi_jax.config import Config, TokenizerConfig

if TYPE_CHECKING:
    from moi_jax.checkpoints.opener import OpenCheckpoint
    from moi_jax.data.dataset import Dataset
    from moi_jax.evaluation.prompts.crossing import Crossed
    from moi_jax.evaluation.prompts.matrix import ItemSums, PromptMatrix
    from moi_jax.models.parameters import Tree

log = logging.getLogger(__name__)


Json = dict[str, Any]

TRAINED, UNTRAINED = "trained", "untrained"


@dataclass(frozen=True)
class HeldOutOptions:
    """The choices of `evaluate --tasks held_out`.

    Attributes:
      config: whose data's held-out part it is; None is the checkpoint's own.
      untrained: a checkpoint to stand beside; None is what the checkpoint was trained from.
      paraphrases: domain -> another wording of its prompt, before those that are known.
      limit: that many conversations of each domain, evenly spaced; None is all.
      rows: of a batch at full width; shorter rows come in larger batches.
    """

    config: Config | None = None
    untrained: Path | None = None
    paraphrases: Mapping[str, str] | None = None
    limit: int | None = None
    rows: int = 8


def measure_held_out(opened: "OpenCheckpoint", options: HeldOutOptions, out: Path) -> Json:
    """Measures the matrix, prints it, and writes it into the directory `out`.

        held_out.json         prompts, losses, accuracies, differences with intervals
        held_out_items.jsonl  the sums of each conversation under each prompt
        held_out.png          the heat-map

    Returns:
      What held_out.json holds.

    Raises:
      UserError: no config is known, its data cannot be opened, the untrained checkpoint named
        does not fit, a loss is not finite, or `out` cannot be written.
    """
    from moi_jax.checkpoints.items import parameters_fingerprint
    from moi_jax.evaluation.prompts.matrix_report import print_matrix

    parameters = parameters_fingerprint(opened.step)
    _check_same(out / "held_out.json", parameters)
    began = _own_config(opened.step)
    config = options.config or began
    if config is None:
        raise UserError(
            f"{opened.step} was not written by training, so it names no data; name the config "
            f"whose held-out conversations to use by --config"
        )
    untrained = _untrained(opened, began, options.untrained)
    dataset = _open_dataset(opened, config)
    crossed = _cross(dataset, options.paraphrases or {})
    matrix = _make_matrix(opened, dataset, crossed, options)
    models = {TRAINED: opened.parameters}
    if untrained:
        models[UNTRAINED] = untrained[1]
    sums = _measure(opened, matrix, models)
    results = {
        "checkpoint": str(opened.step),
        "parameters": parameters,
        "untrained": untrained[0] if untrained else None,
        **_results(matrix, dataset, crossed, sums),
        "settings": _settings(opened, dataset, options),
    }
    print_matrix(results)
    _write(out, results, sums, matrix)
    return results


def _check_same(path: Path, parameters: str) -> None:
    """Raises UserError where the file is of another checkpoint."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # not there, or not whole: measured anew
    if before != parameters:
        raise UserError(f"{path} is of another checkpoint; choose another --out")


def _own_config(step: Path) -> Config | None:
    """What the checkpoint was trained by; None where it was not trained by us."""
    from moi_jax.checkpoints.items import read_json_item
    from moi_jax.config.load import make_config

    if not (step / "config").is_dir():
        return None
    return make_config(read_json_item(step, "config"), where=f"{step / 'config'}")


def _open_dataset(opened: "OpenCheckpoint", config: Config) -> "Dataset":
    """The data of the config in the tokens of the checkpoint, which stands alone."""
    from moi_jax.checkpoints.experiment import open_experiment
    from moi_jax.data.dataset import open_dataset

    model = config.model.model_copy(update={"init_from": opened.step, "preset": None})
    tokenizer = TokenizerConfig(chat_template=opened.tokenizer.template.name)
    config = config.model_copy(update={"model": model, "tokenizer": tokenizer})
    try:
        experiment = open_experiment(config)
        return open_dataset(experiment.config, experiment.tokenizer)
    except UserError as error:
        raise UserError(
            f"{error}. The data of {opened.step} are looked for as in training: run this where "
            f"training ran, or name a config with another data.root by --config"
        ) from None


def _untrained(
    opened: "OpenCheckpoint", began: Config | None, named: Path | None
) -> tuple[str, "Tree"] | None:
    """What the checkpoint was trained from, in words and as parameters; None where it is gone."""
    import jax

    from moi_jax.checkpoints.items import read_items
    from moi_jax.checkpoints.parameters import read_parameters
    from moi_jax.models.parameters import random_parameters

    source = named
    if source is None and began is not None:
        source = began.model.init_from
    if source is None:
        if began is None:
            log.info("what the checkpoint was trained from is not known: name it by --untrained")
            return None
        seed, dtype = began.train.seed, began.model.param_dtype
        parameters = random_parameters(opened.config, seed, dtype, opened.mesh)
        return f"random parameters, train.seed {seed}", jax.tree.map(
            lambda p: p.astype(opened.dtype), parameters
        )
    try:
        items = read_items(source)
    except UserError as error:
        if named:
            raise
        log.info(f"what the checkpoint was trained from is left out: {error}")
        return None
    if items.model != opened.config or items.tokenizer != opened.tokenizer.files:
        differs = f"{source} has another architecture or tokenizer than {opened.step}"
        if named:
            raise UserError(f"{differs}, so its losses cannot stand beside; name another one")
        log.info(f"what the checkpoint was trained from is left out: {differs}")
        return None
    return str(source), read_parameters(source, opened.config, opened.dtype, opened.mesh)


def _cross(dataset: "Dataset", paraphrases: Mapping[str, str]) -> "Crossed":
    from moi_jax.evaluation.prompts.crossing import PARAPHRASE, crossed_prompts
    from moi_jax.text.prompts import resolve_prompt

    data = dataset.config.data
    own = {domain.name: resolve_prompt(data, domain) for domain in data.domains}
    crossed = crossed_prompts(own, data.default_system_prompt, dataset.tokenizer, paraphrases)
    for name, prompts in crossed.items():
        if own[name] is not None and PARAPHRASE not in prompts:
            log.info(
                f"no paraphrase of the prompt of {name} is known, and none is measured; give one "
                f"by --paraphrase {name}=TEXT",
            )
    return crossed


def _make_matrix(
    opened: "OpenCheckpoint", dataset: "Dataset", crossed: "Crossed", options: HeldOutOptions
) -> "PromptMatrix":
    from moi_jax.evaluation.prompts.matrix import PromptMatrix
    from moi_jax.parallel.placing import batch_shards

    return PromptMatrix(
        dataset.caches,
        dataset.selections,
        dataset.config.data,
        dataset.config.loss.targets,
        dataset.tokenizer,
        crossed,
        options.rows,
        batch_shards(opened.mesh),
        options.limit,
    )


def _measure(
    opened: "OpenCheckpoint", matrix: "PromptMatrix", models: dict[str, "Tree"]
) -> dict[str, "ItemSums"]:
    from moi_jax.common.progress import count_bar
    from moi_jax.evaluation.row_sums import make_row_sums

    row_sums = make_row_sums(opened.bind, opened.mesh)
    measured = {}
    for name, parameters in models.items():
        with count_bar(f"held-out, {name}", matrix.rows) as advance:
            measured[name] = matrix.measure(partial(row_sums, parameters), advance)
    return measured


def _results(
    matrix: "PromptMatrix", dataset: "Dataset", crossed: "Crossed", sums: dict[str, "ItemSums"]
) -> Json:
    import numpy as np

    from moi_jax.evaluation.prompts.crossing import token_count
    from moi_jax.evaluation.prompts.gaps import summarize

    domain_of = np.array([item.domain for item in matrix.items], np.int64)
    domains = {}
    for domain, (name, prompts) in enumerate(crossed.items()):
        domains[name] = {
            "items": int(np.sum(domain_of == domain)),
            "too_long": matrix.too_long[name],
            "loss_tokens": int(sums[TRAINED].loss_tokens[domain_of == domain, 0].sum()),
            "prompts": {
                column: {"text": text, "tokens": token_count(text, dataset.tokenizer)}
                for column, text in prompts.items()
            },
        }
    models = {
        name: summarize(of_model, domain_of, list(crossed), matrix.columns)
        for name, of_model in sums.items()
    }
    return {"columns": matrix.columns, "domains": domains, "models": models}


def _settings(opened: "OpenCheckpoint", dataset: "Dataset", options: HeldOutOptions) -> Json:
    from moi_jax.evaluation.prompts.gaps import INTERVAL

    data = dataset.config.data
    return {
        "dtype": opened.dtype,
        "default_system_prompt": data.default_system_prompt,
        "targets": dataset.config.loss.targets,
        "row_system": data.row_system,
        "sequence_length": data.sequence_length,
        "limit": options.limit,
        "interval": INTERVAL,
    }


def _write(out: Path, results: Json, sums: dict[str, "ItemSums"], matrix: "PromptMatrix") -> None:
    from moi_jax.common.atomic_files import atomic_write_text
    from moi_jax.evaluation.prompts.matrix_report import draw_matrix, item_lines

    lines = item_lines(sums, matrix.items, matrix.domains, matrix.columns)
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out / "held_out_items.jsonl", "".join(lines))
        draw_matrix(results["models"], matrix.columns, out / "held_out.png")
        # Last: where it is there, the others are.
        atomic_write_text(out / "held_out.json", json.dumps(results, indent=1, ensure_ascii=False))
    except OSError as error:
        raise cannot_write(out, error) from None
