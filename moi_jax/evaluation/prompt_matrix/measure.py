"""Measures the prompt matrix of a checkpoint and of its untrained model, and writes the files."""

import json
import logging
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moi_jax.checkpoints.experiment import open_experiment
from moi_jax.checkpoints.first_parameters import first_parameters
from moi_jax.checkpoints.init_from import open_start
from moi_jax.checkpoints.items import parameters_fingerprint, read_base, read_json_item
from moi_jax.checkpoints.opener import OpenCheckpoint
from moi_jax.common.atomic_files import atomic_write_text
from moi_jax.common.errors import UserError, cannot_write
from moi_jax.common.progress import count_bar
from moi_jax.config import Config, TokenizerConfig
from moi_jax.config.load import make_config
from moi_jax.data.dataset import Dataset, open_dataset
from moi_jax.evaluation.options import HeldOutOptions
from moi_jax.evaluation.prompt_matrix.gaps import INTERVAL, summarize
from moi_jax.evaluation.prompt_matrix.matrix import ItemSums, PromptMatrix
from moi_jax.evaluation.prompt_matrix.prompts import (
    PARAPHRASE,
    PromptTable,
    make_prompt_table,
    token_count,
)
from moi_jax.evaluation.prompt_matrix.report import draw_matrix, item_lines, print_matrix
from moi_jax.evaluation.row_sums import make_row_sums
from moi_jax.models.decoder import Tree
from moi_jax.models.parameters import add_new_adapters, base_of
from moi_jax.parallel import hosts
from moi_jax.parallel.placing import batch_shards
from moi_jax.text.prompts import resolve_prompt

log = logging.getLogger(__name__)

Json = dict[str, Any]

TRAINED, UNTRAINED = "trained", "untrained"


def measure_held_out(opened: OpenCheckpoint, options: HeldOutOptions, out: Path) -> Json:
    """Measures the matrix, logs it, and writes it into the directory `out` (process 0 does).

        held_out.json         prompts, losses, accuracies, differences with intervals
        held_out_items.jsonl  the sums of each conversation under each prompt
        held_out.png          the heat map

    Returns:
      The content of held_out.json.

    Raises:
      UserError: no config is known, its data cannot be opened, options.untrained does not fit the
        checkpoint, a loss is not finite, or `out` cannot be written.
    """
    parameters = parameters_fingerprint(opened.step)
    if hosts.is_main():
        _check_same(out / "held_out.json", parameters)
    began = _own_config(opened.step)
    config = options.config or began
    if config is None:
        raise UserError(
            f"{opened.step} was not written by training, so it names no data; give the config of "
            f"the held-out conversations with --config"
        )
    untrained = _untrained(opened, began, options.untrained, config.data.cache_dir)
    dataset = _open_dataset(opened, config)
    table = _prompt_table(dataset, options.paraphrases)
    matrix = _make_matrix(opened, dataset, table, options)
    models = {TRAINED: opened.stacked}
    if untrained:
        models[UNTRAINED] = untrained[1]
    sums = _measure(opened, matrix, models)
    results = {
        "checkpoint": str(opened.step),
        "parameters": parameters,
        "untrained": untrained[0] if untrained else None,
        **_results(matrix, dataset, table, sums),
        "settings": _settings(opened, dataset, options),
    }
    print_matrix(results)
    if hosts.is_main():
        _write(out, results, sums, matrix)
    return results


def _check_same(path: Path, parameters: str) -> None:
    """Raises UserError where the file is of another checkpoint."""
    try:
        before = json.loads(path.read_text(encoding="utf-8"))["parameters"]
    except (OSError, ValueError, KeyError, TypeError):
        return  # missing or incomplete: it is measured again
    if before != parameters:
        raise UserError(f"{path} is of another checkpoint; choose another --out")


def _own_config(step: Path) -> Config | None:
    """The config that the checkpoint was trained with; None where moi_jax did not train it."""
    if not (step / "config").is_dir():
        return None
    return make_config(read_json_item(step, "config"), where=f"{step / 'config'}")


def _open_dataset(opened: OpenCheckpoint, config: Config) -> Dataset:
    """The data of the config, with the tokenizer and the template of the checkpoint."""
    model = config.model.model_copy(update={"init_from": opened.step, "preset": None})
    tokenizer = TokenizerConfig(chat_template=opened.tokenizer.template.name)
    config = config.model_copy(update={"model": model, "tokenizer": tokenizer})
    with hosts.one_first(config.data.cache_dir, "preparing the data"):
        try:
            experiment = open_experiment(config)
            dataset = open_dataset(experiment.config, experiment.tokenizer)
        except UserError as error:
            raise UserError(
                f"{error}. The data of {opened.step} is read from the same paths as in training: "
                f"run this where training ran, or give a config with another data.root with "
                f"--config"
            ) from None
    hosts.check_same({"data": dataset.fingerprint})
    return dataset


