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
from moi_jax.data.cache.writer import NOTES, RENDERING_NOTES
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
          The mixture, see `mixture`.
        """
        mixture, data = self.mixture(plan), self.config.data
        log_source_table(self.caches)
        stages = mixture.get("stages", [mixture])
        for number, stage in enumerate(stages):
            if data.stages:
                log.info(f"stage {number}, from row {stage['begins']:,}")
            log_mixture_table(stage, data)
        for number, late in enumerate(data.stages[len(stages) :], len(stages)):
            log.info(f"stage {number} begins at row {late.begins:,}, after the run's last row")
        if plan.empty_rows:
            log.info(f"{plan.empty_rows} empty rows fill up the run's last batch")
        return mixture

    def mixture(self, plan: TrainingPlan) -> dict[str, Any]:
        """The mixture of the first epoch, see `mixture_statistics`.

        For a curriculum it is that of the first stage, with those of all stages that the run
        reaches under "stages".
        """
        report, data = row_counts(self.caches, self.selections), self.config.data
        mixtures = []
        for stage, begins in enumerate([stage.begins for stage in data.stages] or [0]):
            if begins >= plan.total_rows:
                break
            epoch = plan.epoch_plan(plan.locate(begins)[0])
            mixture = mixture_statistics(epoch, report, data.of_stage(stage), plan.batch_rows)
            for name, domain in mixture["domains"].items():
                domain |= {note: report[name][note] for note in (*NOTES, *RENDERING_NOTES)}
            mixtures.append({"begins": begins, **mixture})
        return {**mixtures[0], "stages": mixtures} if data.stages else mixtures[0]

    @property
    def fingerprint(self) -> str:
        """A fingerprint of the content of all sources and of what is held out, not of the paths."""
        data = self.config.data
        shares = [source.held_out for domain in data.domains for source in domain.sources]
        held_out = [(share or data.held_out).model_dump() for share in shares]
        return json_fingerprint([held_out, [cache.key for cache in self.caches]])

    @property
    def sources(self) -> dict[str, dict[str, Any]]:
        """Domain -> {"key": of its cache, "files": {name: sha256 hex of its content}}."""
        return {
            cache.name: {"key": cache.key, "files": dict(cache.digests)} for cache in self.caches
        }


def open_dataset(config: Config, tokenizer: Tokenizer) -> Dataset:
    """Prepares what the cache lacks, and selects what is trained on.

    Raises:
      UserError: see `prepare`, `select` and `check_placeable`.
    """
    return select_dataset(config, tokenizer, prepare(config.data, tokenizer))


def select_dataset(config: Config, tokenizer: Tokenizer, caches: list[DomainCache]) -> Dataset:
    """Selects what is trained on from the prepared domains, in config order.

    Raises:
      UserError: see `select` and `check_placeable`.
    """
    selections = select(caches, config.data.held_out, config.loss.targets, config.data.domains)
    corpus = Corpus.of_training(caches, selections, config.loss.targets)
    kept = check_placeable(corpus, config.data)
    if not kept.all():
        log_left_out(corpus, kept, config.data)
        of_domain = np.split(kept, corpus.offsets[1:-1])
        selections = [
            selection.keep(mine, cache)
            for selection, mine, cache in zip(selections, of_domain, caches, strict=True)
        ]
        corpus = Corpus.of_training(caches, selections, config.loss.targets)
    return Dataset(config, tokenizer, caches, selections, corpus)
