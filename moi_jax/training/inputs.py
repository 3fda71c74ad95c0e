"""From a config to what a run works on: architecture, tokenizer, prompts and planned data."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from rich.console import Console

from moi_jax.checkpoints.checkpoints import ModelItems, newest_step, read_items
from moi_jax.common.console import say
from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config
from moi_jax.config.schema import Config
from moi_jax.data.cache.prepare import DomainCache, prepare
from moi_jax.data.cache.selection import Selection, domain_report, select
from moi_jax.data.loader import Batch, RowSource, batch_dataset
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.run import RunPlan
from moi_jax.data.planning.statistics import mixture_statistics, print_mixture, print_sources
from moi_jax.models.config import ModelConfig
from moi_jax.models.presets import preset
from moi_jax.text.prompts import fingerprint, prompts_item, saved_template
from moi_jax.text.tokenizer import Tokenizer, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Resolved:
    """What is known before any data is read. `config` has nothing left open."""

    config: Config
    model: ModelConfig
    tokenizer: Tokenizer
    provenance: dict[str, Any]  # of the weights in model.init_from


@dataclasses.dataclass(frozen=True)
class Inputs(Resolved):
    """All that is known before any parameter exists."""

    caches: list[DomainCache]
    selections: list[Selection]
    corpus: Corpus

    @property
    def items(self) -> ModelItems:
        """What every checkpoint of the run carries beside its parameters."""
        data = self.config.data
        prompts = prompts_item(data.default_system_prompt, self.tokenizer.template.name, data)
        return ModelItems(self.model, self.tokenizer.files, prompts, self.provenance)

    def row_source(self, plan: RunPlan) -> RowSource:
        """The rows of a plan of this corpus, read from the caches."""
        train = [selection.train for selection in self.selections]
        pad = self.tokenizer.template.pad
        return RowSource(plan, self.caches, train, self.config.loss, pad)

    def show_mixture(self, plan: RunPlan, console: Console) -> dict[str, Any]:
        """Prints sources, drops and the mixture of the first epoch (of each stage).

        Returns:
          The mixture; of a curriculum the first stage's, with all of them under "stages".
        """
        report, data = domain_report(self.caches, self.selections), self.config.data
        print_sources(self.caches, console)
        mixtures = []
        for stage, begins in enumerate([stage.begins for stage in data.stages] or [0]):
            if begins >= plan.total_rows:
                say(console, f"stage {stage} begins at row {begins:,}, after the run's last row")
                break
            epoch = plan.epoch_plan(plan.locate(begins)[0])
            mixture = mixture_statistics(epoch, report, data.of_stage(stage), plan.batch_rows)
            if data.stages:
                say(console, f"stage {stage}, from row {begins:,} on")
            print_mixture(mixture, console, data.max_repeats)
            mixtures.append({"begins": begins, **mixture})
        if plan.empty_rows:
            say(console, f"{plan.empty_rows} empty rows fill up the run's last batch")
        return {**mixtures[0], "stages": mixtures} if data.stages else mixtures[0]

    @property
    def fingerprints(self) -> dict[str, str]:
        """Of what must not change while a run goes on, though its path may."""
        prompts = self.items.prompts
        data = self.config.data
        shares = [source.held_out for domain in data.domains for source in domain.sources]
        held_out = [(share or data.held_out).model_dump() for share in shares]
        return {
            "model": fingerprint(self.model.to_json()),
            "tokenizer": self.tokenizer.fingerprint,
            "template": prompts["template_hash"],
            "prompts": fingerprint([prompts["default_system_prompt"], prompts["domains"]]),
            "data": fingerprint([held_out, [cache.key for cache in self.caches]]),
        }


def resolve(config: Config, run_dir: Path | None = None) -> Resolved:
    """The config with what depends on checkpoint and platform filled in.

    Args:
      run_dir: of a run that may go on: its own newest checkpoint then stands in for
        model.init_from, which need not be there any more.

    Raises:
      UserError: preset and checkpoint disagree, there is no tokenizer, its ids do not fit the
        embedding, the checkpoint was made with another chat template than this version's, or
        rows are longer than the model was made for.
    """
    items = None
    if base := config.model.init_from:
        own = newest_step(run_dir / "checkpoints") if run_dir else None
        items = read_items(own or base)
    if items is None:
        model = preset(config.model.preset or "")
        default_prompt = model.default_system_prompt
    else:
        model, default_prompt = items.model, items.prompts["default_system_prompt"]
        if config.model.preset and preset(config.model.preset) != model:
            raise UserError(
                f"model.preset {config.model.preset} is not the architecture of "
                f"{config.model.init_from}; leave preset out and it is the checkpoint's"
            )
    asked = config.tokenizer.chat_template
    template: str | None = None if asked == "from_checkpoint" else asked
    if items and not template:
        template = saved_template(items.prompts, own or base)
    if config.tokenizer.path:
        tokenizer = load_tokenizer(config.tokenizer.path, template)
    elif items:
        tokenizer = Tokenizer.from_files(items.tokenizer, template)
    else:
        raise UserError(
            "there is no tokenizer: set tokenizer.path to a directory with tokenizer.json or "
            "qwen.tiktoken (or model.init_from to a checkpoint, which holds one)"
        )
    _check_fit(config, model, tokenizer)
    dtype = config.model.compute_dtype
    if dtype == "auto":
        dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    prompt = config.data.default_system_prompt
    resolved = config.model_copy(
        update={
            "model": config.model.model_copy(update={"compute_dtype": dtype}),
            "data": config.data.model_copy(
                update={"default_system_prompt": default_prompt if prompt is None else prompt}
            ),
        }
    )
    return Resolved(resolved, model, tokenizer, items.provenance if items else {})


def _check_fit(config: Config, model: ModelConfig, tokenizer: Tokenizer) -> None:
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's embedding only "
            f"{model.vocab_size} rows; choose the tokenizer or the preset that belongs to the other"
        )
    length = config.data.sequence_length
    if length > model.seq_length and not config.model.allow_longer:
        reason = "it was trained on no position beyond"
        if model.dynamic_ntk or model.logn_attention:
            reason = "training has dynamic NTK and log-n attention off, inference turns them on"
        raise UserError(
            f"data.sequence_length {length} is over the model's seq_length {model.seq_length}: "
            f"{reason}. Shorten the rows or set model.allow_longer: true"
        )
    dtypes = (config.model.param_dtype, config.model.compute_dtype, config.optimizer.moment_dtype)
    if "float64" in dtypes and not jax.config.read("jax_enable_x64"):
        raise UserError("float64 is set but off in jax; set the environment's JAX_ENABLE_X64=1")
    if not config.data.domains:
        raise UserError("data.domains is empty; list at least one domain with its sources")


def open_inputs(resolved: Resolved, console: Console) -> Inputs:
    """Brings the data into the cache where it is missing, and selects what is trained on.

    Raises:
      UserError: see `prepare` and `select`.
    """
    config = resolved.config
    caches = prepare(config.data, resolved.tokenizer, console)
    selections = select(caches, config.data.held_out, config.loss.targets, config.data.domains)
    corpus = Corpus.of_training(caches, selections, config.loss.targets)
    return Inputs(
        config,
        resolved.model,
        resolved.tokenizer,
        resolved.provenance,
        caches,
        selections,
        corpus,
    )


def batches(config: Config | str | Path, start_row: int = 0) -> Iterator[Batch]:
    """The numpy batches of a run, from any global row on: rows [start_row, start_row + B), ...

    Args:
      config: a Config, or the path of one.

    Raises:
      UserError: as the training command would.
    """
    if not isinstance(config, Config):
        config = load_config(config)
    inputs = open_inputs(resolve(config), Console(stderr=True))
    plan = RunPlan(inputs.corpus, inputs.config.data, inputs.config.train)
    yield from batch_dataset(inputs.row_source(plan), start_row)
