"""The model's responses to the items of a task. Each one is written to disk at once."""

import logging
import zlib
from collections.abc import Callable, Sequence
from typing import Any

from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import Item, Response, Task
from moi_jax.sampling.chat_model import ChatModel
from moi_jax.sampling.requests import Request
from moi_jax.sampling.response_log import ResponseKey, ResponseLog
from moi_jax.text.answers import read_answer
from moi_jax.text.conversations import Message
from moi_jax.text.templates import Template

logger = logging.getLogger(__name__)

Json = dict[str, Any]


def collect_responses(
    task: Task,
    items: Sequence[Item],
    model: ChatModel,
    options: BenchmarkOptions,
    log: ResponseLog,
    on_progress: Callable[[int], None],
) -> list[tuple[Item, Response]]:
    """The response to every item: from the log where it has one, else from the model.

    Args:
      on_progress: called with the number of new answers (turns, samples or choices).
    """
    generated = [item for item in items if not item.choices]
    scored = [item for item in items if item.choices]
    if scored:
        _score_choices(scored, model, log, on_progress)
    for turn in range(max((1 + len(item.follow_ups) for item in generated), default=0)):
        in_turn = [item for item in generated if turn <= len(item.follow_ups)]
        _generate(task, in_turn, turn, model, options, log, on_progress)
    template = model.tokenizer.template
    return [(item, _response(item, options, log, template)) for item in items]


def count_tokens(places: Sequence[ResponseKey], log: ResponseLog) -> Json:
    """The tokens of all prompts and of all answers so far.

    A figure is left out where a record has no count: likelihoods, and answers of older versions.
    """
    records = [log.found[place] for place in places if place in log.found]
    return {
        name: sum(record[key] for record in records)
        for name, key in (("prompt_tokens", "prompt_tokens"), ("answer_tokens", "tokens"))
        if all(key in record for record in records)
    }


def forget_changed(
    items: Sequence[Item], model: ChatModel, options: BenchmarkOptions, log: ResponseLog
) -> None:
    """Takes the responses to prompts that have changed since out of `log.found`."""
    known = {item for item, _ in log.found}
    for item in items:
        if item.id not in known:
            continue
        if item.choices:
            for n, (prompt, choice) in enumerate(_choice_pairs(item, model)):
                _forget_unless_same([(item.id, n)], [*prompt, *choice], log)
            continue
        for turn in range(1 + len(item.follow_ups)):
            if turn and (item.id, turn - 1) not in log.found:
                log.found.pop((item.id, turn), None)  # it continues an answer that is gone
            else:
                places = _places_of_turn(item, turn, options)
                _forget_unless_same(places, _prompt(item, turn, model, log), log)


def _forget_unless_same(
    places: Sequence[ResponseKey], prompt: Sequence[int], log: ResponseLog
) -> None:
    for place in places:
        if not log.has(place, prompt):
            log.found.pop(place, None)


def log_places(item: Item, options: BenchmarkOptions) -> list[ResponseKey]:
    """The places of an item's texts or likelihoods in the log."""
    count = len(item.choices) or (options.samples if not item.follow_ups else 0)
    return [(item.id, n) for n in range(count or 1 + len(item.follow_ups))]


def _places_of_turn(item: Item, turn: int, options: BenchmarkOptions) -> list[ResponseKey]:
    """The places of an item's texts in this turn: several where there are several samples."""
    return [(item.id, turn)] if item.follow_ups else log_places(item, options)


def _response(
    item: Item, options: BenchmarkOptions, log: ResponseLog, template: Template
) -> Response:
    records = [log.found[place] for place in log_places(item, options)]
    finishes = tuple(record["finish"] for record in records)
    if item.choices:
        return Response((), finishes, tuple(record["log_likelihood"] for record in records))
    texts = tuple(record["text"] for record in records)
    if not item.tools:
        return Response(texts, finishes)
    answers = tuple(read_answer(text, template, item.tools) for text in texts)
    return Response(texts, finishes, answers=answers)


def _generate(
    task: Task,
    items: Sequence[Item],
    turn: int,
    model: ChatModel,
    options: BenchmarkOptions,
    log: ResponseLog,
    on_progress: Callable[[int], None],
) -> None:
    """Generates one turn of all items in one call, so that the sampler keeps its slots full."""
    requests, waiting = [], []
    for item in items:
        prompt = _prompt(item, turn, model, log)
        for place in _places_of_turn(item, turn, options):
            if log.has(place, prompt):
                on_progress(1)
            else:
                waiting.append(place)
                requests.append(_request(task, item, place, prompt, options))
    if requests:
        memory = model.sampler.describe(model.parameters, requests)
        logger.info(f"{task.name}: {len(requests)} answers; {memory}")
    for index, completion in model.sampler.run(model.parameters, requests):
        log.add(
            waiting[index],
            requests[index].prompt,
            text=completion.text,
            finish=completion.finish,
            tokens=len(completion.tokens),
            prompt_tokens=len(requests[index].prompt),
        )
        on_progress(1)


def _prompt(item: Item, turn: int, model: ChatModel, log: ResponseLog) -> list[int]:
    """The ids of the prompt of this turn; the log has the answers to the turns before."""
    so_far = _so_far(item, turn, log, model.tokenizer.template)
    return model.prompt(so_far, item.tools, system_block=item.system_block)


def _so_far(item: Item, turn: int, log: ResponseLog, template: Template) -> list[Message]:
    """The conversation up to and with the user's message of this turn.

    Thinking stands apart where the template wants it so, as in training.
    """
    messages = list(item.messages)
    for number, question in enumerate(item.follow_ups[:turn]):
        messages += [
            read_answer(log.found[item.id, number]["text"], template),
            Message("user", question),
        ]
    return messages


def _request(
    task: Task, item: Item, place: ResponseKey, prompt: Sequence[int], options: BenchmarkOptions
) -> Request:
    temperature = options.temperature
    if temperature is None:
        temperature = item.temperature or 0.0
    return Request(
        prompt,
        max_new_tokens=options.max_new_tokens or task.max_new_tokens,
        temperature=temperature,
        top_p=options.top_p,
        # Made from the place alone, so that an answer does not depend on the rest of the run.
        seed=zlib.crc32(f"{options.seed}/{task.name}/{place[0]}/{place[1]}".encode()),
        stop_strings=task.stop_strings,
    )


def _score_choices(
    items: Sequence[Item], model: ChatModel, log: ResponseLog, on_progress: Callable[[int], None]
) -> None:
    pairs, waiting = [], []
    for item in items:
        for n, pair in enumerate(_choice_pairs(item, model)):
            place = (item.id, n)
            if log.has(place, [*pair[0], *pair[1]]):
                on_progress(1)
            else:
                waiting.append(place)
                pairs.append(pair)
    for index, likelihood in model.scorer.run(model.stacked, pairs):
        log.add(
            waiting[index],
            [*pairs[index][0], *pairs[index][1]],
            log_likelihood=likelihood.log_likelihood,
            finish=likelihood.finish,
        )
        on_progress(1)


def _choice_pairs(item: Item, model: ChatModel) -> list[tuple[list[int], list[int]]]:
    """The ids of the prompt and of the choice, for each choice of an item."""
    prompt = model.prompt(item.messages, system_block=item.system_block)
    return [(prompt, model.tokenizer.encode(choice)) for choice in item.choices]