def _untrained(
    opened: OpenCheckpoint, began: Config | None, named: Path | None, cache_dir: Path
) -> tuple[str, Tree] | None:
    """The name and the parameters that training started from; None where they are gone.

    Published weights are read from their import in `cache_dir`.
    """
    beside = read_base(opened.step)
    if named is None and began and beside and beside.name == str(began.model.init_from):
        base = base_of(opened.config, opened.stacked)  # read already, and in memory once
        return beside.name, add_new_adapters(opened.config, base, 0, opened.dtype, opened.mesh)
    source = named
    if source is None and began is not None:
        source = began.model.init_from
    if source is None:
        if began is None:
            log.info(
                "no untrained model: the start of training is not known; name it with --untrained"
            )
            return None
        seed, dtype = began.train.seed, began.param_dtype
        parameters, _ = first_parameters(None, opened.config, seed, dtype, opened.mesh)
        return f"random parameters, train.seed {seed}", jax.tree.map(
            lambda p: p.astype(opened.dtype), parameters
        )
    tokenizer = began.tokenizer.path if began else None
    checkpoint = None
    with hosts.one_first(cache_dir, "importing the untrained model"):
        try:
            checkpoint = _start_checkpoint(opened, source, tokenizer, cache_dir)
        except UserError as error:
            if named:
                raise
            log.info(f"the untrained model is left out: {error}")
    hosts.check_same({"untrained model": str(source) if checkpoint else "none"})
    if checkpoint is None:
        return None
    # New adapters change nothing, so their seed plays no part.
    config, mesh = opened.config, opened.mesh
    return str(source), first_parameters(checkpoint, config, 0, opened.dtype, mesh)[0]


def _start_checkpoint(
    opened: OpenCheckpoint, source: Path, tokenizer: Path | None, cache_dir: Path
) -> Path:
    """The checkpoint of a start, see `open_start`; raises UserError unless it fits `opened`."""
    start = open_start(source, tokenizer)
    if (
        start.items.model not in (opened.config, opened.config.base)
        or start.items.tokenizer != opened.tokenizer.files
    ):
        raise UserError(
            f"{source} has another architecture or tokenizer than {opened.step}, so its losses "
            f"cannot be compared; name another one"
        )
    return start.checkpoint(cache_dir)


def _prompt_table(dataset: Dataset, paraphrases: Mapping[str, str]) -> PromptTable:
    data = dataset.config.data
    own = {domain.name: resolve_prompt(data, domain) for domain in data.domains}
    table = make_prompt_table(own, data.default_system_prompt, dataset.tokenizer, paraphrases)
    for name, prompts in table.items():
        if own[name] is not None and PARAPHRASE not in prompts:
            log.info(
                f"no paraphrase of the prompt of {name} is known, so none is measured; give one "
                f"with --paraphrase {name}=TEXT",
            )
    return table


def _make_matrix(
    opened: OpenCheckpoint, dataset: Dataset, table: PromptTable, options: HeldOutOptions
) -> PromptMatrix:
    return PromptMatrix(
        dataset.caches,
        dataset.selections,
        dataset.config.data,
        dataset.config.loss.targets,
        dataset.tokenizer,
        table,
        options.rows,
        batch_shards(opened.mesh),
        options.limit,
    )


def _measure(
    opened: OpenCheckpoint, matrix: PromptMatrix, models: dict[str, Tree]
) -> dict[str, ItemSums]:
    row_sums = make_row_sums(opened.bind, opened.mesh)
    measured = {}
    for name, parameters in models.items():
        with count_bar(f"held-out, {name}", matrix.rows) as on_progress:
            measured[name] = matrix.measure(partial(row_sums, parameters), on_progress)
    return measured


def _results(
    matrix: PromptMatrix, dataset: Dataset, table: PromptTable, sums: dict[str, ItemSums]
) -> Json:

    domain_of = np.array([item.domain for item in matrix.items], np.int64)
    domains = {}
    for domain, (name, prompts) in enumerate(table.items()):
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
        name: summarize(of_model, domain_of, list(table), matrix.columns)
        for name, of_model in sums.items()
    }
    return {"columns": matrix.columns, "domains": domains, "models": models}


def _settings(opened: OpenCheckpoint, dataset: Dataset, options: HeldOutOptions) -> Json:
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


def _write(out: Path, results: Json, sums: dict[str, ItemSums], matrix: PromptMatrix) -> None:
    lines = item_lines(sums, matrix.items, matrix.domains, matrix.columns)
    try:
        out.mkdir(parents=True, exist_ok=True)
        atomic_write_text(out / "held_out_items.jsonl", "".join(lines))
        draw_matrix(results["models"], matrix.columns, out / "held_out.png")
        # Written last: if it exists, the other files do too.
        atomic_write_text(out / "held_out.json", json.dumps(results, indent=1, ensure_ascii=False))
    except OSError as error:
        raise cannot_write(out, error) from None
