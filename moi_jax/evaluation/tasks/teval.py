"""T-Eval: planning, reasoning, and choosing and calling tools, step by step (Chen et al. 2023)."""

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import ClassVar

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Json, Response, Score, Task
from moi_jax.evaluation.teval.embedder import UPSTREAM, Embedder, Similarity, load_embedder
from moi_jax.evaluation.teval.native import CALLING, documented_tools, in_published_form
from moi_jax.evaluation.teval.records import SubtaskFile, find_files, load_file
from moi_jax.evaluation.teval.scoring import NEED_EMBEDDER, SUBTASK_METRICS, Variant, score_answer

METRIC_VERSION = "v2"  # v1 compared the arguments of understand by embeddings
PUBLISHED = (
    "instruct_json", "instruct_str", "plan_json", "plan_str", "reason_str", "retrieve_str",
    "understand_str", "reason_retrieve_understand_json", "review_str",
)  # fmt: skip
# Numbers of records in the paper. For the other subtasks they differ between releases.
PUBLISHED_RECORDS = {"plan_json": 553, "plan_str": 553, "review_str": 487}


class TEval(Task):
    """Runs all subtasks that have files in DATA/teval.

    The score is the mean of six subtasks. A subtask is the mean of its variants, which ask for JSON
    or for plain text. If the data is in two languages, the score is of the English files. Plan and
    reason are scored only with a sentence embedder.
    """

    name = "teval"
    files = "teval/*.json"
    scoring = "The score is the mean of the six abilities of T-Eval"
    stop_strings: ClassVar[tuple[str, ...]] = (
        "<eoa>", "<|im_end|>", "\nuser", "\nassistant", "[INST]",
    )  # fmt: skip

    def __init__(self, options: BenchmarkOptions, embedder: Embedder | None = None):
        """
        Args:
          embedder: used instead of the one in the options.
        """
        super().__init__(options)
        self._files: list[SubtaskFile] = []
        self._records: Counter[str] = Counter()  # by variant
        self._similarity = Similarity(embedder) if embedder is not None else None
        self._embedder = "as given" if embedder is not None else None
        self._no_embedder = ""  # why there is none
        self._native = options.teval_tools == "native"

    def load(self) -> list[Item]:
        folder, system = self.options.data / "teval", self.options.teval_system
        self._files = find_files(folder)
        tools = documented_tools(folder) if self._native else None
        items = [item for file in self._files for item in load_file(file, system, tools)]
        self._records = Counter(item.group for item in items)
        needed = any(subtask in file.tasks for file in self._files for subtask in NEED_EMBEDDER)
        if needed and self._similarity is None:
            self._find_embedder()
        return items

    def _find_embedder(self) -> None:
        """Loads the embedder of the options, or upstream's if it is on this machine.

        Called before the model runs, so that a missing embedder is reported at once.
        """
        named = self.options.teval_embedder
        name = named or UPSTREAM[min(file.language for file in self._files)]
        try:
            self._similarity = Similarity(load_embedder(name, download=named is not None))
            self._embedder = name
        except UserError as error:
            if named:
                raise
            self._no_embedder = str(error)

    def score(self, responses: Iterable[tuple[Item, Response]]) -> Iterator[Score]:
        for item, response in responses:
            variant = Variant.of(item.group)
            texts: Iterable[str] = response.texts
            if item.tools:
                texts = (in_published_form(a, variant, item.gold) for a in response.answers)
            scores = [
                score_answer(
                    variant, text, item.gold, self._similarity, compat=self.options.teval_compat
                )
                for text in texts
            ]
            yield _mean(scores)

    def weights(self, counts: Mapping[str, int]) -> dict[str, float] | None:
        languages = {Variant.of(metric.split("/")[0]).language for metric in counts}
        language = min(languages, default="")
        weights = {}
        for subtask, metrics in SUBTASK_METRICS.items():
            variants = [Variant(subtask, form, language) for form in ("json", "str")]
            names = [variant.metric(subtask, metric) for variant in variants for metric in metrics]
            measured = [name for name in names if counts.get(name)]
            if not measured:
                return None
            weights.update({name: 1 / len(SUBTASK_METRICS) / len(measured) for name in measured})
        return weights

    def is_complete(self, items: Sequence[Item]) -> bool:
        """Whether every published variant of one language is there and none is known to be short.

        Calls in native form are another benchmark than the published one.

        The number of records is known only for plan and review. A file of another subtask counts
        as complete, whatever its length.
        """
        counts = Counter(item.group for item in items)
        return not self._native and any(
            all(
                counts[variant + language] >= PUBLISHED_RECORDS.get(variant, 1)
                for variant in PUBLISHED
            )
            for language in ("", "_zh")
        )

    def settings(self) -> Json:
        return {
            "data_version": self._data_version(),
            "metric_version": METRIC_VERSION,
            "teval_system": self.options.teval_system,
            "teval_tools": self.options.teval_tools,
            "teval_compat": self.options.teval_compat,
            "teval_embedder": self._embedder,
            "files": [file.path.name for file in self._files],
        }

    def _data_version(self) -> str:
        return " and ".join(sorted({file.version for file in self._files}))

    def notes(self, items: Sequence[Item], scores: Sequence[Score]) -> list[str]:
        notes = [f"T-Eval data {self._data_version()}, scored by the rules of {METRIC_VERSION}"]
        if self._native:
            notes.append(
                f"calls are in the model's own form in {' and '.join(CALLING)}, so the score "
                f"cannot be compared with published ones"
            )
        asked = {subtask for item in items for subtask in Variant.of(item.group).subtasks}
        there = {subtask for name in self._records for subtask in Variant.of(name).subtasks}
        missing = [subtask for subtask in SUBTASK_METRICS if subtask not in there]
        left_out = [subtask for subtask in SUBTASK_METRICS if subtask in there - asked]
        unscored = [subtask for subtask in NEED_EMBEDDER if subtask in asked]
        if missing:
            notes.append(f"not measured, because there is no data: {', '.join(missing)}")
        if left_out:
            notes.append(f"not measured, because no item was run: {', '.join(left_out)}")
        for name, count in self._records.items():
            least = PUBLISHED_RECORDS.get(name.removesuffix("_zh"), 0)
            if count < least:
                notes.append(f"{name}: {count} of at least {least} records")
        if unscored and self._similarity is None:
            notes.append(f"not scored: {', '.join(unscored)}: {self._no_embedder}")
        if {Variant.of(item.group).language for item in items} == {"", "zh"}:
            notes.append(
                "the score is of the English files; those in Chinese are reported beside it"
            )
        return notes


def _mean(scores: Sequence[Score]) -> Score:
    """The mean over the samples of an item, with failure and details of the first sample."""
    first = scores[0]
    metrics = {name: fmean(score.metrics[name] for score in scores) for name in first.metrics}
    return Score(metrics, first.failure, first.details)
