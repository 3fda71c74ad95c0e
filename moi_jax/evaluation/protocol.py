"""The protocol every benchmark follows: load -> items, item -> conversation, answer -> score."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, TypeVar

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.text.conversations import Message

Json = dict[str, Any]
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Item:
    """One question of a benchmark.

    Attributes:
      id: unique within the task, and the same in every run.
      messages: the conversation that the model goes on from, a user's message last. A system
        message at its head takes the place of the evaluation's system prompt.
      gold: what `Task.score` compares with.
      follow_ups: user messages asked one after another, each after the answer before it.
      group: a subject, category or subtask that is also reported by itself.
      temperature: fixed by the protocol; None is 0, and the options may set another.
      choices: where there are any nothing is generated: the model scores each of these texts as
        its answer.
      system_block: False for a prompt without any system block.
    """

    id: str
    messages: tuple[Message, ...]
    gold: Any
    follow_ups: tuple[str, ...] = ()
    group: str = ""
    temperature: float | None = None
    choices: tuple[str, ...] = ()
    system_block: bool = True


@dataclass(frozen=True, slots=True)
class Response:
    """What the model made of an item.

    Attributes:
      texts: one for each turn, or one for each sample where several were asked.
      finishes: why each text ended, see sampling.requests.Finish.
      log_likelihoods: of each of the item's choices, in nats.
    """

    texts: tuple[str, ...] = ()
    finishes: tuple[str, ...] = ()
    log_likelihoods: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """How an answer did.

    Attributes:
      metrics: name -> value, 0 to 1 (a rating: as it is given). A metric that does not apply to
        this item, or is missing, is left out.
      failure: the kind of a wrong answer where it is known ("no answer", "timeout", ...).
      details: what a reader of the samples wants to see, such as the answer extracted.
    """

    metrics: dict[str, float]
    failure: str | None = None
    details: Json = field(default_factory=dict)


class Task(ABC):
    """A benchmark. `tasks/` has one file for each; `tasks.TASKS` names them.

    Attributes:
      files: below the data directory, what the task reads, told when it is missing.
      max_new_tokens, stop_strings: of every answer.
      takes_shots: whether it has worked examples to show before the question.
      whole: how many items the benchmark has (one number for each published form); a score over
        fewer is no part of the overall figure. () where `weights` alone decides.
    """

    name: ClassVar[str]
    files: ClassVar[str]
    max_new_tokens: ClassVar[int] = 512
    stop_strings: ClassVar[tuple[str, ...]] = ()
    takes_shots: ClassVar[bool] = False
    published_sizes: ClassVar[tuple[int, ...]] = ()

    def __init__(self, options: BenchmarkOptions):
        """Raises UserError where options or the machine do not allow this task."""
        if options.shots and not self.takes_shots:
            raise UserError(
                f"{self.name} has no worked examples; give --shots only with tasks that take them: "
                "gsm8k, mbpp and mmlu"
            )
        self.options = options

    @abstractmethod
    def load(self) -> list[Item]:
        """All items, in the order of the file.

        Raises:
          UserError: a file is missing (says what to put where) or a row malformed (says which).
        """

    @abstractmethod
    def score(self, responses: Iterable[tuple[Item, Response]]) -> Iterator[Score]:
        """A score for each answer, in order; each is kept as soon as it is yielded."""

    @abstractmethod
    def weights(self, counts: Mapping[str, int]) -> dict[str, float] | None:
        """The weights of the metrics' means in the score, which is told as 100 times their sum.

        Args:
          counts: metric -> the number of items that have it.

        Returns:
          None where what was measured is not the whole benchmark: there is no score then.
        """

    def settings(self) -> Json:
        """What the task decided by options or data (shots, data version), for the results."""
        return {}

    def notes(self, items: Sequence[Item], scores: Sequence[Score]) -> list[str]:
        """Lines that belong beside the score, such as how much of the benchmark the data is."""
        return []

    def is_complete(self, items: Sequence[Item]) -> bool:
        """Whether the items are all of the benchmark."""
        return not self.published_sizes or len(items) in self.published_sizes


def evenly_spaced(items: Sequence[T], limit: int | None) -> list[T]:
    """`limit` of the items, spread over all of them; all where there are no more."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[n * len(items) // limit] for n in range(limit)]
