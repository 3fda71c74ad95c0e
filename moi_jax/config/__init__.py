"""The typed experiment: a file for each group of sections; `load` reads one from YAML."""

from moi_jax.config.data import (
    CONTROL_TOKEN,
    Data,
    Decontaminate,
    Domain,
    HeldOut,
    Source,
    Stage,
)
from moi_jax.config.evaluation import Benchmarks, Eval
from moi_jax.config.experiment import Config
from moi_jax.config.lora import LoRA
from moi_jax.config.model import Model, SplashBlocks, TokenizerConfig
from moi_jax.config.run import Checkpoint, Cluster, Logging
from moi_jax.config.section import Section
from moi_jax.config.strategies import STRATEGIES
from moi_jax.config.training import Loss, Mesh, Optimizer, SamplePrompt, Train

__all__ = [
    "CONTROL_TOKEN",
    "STRATEGIES",
    "Benchmarks",
    "Checkpoint",
    "Cluster",
    "Config",
    "Data",
    "Decontaminate",
    "Domain",
    "Eval",
    "HeldOut",
    "LoRA",
    "Logging",
    "Loss",
    "Mesh",
    "Model",
    "Optimizer",
    "SamplePrompt",
    "Section",
    "Source",
    "SplashBlocks",
    "Stage",
    "TokenizerConfig",
    "Train",
]
