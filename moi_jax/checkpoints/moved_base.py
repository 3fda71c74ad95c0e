"""The base of the adapters of a run that resumes, where it has moved since the run began."""

import dataclasses
import logging
from pathlib import Path

from moi_jax.checkpoints.base import OtherBase
from moi_jax.checkpoints.init_from import base_checkpoint
from moi_jax.checkpoints.items import Base
from moi_jax.checkpoints.parameters import read_beside
from moi_jax.config import Config
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Tree
from moi_jax.parallel import hosts

log = logging.getLogger(__name__)


def read_base_again(
    step: Path, base: Base, config: Config, model: ModelConfig, wanted: Tree
) -> tuple[Tree, Base]:
    """Reads the parameters beside the adapters of a step. All processes call it.

    Where the base is not at its place any more, or another model is there, model.init_from of the
    resumed run names it.

    Args:
      base: as the step has it.
      wanted: all parameters, abstract.

    Returns:
      The parameters but for the adapters, and the base with the place where it is now.

    Raises:
      UserError: the base is at neither place.
    """
    named, verify = config.model.init_from, config.checkpoint.verify
    # All processes go the same way: they read, and import, together.
    there = hosts.in_all("whether the base is there", Path(base.path).is_dir())
    if there or named is None:
        try:
            return read_beside(step, base, model, wanted, verify), base
        except OtherBase as error:
            if named is None:
                raise
            log.warning("%s; trying model.init_from %s", error, named)
    place = base_checkpoint(named, config.data.cache_dir, config.tokenizer.path)
    base = dataclasses.replace(base, path=str(place))
    return read_beside(step, base, model, wanted, verify), base
