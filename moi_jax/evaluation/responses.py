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
    """The tokens of all prompts and of all answers so far; 0 for those of older versions."""
    records = [log.found[place] for place in places if place in log.found]
    return {
        name: sum(record.get(key, 0) for record in records)
        for name, key in (("prompt_tokens", "prompt_tokens"), ("answer_tokens", "tokens"))
    }


def log_places(item: Item, options: BenchmarkOptions) -> list[ResponseKey]:
    """The places of an item's texts or likelihoods in the log."""
    count = len(item.choices) or (options.samples if not item.follow_ups else 0)
    return [(item.id, n) for n in range(count or 1 + len(item.follow_ups))]


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
    requests, waiting, template = [], [], model.tokenizer.template
    for item in items:
        so_far = _so_far(item, turn, log, template)
        prompt = model.prompt(so_far, item.tools, system_block=item.system_block)
        for place in [(item.id, turn)] if item.follow_ups else log_places(item, options):
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
        prompt = model.prompt(item.messages, system_block=item.system_block)
        for n, choice in enumerate(item.choices):
            place, pair = (item.id, n), (prompt, model.tokenizer.encode(choice))
            if log.has(place, [*prompt, *pair[1]]):
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
