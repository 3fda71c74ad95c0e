"""MoI rows of the public sets (configs/public_sets.yaml), for benchmarks that train on them."""

import itertools
from pathlib import Path

import moi_jax
from moi_jax import config as config_lib
from moi_jax.config.load import load_config
from moi_jax.data.loader import Batch

PUBLIC_SETS = Path(__file__).parent.parent / "configs" / "public_sets.yaml"


def public_config(root: str, *overrides: str, tokenizer: str | None = None) -> config_lib.Config:
    """The config of the public sets.

    Args:
      root: data.root, the directory that holds them.
      overrides: other options, key=value.
      tokenizer: tokenizer.path, of the Qwen family; None is that of the sample set.
    """
    # The loader asks for a model whose vocabulary has room for the tokens.
    chosen = [f"tokenizer.path={tokenizer}", "model.preset=qwen-7b"] if tokenizer else []
    return load_config(PUBLIC_SETS, [f"data.root={root}", *chosen, *overrides])


def public_batches(config: config_lib.Config, count: int) -> list[Batch]:
    """The first batches of the train split; it begins again where the sets are small."""
    return list(itertools.islice(itertools.cycle(moi_jax.batches(config)), count))
