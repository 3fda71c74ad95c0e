"""The protocol of a benchmark: load() gives items, the model responds, score() gives scores."""

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
      messages: the conversation that the model continues; the last message is the user's. A
        system message at its head replaces the evaluation's system prompt.
      gold: the reference that `Task.score` compares with.
      follow_ups: further user messages. Each is sent after the answer to the one before.
      group: a subject, category or subtask that has figures of its own in the results.
      temperature: set by the protocol; None is 0. The options may override it.
      choices: possible answers. If there are any, nothing is generated: the model gives the
        log-likelihood of each choice.
      system_block: False for a prompt without a system block.
      tools: that the model may call in its own form, see `Conversation`.
    """

    id: str
    messages: tuple[Message, ...]
    gold: Any
    follow_ups: tuple[str, ...] = ()
    group: str = ""
    temperature: float | None = None
    choices: tuple[str, ...] = ()
    system_block: bool = True
    tools: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Response:
    """The model's response to an item.

    Attributes:
      texts: one per turn, or one per sample where several were asked for.
      finishes: why each text ended, see sampling.requests.Finish.
      log_likelihoods: one per choice of the item, in nats.
      answers: of an item with tools: the texts as messages, with their calls apart.
    """

    texts: tuple[str, ...] = ()
    finishes: tuple[str, ...] = ()
    log_likelihoods: tuple[float, ...] = ()
    answers: tuple[Message, ...] = ()


@dataclass(frozen=True, slots=True)
class Score:
    """The score of a response.

    Attributes:
      metrics: name -> value from 0 to 1 (a rating keeps its own scale). A metric that does not
        apply to this item, or that is missing, is left out.
      failure: why the response is wrong, where that is known ("no answer", "timeout", ...).
      details: what a reader of the samples wants to see, such as the extracted answer.
    """

    metrics: dict[str, float]
    failure: str | None = None
    details: Json = field(default_factory=dict)


class Task(ABC):
    """A benchmark: a file in `tasks/`, and a line in `tasks.TASKS`.

    Attributes:
      files: the files below the data directory that the task reads, for messages.
      max_new_tokens, stop_strings: the limits of every answer.
      scoring: what makes an answer right, a sentence without its full stop.
      turns: answers to an item, each to a further message of the user.
      own_temperature: of the protocol where it samples, in words.
      rated: whether metrics are ratings; otherwise they are shares, from 0 (wrong) to 1 (right).
      takes_shots: whether the task can show worked examples before the question.
      published_sizes: the number of items in the benchmark, one for each published form. A score
        over another number of items is not part of the overall score. () allows any number.
    """

    name: ClassVar[str]
    files: ClassVar[str]
    max_new_tokens: ClassVar[int] = 512
    stop_strings: ClassVar[tuple[str, ...]] = ()
    scoring: str = ""
    turns: ClassVar[int] = 1
    own_temperature: ClassVar[str] = ""
    rated: ClassVar[bool] = False
    takes_shots: ClassVar[bool] = False
    published_sizes: ClassVar[tuple[int, ...]] = ()

    def __init__(self, options: BenchmarkOptions):
        """Raises UserError where the options or the machine do not allow this task."""
        if options.shots and not self.takes_shots:
            raise UserError(
                f"{self.name} has no worked examples; use --shots only with gsm8k, mbpp and mmlu"
            )
        self.options = options

    @abstractmethod
    def load(self) -> list[Item]:
        """Returns all items, in the order of the file.

        Raises:
          UserError: a file is missing or a row is malformed. The message names the file or row.
        """

    @abstractmethod
    def score(self, responses: Iterable[tuple[Item, Response]]) -> Iterator[Score]:
        """Yields a score for each response, in order."""

    @abstractmethod
    def weights(self, counts: Mapping[str, int]) -> dict[str, float] | None:
        """The weight of each metric. The score is 100 times the weighted sum of the metrics' means.

        Args:
          counts: metric -> number of items that have it.

        Returns:
          None where metrics that the score needs were not measured: then there is no score.
        """

    def settings(self) -> Json:
        """Settings of the task (shots, data version) for the results."""
        return {}

    def notes(self, items: Sequence[Item], scores: Sequence[Score]) -> list[str]:
        """Remarks to show beside the score, such as which part of the benchmark was run."""
        return []

    def is_complete(self, items: Sequence[Item]) -> bool:
        """Whether the items are the whole benchmark."""
        return not self.published_sizes or len(items) in self.published_sizes


def evenly_spaced(items: Sequence[T], limit: int | None) -> list[T]:
    """Returns `limit` items, evenly spaced over all of them; all items where there are no more."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[n * len(items) // limit] for n in range(limit)]
