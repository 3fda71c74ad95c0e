"""The opened data of an experiment: prepared, selected, and ready to be planned and read.

dataset = open_dataset(config, tokenizer)
plan = dataset.plan()
batch = dataset.batch_reader(plan).read(range(plan.batch_rows))
"""

import dataclasses
import logging
from typing import Any

import numpy as np

from moi_jax.common.fingerprint import json_fingerprint
from moi_jax.config import Config
from moi_jax.data.cache.domain import DomainCache
from moi_jax.data.cache.prepare import prepare
from moi_jax.data.cache.selection import Selection, row_counts, select
from moi_jax.data.cache.writer import NOTES
from moi_jax.data.loader import BatchReader
from moi_jax.data.planning.corpus import Corpus
from moi_jax.data.planning.mixture_report import (
    log_mixture_table,
    log_source_table,
    mixture_statistics,
)
from moi_jax.data.planning.placeable import check_placeable, log_left_out
from moi_jax.data.planning.training_plan import TrainingPlan
from moi_jax.text.tokenizer import Tokenizer

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Dataset:
    """The tokenised domains of a config, in config order.

    Attributes:
      caches: all instructions of each domain.
      selections: which instructions of each cache are trained on, and which are held out.
      corpus: the lengths of the training instructions, which is all that planning needs.
    """

    config: Config
    tokenizer: Tokenizer
    caches: list[DomainCache]
    selections: list[Selection]
    corpus: Corpus

    def plan(self) -> TrainingPlan:
        """The plan of the run that the config describes, from its first row."""
        return TrainingPlan(self.corpus, self.config.data, self.config.train)

    def batch_reader(self, plan: TrainingPlan) -> BatchReader:
        """Reads the rows of a plan of this corpus from the caches."""
        train = [selection.train for selection in self.selections]
        pad = self.tokenizer.template.pad
        return BatchReader(plan, self.caches, train, self.config.loss, pad)

    def log_mixture(self, plan: TrainingPlan) -> dict[str, Any]:
        """Logs the sources, the dropped rows and the mixture of the first epoch of each stage.

        Returns:
          The mixture, see `mixture_statistics`; for a curriculum that of the first stage, with
          those of all stages under "stages".
        """
        report, data = row_counts(self.caches, self.selections), self.config.data
        log_source_table(self.caches)
        mixtures = []
        for stage, begins in enumerate([stage.begins for stage in data.stages] or [0]):
            if begins >= plan.total_rows:
                log.info(f"stage {stage} begins at row {begins:,}, after the run's last row")
                break
            epoch = plan.epoch_plan(plan.locate(begins)[0])
            mixture = mixture_statistics(epoch, report, data.of_stage(stage), plan.batch_rows)
            for name, domain in mixture["domains"].items():
                domain |= {note: report[name][note] for note in NOTES}
            if data.stages:
                log.info(f"stage {stage}, from row {begins:,}")
            log_mixture_table(mixture, data)
            mixtures.append({"begins": begins, **mixture})
        if plan.empty_rows:
            log.info(f"{plan.empty_rows} empty rows fill up the run's last batch")
        return {**mixtures[0], "stages": mixtures} if data.stages else mixtures[0]

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the content of all sources and of what is held out, not of the paths."""
        data = self.config.data
        shares = [source.held_out for domain in data.domains for source in domain.sources]
        held_out = [(share or data.held_out).model_dump() for share in shares]
        return json_fingerprint([held_out, [cache.key for cache in self.caches]])


def open_dataset(config: Config, tokenizer: Tokenizer) -> Dataset:
    """Prepares what the cache lacks, and selects what is trained on.

    Raises:
      UserError: see `prepare`, `select` and `check_placeable`.
    """
    caches = prepare(config.data, tokenizer)
    selections = select(caches, config.data.held_out, config.loss.targets, config.data.domains)
    corpus = Corpus.of_training(caches, selections, config.loss.targets)
    kept = check_placeable(corpus, config.data)
    if not kept.all():
        log_left_out(corpus, kept, config.data)
        of_domain = np.split(kept, corpus.offsets[1:-1])
        selections = [s.keep(mine) for s, mine in zip(selections, of_domain, strict=True)]
        corpus = Corpus.of_training(caches, selections, config.loss.targets)
    return Dataset(config, tokenizer, caches, selections, corpus)
