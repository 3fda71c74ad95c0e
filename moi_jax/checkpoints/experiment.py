"""The model and the tokenizer that a config names: what is known before any data is read."""

import dataclasses
import logging
from pathlib import Path

import jax

from moi_jax.checkpoints.hf.source import HUB_FORM, PublishedSource, find_source
from moi_jax.checkpoints.init_from import Start, continued_start, open_start
from moi_jax.checkpoints.items import ModelItems, find_step, newest_step, read_items
from moi_jax.common.errors import UserError
from moi_jax.common.home import expand_home
from moi_jax.config import Config
from moi_jax.models.compute import resolve_dtypes
from moi_jax.models.config import ModelConfig
from moi_jax.models.lora import adapted
from moi_jax.models.presets import preset
from moi_jax.text.jinja.template import FROM_CHECKPOINT
from moi_jax.text.prompts import (
    check_prompts,
    check_targets,
    prompts_metadata,
    saved_template,
    tell_templates,
)
from moi_jax.text.template_choice import SUFFIX, choose_template, has_own_template
from moi_jax.text.tokenizer import Tokenizer, check_whole, load_tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config with the model, tokenizer and prompts that it names.

    Attributes:
      config: with all values that a checkpoint decides, and ids of the hub with their commits.
        `on_platform` fills in what the platform decides (dtype `auto`).
      start: what model.init_from names; None for random parameters.
    """

    config: Config
    model: ModelConfig
    tokenizer: Tokenizer
    start: Start | None

    @property
    def items(self) -> ModelItems:
        """What every checkpoint of the experiment holds beside its parameters, but for `base`."""
        data = self.config.data
        prompts = prompts_metadata(data.default_system_prompt, self.tokenizer.template, data)
        provenance = self.start.items.provenance if self.start else {}
        return ModelItems(self.model, self.tokenizer.files, prompts, provenance)

    def on_platform(self, platform: str) -> "Experiment":
        """The experiment with the choices that depend on the platform: cpu, gpu or tpu.

        Raises:
          UserError: the config asks for float64, which is switched off in jax.
        """
        config = resolve_dtypes(self.config, platform)
        optimizer = config.optimizer
        moments = (optimizer.moment_dtype, optimizer.second_moment_dtype)
        computed = config.model.compute_dtype
        dtypes = (config.param_dtype, computed, *moments, optimizer.gradient_dtype)
        if "float64" in dtypes and not jax.config.read("jax_enable_x64"):
            raise UserError(
                "float64 is switched off in jax; set the environment variable JAX_ENABLE_X64=1"
            )
        return dataclasses.replace(self, config=config)


def open_experiment(config: Config, run_dir: Path | None = None) -> Experiment:
    """Reads what the config names: a preset, or the checkpoint that the run begins from.

    It starts no jax backend, so data can be prepared on machines without an accelerator. Of
    published weights it reads everything but the weights.

    Args:
      run_dir: the directory of a run that may continue. Its newest checkpoint then replaces
        model.init_from, which need not exist any more, and a file in tokenizer.chat_template that
        is gone.

    Raises:
      UserError: there is nothing of that name, preset and checkpoint disagree, there is no
        tokenizer, its ids do not fit the embedding, the checkpoint was made with another version
        of its chat template, the template cannot write the prompt of a domain or has no labels for
        loss.targets, or rows are longer than the model was made for.
    """
    source = _tokenizer_source(config.tokenizer.path) if config.tokenizer.path else None
    directory = source.path if source else None
    start = None
    own = newest_step(run_dir / "checkpoints") if run_dir else None
    if named := config.model.init_from:
        start = continued_start(named, own) if own else open_start(named, directory)
    model, default_prompt = _model(config, start)
    tokenizer = (own and _kept_tokenizer(config, own)) or _tokenizer(config, start, directory)
    _check_fit(config, model, tokenizer)
    config = _resolved(config, start, source, default_prompt)
    if config.data.domains:
        check_prompts(config.data, tokenizer.template)
        check_targets(config.loss.targets, tokenizer.template)
        tell_templates(tokenizer.template)
    return Experiment(config, model, tokenizer, start)


def _tokenizer_source(path: Path) -> PublishedSource:
    """The directory that tokenizer.path names; a repository of the hub is fetched."""
    source = find_source(path)
    if not source.path.is_dir():
        raise UserError(
            f"tokenizer.path: there is no directory {path}; give one with tokenizer files, or "
            f"{HUB_FORM}"
        )
    return source


def _model(config: Config, start: Start | None) -> tuple[ModelConfig, str | None]:
    """The architecture and its default system prompt, from a preset or from where a run begins.

    Where that has adapters, the architecture is its own.
    """
    if start is None:
        model = adapted(preset(config.model.preset or ""), config.lora)
        return model, model.default_system_prompt
    model = start.items.model
    if config.model.preset and preset(config.model.preset) != model.base:
        raise UserError(
            f"model.preset {config.model.preset} is not the architecture of "
            f"{config.model.init_from}; leave out preset to use the checkpoint's"
        )
    if model.adapter is None:
        model = adapted(model, config.lora)
    return model, start.items.prompts["default_system_prompt"]


def _kept_tokenizer(config: Config, own: Path) -> Tokenizer | None:
    """The tokenizer in a run's own step, if the file of its chat template is gone.

    Where the file is still there, it must hold the template that the run began with, which the
    fingerprints of a resumed run tell.
    """
    asked = expand_home(Path(config.tokenizer.chat_template))
    if asked.suffix != SUFFIX or asked.is_file():
        return None
    items = read_items(own)
    if items.prompts["chat_template"] != FROM_CHECKPOINT:
        return None
    log.info(f"{asked} is gone; the run goes on with the chat template in {own}")
    return Tokenizer.from_files(items.tokenizer, FROM_CHECKPOINT)


def _tokenizer(config: Config, start: Start | None, directory: Path | None) -> Tokenizer:
    """The tokenizer in tokenizer.path or, without one, in the checkpoint that a run begins from."""
    asked = config.tokenizer.chat_template
    template: str | None = None if asked == FROM_CHECKPOINT else asked
    saved = None
    if start and not template:
        template = saved = saved_template(start.items.prompts, start.read)
    if directory:
        tokenizer = load_tokenizer(directory, template)
    elif start:
        tokenizer = Tokenizer.from_files(start.items.tokenizer, template)
    else:
        raise UserError(
            f"there is no tokenizer: set tokenizer.path to a directory with tokenizer.json or "
            f"qwen.tiktoken or to {HUB_FORM}, or set model.init_from, which brings one"
        )
    if start and saved and start.source is None:
        _warn_of_old_import(start, saved, tokenizer)
    return tokenizer


def _warn_of_old_import(start: Start, saved: str, tokenizer: Tokenizer) -> None:
    """Warns where an import by an earlier version chose a template of ours as the nearest one."""
    trained = (find_step(start.read) / "config").is_dir()
    if trained or saved == FROM_CHECKPOINT or not has_own_template(tokenizer):
        return
    try:
        now = choose_template(tokenizer, None).name
    except UserError:  # its own template cannot be used
        return
    if now != saved:
        log.warning(
            f"{start.read} was imported to be trained in the chat template {saved}, and its own "
            f"writes other tokens (tools, thinking or a default prompt); import the weights again "
            f"to train in its own, or set tokenizer.chat_template to {saved} or to a {SUFFIX} file"
        )


def _resolved(
    config: Config, start: Start | None, source: PublishedSource | None, default_prompt: str | None
) -> Config:
    """The config with the default prompt, and with the commits of the hub's repositories.

    A repository may change; a run that is started again must not begin from other weights.
    """
    model, tokenizer, data = config.model, config.tokenizer, config.data
    if start:
        model = model.model_copy(update={"init_from": start.name})
    if source and source.pinned:
        tokenizer = tokenizer.model_copy(update={"path": source.pinned})
    if data.default_system_prompt is None:
        data = data.model_copy(update={"default_system_prompt": default_prompt})
    return config.model_copy(update={"model": model, "tokenizer": tokenizer, "data": data})


def _check_fit(config: Config, model: ModelConfig, tokenizer: Tokenizer) -> None:
    check_whole(tokenizer, model.vocab_size, config.tokenizer.path or config.model.init_from)
    if tokenizer.vocab_size > model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model's embedding only "
            f"{model.vocab_size} rows; choose a tokenizer and a preset that belong together"
        )
    length = config.data.sequence_length
    if length > model.seq_length and not config.model.allow_longer:
        reason = "the model was not trained on positions beyond it"
        if model.dynamic_ntk or model.logn_attention:
            reason = "beyond it, inference uses dynamic NTK and log-n attention, training does not"
        raise UserError(
            f"data.sequence_length {length} is over the model's seq_length {model.seq_length}: "
            f"{reason}. Shorten the rows or set model.allow_longer: true"
        )
    if not config.data.domains:
        raise UserError("data.domains is empty; list at least one domain with its sources")
