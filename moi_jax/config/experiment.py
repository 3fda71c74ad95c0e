"""The whole experiment: one frozen object whose every default is resolved."""

from typing import Any

import yaml
from pydantic import model_validator

from moi_jax.config.data import Data
from moi_jax.config.evaluation import Eval
from moi_jax.config.lora import LoRA
from moi_jax.config.model import Model, TokenizerConfig
from moi_jax.config.run import Checkpoint, Cluster, Logging
from moi_jax.config.section import Section
from moi_jax.config.training import Loss, Mesh, Optimizer, Train


class Config(Section):
    """The whole experiment, made by `load_config`."""

    model: Model = Model()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: Data = Data()
    loss: Loss = Loss()
    lora: LoRA = LoRA()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()
    cluster: Cluster = Cluster()

    @model_validator(mode="before")
    @classmethod
    def fill_sections(cls, values: Any) -> Any:
        """Reads a section that is left out or empty as {}, so that its own defaults resolve."""
        if not isinstance(values, dict):
            return values
        filled = {
            name: {} if values.get(name) is None else values[name] for name in cls.model_fields
        }
        model = filled["model"]
        if isinstance(model, dict) and not model.get("init_from") and not model.get("preset"):
            filled["model"] = {**model, "preset": "qwen-7b"}
        data, train = filled["data"], filled["train"]
        if isinstance(data, dict) and isinstance(train, dict) and data.get("cache_dir"):
            filled["train"] = {"compilation_cache": f"{data['cache_dir']}/xla", **train}
        return {**values, **filled}

    @model_validator(mode="after")
    def check(self) -> "Config":
        if self.train.early_stopping_patience and not self.eval.every:
            raise ValueError(
                "train.early_stopping_patience counts held-out evaluations, and eval.every 0 makes "
                "none on the way; set eval.every to a number of steps"
            )
        if self.lora.rank and self.model.param_dtype != "float32":
            raise ValueError(
                "model.param_dtype has no effect with lora, whose adapters are float32; remove it, "
                "or set lora.base_dtype, the dtype of the frozen parameters"
            )
        if self.checkpoint.save_base and not self.lora.rank:
            raise ValueError("checkpoint.save_base has no effect without lora.rank; remove it")
        if self.checkpoint.save_base and self.lora.quantization:
            raise ValueError(
                f"checkpoint.save_base cannot save a base in {self.lora.base_dtype}; remove it: a "
                f"checkpoint names the base, which is quantised again when it is read"
            )
        self._check_names()
        return self

    @property
    def param_dtype(self) -> str:
        """The dtype of the parameters but for adapters and quantised matrices.

        It is `auto` where the platform decides it.
        """
        if self.lora.quantization:
            return self.model.compute_dtype
        return self.lora.base_dtype if self.lora.rank else self.model.param_dtype

    def _check_names(self) -> None:
        """Refuses a metric or a domain that the experiment does not have."""
        names = [domain.name for domain in self.data.domains]
        metrics = [
            f"eval/{name}/{kind}"
            for name in (*names, "mean")
            for kind in ("loss", "default_prompt/loss")
        ]
        if self.checkpoint.best_metric not in metrics:
            raise ValueError(
                f"checkpoint.best_metric {self.checkpoint.best_metric!r} is never measured; use "
                f"one of {', '.join(metrics)}"
            )
        for sample in self.train.sample_prompts:
            if sample.domain not in names:
                raise ValueError(
                    f"train.sample_prompts names the domain {sample.domain!r}, which is not "
                    f"among data.domains ({', '.join(names)})"
                )

    def to_yaml(self) -> str:
        """The resolved config as YAML: every key with its value, and no `base`."""
        return yaml.safe_dump(
            self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
        )
