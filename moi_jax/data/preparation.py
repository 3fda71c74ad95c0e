"""Preparing the data of a config ahead of training, with a report of what there is."""

import time
from typing import Any

from moi_jax.config import Config
from moi_jax.data.cache.selection import row_counts
from moi_jax.data.dataset import open_dataset
from moi_jax.text.tokenizer import Tokenizer


def prepare_data(config: Config, tokenizer: Tokenizer) -> dict[str, Any]:
    """Brings the sources into the cache, plans the first epoch and logs the mixture.

    Returns:
      domains (where the rows of each went), files, mixture, and seconds (of prepare and plan).

    Raises:
      UserError: see `open_dataset`.
    """
    begin = time.perf_counter()
    dataset = open_dataset(config, tokenizer)
    prepared = time.perf_counter()
    mixture = dataset.log_mixture(dataset.plan())
    planned = time.perf_counter()
    return {
        "domains": row_counts(dataset.caches, dataset.selections),
        "files": {cache.name: cache.manifest["files"] for cache in dataset.caches},
        "mixture": mixture,
        "seconds": {"prepare": round(prepared - begin, 3), "plan": round(planned - prepared, 3)},
    }
