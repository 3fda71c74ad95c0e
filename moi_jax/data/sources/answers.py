"""Answers: orders what the assistant does between two messages of the user.

Each result is given to its call, by its id or else by its place. What the assistant does is then a
list of steps, each with the calls that were made together.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from reprlib import repr as shown  # an id may be of any length

from moi_jax.data.sources.events import Call, Event, Observation, Thought, weight_of
from moi_jax.text.conversations import BadRow, Message


@dataclass(eq=False)
class MadeCall:
    """A call and its result; None if there is none yet."""

    call: Call
    result: str | None = None


@dataclass
class Step:
    """What the assistant thinks, then says (None: nothing), then the calls that it makes together.

    A step without calls is the answer to the user.

    Attributes:
      weight: of the labels of all this; None while the step is empty.
      returned: a tool has returned a result since the calls were made.
    """

    thoughts: list[str] = field(default_factory=list)
    said: str | None = None
    calls: list[MadeCall] = field(default_factory=list)
    weight: float | None = None
    returned: bool = False


class Answer:
    """What the assistant and the tools do between two messages of the user, see `assembled`."""

    def __init__(self, typed: bool) -> None:
        self.steps = [Step()]
        self._typed = typed
        self._open: list[MadeCall] = []  # without a result

    @property
    def weight(self) -> float:
        return self.steps[-1].weight or 0.0

    def add(self, event: Event) -> None:
        """Adds what happens next: anything but a message of the user or the system."""
        if isinstance(event, Observation):
            self._answer_call(event)
            return
        step = self._step_of(event)
        if step.weight not in (None, weight_of(event)):
            raise BadRow("bad_weight", "parts of a turn that calls tools differ in weight or train")
        step.weight = weight_of(event)
        if isinstance(event, Call):
            step.calls.append(MadeCall(event))
            self._open.append(step.calls[-1])
        elif self._open:
            raise self._unanswered()
        elif isinstance(event, Thought):
            step.thoughts += [event.text] if event.text.strip() else []
        elif step.said is not None:
            raise BadRow("roles_not_alternating", "two turns in a row are both assistant's")
        else:
            step.said = event.content

    def _step_of(self, event: Event) -> Step:
        """The step that the event belongs to. Calls without a result between them share one."""
        last = self.steps[-1]
        if last.returned or (last.calls and not isinstance(event, Call)):
            self.steps.append(Step(weight=None if self._typed else last.weight))
        return self.steps[-1]

    def _answer_call(self, observation: Observation) -> None:
        if not self._open:
            raise BadRow("observation_without_call", "a tool returns a result without a call")
        found = next((made for made in self._open if observation.id in ("", made.call.id)), None)
        if found is None:
            raise BadRow(
                "observation_without_call", f"no open call has the id {shown(observation.id)}"
            )
        found.result = observation.text
        self._open.remove(found)
        self.steps[-1].returned = True

    def _unanswered(self) -> BadRow:
        return BadRow("call_without_observation", f"{self._open[0].call.name} returned nothing")

    def close(self, last: bool, unfinished: bool = False) -> None:
        """Refuses an answer that is not whole; see `assembled`."""
        step = self.steps[-1]
        if self._open:
            may_stay_open = step.calls if self._typed else step.calls[-1:]
            if not last or self._open != may_stay_open:
                raise self._unanswered()
        elif step.calls or (step.said is None and len(self.steps) > 1):
            if not (step.calls and last and unfinished):
                raise BadRow("unanswered_observation", "no call or answer follows an observation")
        elif step.said is None:
            raise BadRow("empty_assistant", "the assistant has thoughts but no answer")
        elif not step.said.strip():
            raise BadRow("empty_assistant", "an assistant turn is empty")


def assembled(
    events: Iterable[Event], typed: bool, unfinished: bool = False
) -> Iterator[Message | Answer]:
    """The messages of the user and the system, and the answers between them.

    Args:
      typed: each step becomes messages of its own. So the steps may differ in weight, and all calls
        that are made together at the end of a chat may have no result. Otherwise an answer becomes
        one text, and only the very last call may have none.
      unfinished: the chat may end with results, after which the assistant goes on.

    Raises:
      BadRow: calls and results do not match, or an answer is empty.
    """
    answer: Answer | None = None
    for event in events:
        if isinstance(event, Message) and event.role != "assistant":
            if answer:
                answer.close(last=False)
                yield answer
            answer = None
            yield event
        else:
            answer = answer or Answer(typed)
            answer.add(event)
    if answer:
        answer.close(last=True, unfinished=unfinished)
        yield answer
