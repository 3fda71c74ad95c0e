"""The model and the tokenizer that a config names: what is known before any data is read."""

import dataclasses
from pathlib import Path
from typing import Any

import jax

from moi_jax.checkpoints.items import ModelItems, newest_step, read_items
from moi_jax.common.errors import UserError
from moi_jax.config import Config
from moi_jax.models.compute import resolve_dtype
from moi_jax.models.config import ModelConfig
from moi_jax.models.presets import preset
from moi_jax.text.prompts import prompts_metadata, saved_template
from moi_jax.text.tokenizer import Tokenizer, check_whole, load_tokenizer


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A config with the model, tokenizer and prompts that it names.

    Attributes:
      config: with all values that a checkpoint decides. `on_platform` fills in what the platform
        decides (dtype `auto`).
      provenance: where the weights in model.init_from came from; empty without any.
    """

    config: Config
    model: ModelConfig
    tokenizer: Tokenizer
    provenance: dict[str, Any]

    @property
    def items(self) -> ModelItems:
        """What every checkpoint of the experiment holds beside its parameters."""
        data = self.config.data
        prompts = prompts_metadata(data.default_system_prompt, self.tokenizer.template.name, data)
        return ModelItems(self.model, self.tokenizer.files, prompts, self.provenance)

    def on_platform(self, platform: str) -> "Experiment":
        """The experiment with the choices that depend on the platform: cpu, gpu or tpu.

        Raises:
          UserError: the config asks for float64, which is switched off in jax.
        """
        section = self.config.model
        dtype = resolve_dtype(section.compute_dtype, platform)
        dtypes = (section.param_dtype, dtype, self.config.optimizer.moment_dtype)
        if "float64" in dtypes and not jax.config.read("jax_enable_x64"):
            raise UserError(
                "float64 is switched off in jax; set the environment variable JAX_ENABLE_X64=1"
            )
        section = section.model_copy(update={"compute_dtype": dtype})
        return dataclasses.replace(self, config=self.config.model_copy(update={"model": section}))


def open_experiment(config: Config, run_dir: Path | None = None) -> Experiment:
    """Reads what the config names: a preset, or the checkpoint that the run begins from.

    It starts no jax backend, so data can be prepared on machines without an accelerator.

    Args:
      run_dir: the directory of a run that may continue. Its newest checkpoint then replaces
        model.init_from, which need not exist any more.

    Raises:
      UserError: preset and checkpoint disagree, there is no tokenizer, its ids do not fit the
        embedding, the checkpoint was made with another version of its chat template, or rows are
        longer than the model was made for.
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
                f"{config.model.init_from}; leave out preset to use the checkpoint's"
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
    data = config.data
    if data.default_system_prompt is None:
        data = data.model_copy(update={"default_system_prompt": default_prompt})
    provenance = items.provenance if items else {}
    return Experiment(config.model_copy(update={"data": data}), model, tokenizer, provenance)


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
