"""The whole experiment: one frozen object whose every default is resolved."""

from typing import Any

import yaml
from pydantic import model_validator

from moi_jax.config.data import Data
from moi_jax.config.evaluation import Eval
from moi_jax.config.model import Model, TokenizerConfig
from moi_jax.config.run import Checkpoint, Logging
from moi_jax.config.section import Section
from moi_jax.config.training import Loss, Mesh, Optimizer, Train


class Config(Section):
    """The whole experiment; `load_config` makes it, `to_yaml` prints it resolved."""

    model: Model = Model()
    tokenizer: TokenizerConfig = TokenizerConfig()
    data: Data = Data()
    loss: Loss = Loss()
    optimizer: Optimizer = Optimizer()
    mesh: Mesh = Mesh()
    train: Train = Train()
    eval: Eval = Eval()
    checkpoint: Checkpoint = Checkpoint()
    logging: Logging = Logging()

    @model_validator(mode="before")
    @classmethod
    def fill_sections(cls, values: Any) -> Any:
        """Sections left out or empty are read as {}, so that their own defaults resolve."""
        if not isinstance(values, dict):
            return values
        filled = {
            name: {} if values.get(name) is None else values[name] for name in cls.model_fields
        }
        model = filled["model"]
        if isinstance(model, dict) and not model.get("init_from") and not model.get("preset"):
            filled["model"] = {**model, "preset": "qwen-7b"}
        return {**values, **filled}

    @model_validator(mode="after")
    def check_names(self) -> "Config":
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
        return self

    def to_yaml(self) -> str:
        return yaml.safe_dump(
            self.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=100
        )
