"""From the items of a task to the model's answers, each kept on disk as soon as it is there."""

import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from moi_jax.evaluation.options import Options
from moi_jax.evaluation.protocol import Answer, Item, Task
from moi_jax.sampling.chat_model import ChatModel
from moi_jax.sampling.requests import Request
from moi_jax.sampling.response_log import ResponseKey, ResponseLog
from moi_jax.text.conversations import Message

Json = dict[str, Any]
T = TypeVar("T")


def answer_items(
    task: Task,
    items: Sequence[Item],
    model: ChatModel,
    options: Options,
    log: ResponseLog,
    advance: Callable[[int], None],
) -> list[tuple[Item, Answer]]:
    """Every item's answer: those the log has, and the model's for the others.

    Args:
      advance: told the number of answers (turns, samples, choices) that came.
    """
    asked = [item for item in items if not item.choices]
    chosen = [item for item in items if item.choices]
    if chosen:
        _score_choices(chosen, model, log, advance)
    for turn in range(max((1 + len(item.follow_ups) for item in asked), default=0)):
        _ask(task, [item for item in asked if turn <= len(item.follow_ups)], turn, model, options,
             log, advance)  # fmt: skip
    return [(item, _answer(item, options, log)) for item in items]


def places(item: Item, options: Options) -> list[ResponseKey]:
    """Where an item's texts or likelihoods stand in the log."""
    count = len(item.choices) or (options.samples if not item.follow_ups else 0)
    return [(item.id, n) for n in range(count or 1 + len(item.follow_ups))]


def _answer(item: Item, options: Options, log: ResponseLog) -> Answer:
    records = [log.found[place] for place in places(item, options)]
    finishes = tuple(record["finish"] for record in records)
    if item.choices:
        return Answer((), finishes, tuple(record["log_likelihood"] for record in records))
    return Answer(tuple(record["text"] for record in records), finishes)


def _ask(
    task: Task,
    items: Sequence[Item],
    turn: int,
    model: ChatModel,
    options: Options,
    log: ResponseLog,
    advance: Callable[[int], None],
) -> None:
    """One turn of all the items, in one go: the sampler keeps its slots filled."""
    requests, waiting = [], []
    for item in items:
        prompt = model.prompt(_so_far(item, turn, log), system_block=item.system_block)
        for place in [(item.id, turn)] if item.follow_ups else places(item, options):
            if log.has(place, prompt):
                advance(1)
            else:
                waiting.append(place)
                requests.append(_request(task, item, place, prompt, options))
    for index, completion in model.sampler.run(model.parameters, requests):
        log.add(
            waiting[index],
            requests[index].prompt,
            text=completion.text,
            finish=completion.finish,
        )
        advance(1)


def _so_far(item: Item, turn: int, log: ResponseLog) -> list[Message]:
    """The conversation up to the user's message of a turn."""
    messages = list(item.messages)
    for number, question in enumerate(item.follow_ups[:turn]):
        messages += [
            Message("assistant", log.found[item.id, number]["text"]),
            Message("user", question),
        ]
    return messages


def _request(
    task: Task, item: Item, place: ResponseKey, prompt: Sequence[int], options: Options
) -> Request:
    temperature = options.temperature
    if temperature is None:
        temperature = item.temperature or 0.0
    return Request(
        prompt,
        max_new_tokens=options.max_new_tokens or task.max_new_tokens,
        temperature=temperature,
        top_p=options.top_p,
        # Of the place alone: an answer is the same whatever else is asked in the run.
        seed=zlib.crc32(f"{options.seed}/{task.name}/{place[0]}/{place[1]}".encode()),
        stop_strings=task.stop_strings,
    )


def _score_choices(
    items: Sequence[Item], model: ChatModel, log: ResponseLog, advance: Callable[[int], None]
) -> None:
    pairs, waiting = [], []
    for item in items:
        prompt = model.prompt(item.messages, system_block=item.system_block)
        for n, choice in enumerate(item.choices):
            place, pair = (item.id, n), (prompt, model.tokenizer.encode(choice))
            if log.has(place, [*prompt, *pair[1]]):
                advance(1)
            else:
                waiting.append(place)
                pairs.append(pair)
    for index, likelihood in model.scorer.run(model.parameters, pairs):
        log.add(
            waiting[index],
            [*pairs[index][0], *pairs[index][1]],
            log_likelihood=likelihood.log_likelihood,
            finish=likelihood.finish,
        )
        advance(1)


def evenly_spaced(items: Sequence[T], limit: int | None) -> list[T]:
    """`limit` of the items, spread over all of them; all where there are no more."""
    if limit is None or limit >= len(items):
        return list(items)
    return [items[n * len(items) // limit] for n in range(limit)]
