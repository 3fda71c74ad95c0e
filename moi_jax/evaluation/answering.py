"""From the items of a task to the model's answers, each kept on disk as soon as it is there."""

import json
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from moi_jax.common.errors import UserError, cannot_write
from moi_jax.evaluation.options import Options
from moi_jax.evaluation.protocol import Answer, Item, Task
from moi_jax.sampling.chat_model import ChatModel
from moi_jax.sampling.requests import Request
from moi_jax.text.conversations import Message

Json = dict[str, Any]
T = TypeVar("T")
# An item's id, and which of its turns, samples or choices.
Place = tuple[str, int]


class AnswerLog:
    """The model's texts and likelihoods by place, appended to a file as they come.

    The first line of the file says what made them; the log of a run that was killed goes on.
    """

    def __init__(self, path: Path | None, made_by: Json):
        """
        Args:
          path: None keeps nothing on disk.

        Raises:
          UserError: the file there was made by something else, or cannot be written.
        """
        self.found: dict[Place, Json] = {}
        self._file = None
        if path is None:
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            lines = _whole_lines(path)
            if lines:
                _check_same(path, json.loads(lines[0]), made_by)
            else:
                path.write_text(json_line(made_by), encoding="utf-8")
            for line in lines[1:]:
                record = json.loads(line)
                self.found[record["id"], record["n"]] = record
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise cannot_write(path, error) from None
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise UserError(f"{path} is damaged ({error}); delete it to begin anew") from None

    def has(self, place: Place, prompt: Sequence[int]) -> bool:
        """Whether there is an answer to this very prompt: the data may have changed since."""
        return self.found.get(place, {}).get("prompt") == _key(prompt)

    def add(self, place: Place, prompt: Sequence[int], **record: Any) -> None:
        item, n = place
        line = {"id": item, "n": n, "prompt": _key(prompt), **record}
        self.found[place] = line
        if self._file:
            whole = json_line(line).encode()
            try:
                written = self._file.write(whole)  # unbuffered: there, or not
            except OSError:
                written = 0
            if written < len(whole):
                raise UserError(
                    f"cannot write {self._file.name}: is the disk full? The answers before are "
                    f"kept, and the same command goes on"
                )

    def close(self) -> None:
        if self._file:
            self._file.close()


def json_line(value: Json) -> str:
    """One line of JSON; half a surrogate pair, which UTF-8 cannot hold, is kept escaped."""
    text = json.dumps(value, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace").decode() + "\n"


def _key(prompt: Sequence[int]) -> str:
    return f"{zlib.crc32(np.array(prompt, np.int32).tobytes()):08x}"


def _whole_lines(path: Path) -> list[str]:
    """The lines of the file, without a last one that a kill left half-written."""
    if not path.exists():
        return []
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with path.open("r+b") as file:
            file.truncate(len(whole))
    return whole.decode().split("\n")[:-1]  # a text may hold U+2028, which splitlines breaks at


def _check_same(path: Path, before: Json, now: Json) -> None:
    """Raises UserError naming what differs."""
    changed = [
        f"{key} {before.get(key)!r} -> {now.get(key)!r}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key)
    ]
    if changed:
        raise UserError(
            f"{path} holds answers made otherwise ({'; '.join(changed)[:300]}); choose another "
            f"--out, or delete that file"
        )


def answer_items(
    task: Task,
    items: Sequence[Item],
    model: ChatModel,
    options: Options,
    log: AnswerLog,
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


def places(item: Item, options: Options) -> list[Place]:
    """Where an item's texts or likelihoods stand in the log."""
    count = len(item.choices) or (options.samples if not item.follow_ups else 0)
    return [(item.id, n) for n in range(count or 1 + len(item.follow_ups))]


def _answer(item: Item, options: Options, log: AnswerLog) -> Answer:
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
    log: AnswerLog,
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


def _so_far(item: Item, turn: int, log: AnswerLog) -> list[Message]:
    """The conversation up to the user's message of a turn."""
    messages = list(item.messages)
    for number, question in enumerate(item.follow_ups[:turn]):
        messages += [
            Message("assistant", log.found[item.id, number]["text"]),
            Message("user", question),
        ]
    return messages


def _request(
    task: Task, item: Item, place: Place, prompt: Sequence[int], options: Options
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
    items: Sequence[Item], model: ChatModel, log: AnswerLog, advance: Callable[[int], None]
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
