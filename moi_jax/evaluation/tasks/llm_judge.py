"""Ratings by a model behind any OpenAI-compatible endpoint, each kept as it arrives.

The files have FastChat's layout (lm-sys/FastChat, fastchat/llm_judge), so that its tools read them.
"""

import hashlib
import importlib.util
import json
import logging
import math
import os
import re
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from moi_jax.common.errors import UserError
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.tasks.judge_cost import CostLimit, CostLimitExceeded

log = logging.getLogger(__name__)


if TYPE_CHECKING:
    import openai

Json = dict[str, Any]

OPENAI = "https://api.openai.com/v1"
MAX_TOKENS = 2048  # of a judgment
TRIES = 3  # until a rating is missing
MISSING = -1  # the score of a missing rating in the file; FastChat's tools leave those out
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]", re.ASCII)
FALLBACK = re.compile(r"\[(\d+\.?\d*)\]", re.ASCII)


def read_rating(judgment: str) -> float | None:
    """The first [[x]], else the first [x]; None where there is none or it is above 10."""
    match = RATING.search(judgment) or FALLBACK.search(judgment)
    return float(match[1]) if match and float(match[1]) <= 10 else None


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """One answer to rate: whose it is, and the prompt that shows it to the judge."""

    question_id: int
    turn: int
    prompt_name: str
    system: str
    user: str

    @property
    def hash(self) -> str:
        """Changes with the question, the answers, the reference and the judge's instructions."""
        text = json.dumps([self.system, self.user])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class Judgments:
    """A file of judgments, one object a line; a line that a killed run left unfinished is dropped.

    Lines without our "prompt_hash", such as FastChat's own, are kept and not used.
    """

    def __init__(self, path: Path):
        self.path = path
        self._lock = threading.Lock()
        self._found: dict[tuple[str, str], Json] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
        whole = [line for line in lines if self._take(line)]
        if len(whole) < len(lines):
            beside = path.with_name(f".{path.name}")
            beside.write_bytes(b"".join(whole))
            beside.replace(path)

    def _take(self, line: bytes) -> bool:
        """Remembers a line's judgment; False where the line is not whole."""
        if not line.endswith(b"\n"):
            return False
        try:
            record = json.loads(line)
            judge, _ = record["judge"]
            self._found[judge, record.get("prompt_hash")] = record
        except (ValueError, TypeError, KeyError):
            return False
        return True

    def find(self, judge: str, request: JudgeRequest) -> Json | None:
        return self._found.get((judge, request.hash))

    def append(self, record: Json) -> None:
        """From any thread; once it returns the record outlives the process."""
        line = json.dumps(record) + "\n"
        with self._lock, self.path.open("a", encoding="utf-8") as file:
            file.write(line)
            self._found[record["judge"][0], record["prompt_hash"]] = record


class JudgeError(Exception):
    """The endpoint does not do its part; says how, in a few words."""


class NoCompletion(JudgeError):
    """It answered something that is no chat completion."""


@dataclass(frozen=True)
class Judge:
    """A judging model at an endpoint.

    Attributes:
      price: US dollars for a million prompt tokens, and for a million tokens of judgments.
      max_cost: no call is begun that could make this command cost more, in US dollars.
      workers: calls at a time.
      timeout: seconds that the endpoint may be silent.
      retries: after a timeout, a failed connection, 429 and 5xx; the openai library waits longer
        each time, or as long as the endpoint says (Retry-After).
      pause: seconds after an answer that is no chat completion.
    """

    model: str
    url: str
    price: tuple[float, float] | None = None
    max_cost: float | None = None
    workers: int = 4
    timeout: float = 300.0
    retries: int = 4
    pause: float = 2.0

    def rate(
        self, requests: Sequence[JudgeRequest], answered_by: str, path: Path
    ) -> Iterator[Json]:
        """The judgment of each request, in order: what the file has, and what is still to be asked.

        Args:
          answered_by: whose answers these are, for the file.
          path: the file of judgments; it grows by each as it arrives.

        Yields:
          Records as in the file: "score" (`MISSING` after `TRIES` judgments without a rating),
          "judgment", "judge_version" (the model's name as the endpoint told it), ...

        Raises:
          UserError: it would cost too much, or the endpoint failed. What was judged is kept.
        """
        kept = Judgments(path)
        to_ask = [request for request in requests if kept.find(self.model, request) is None]
        if to_ask:
            self._check_cost(to_ask, len(requests))
        try:
            yield from self._ask_all(requests, answered_by, kept)
        except (JudgeError, CostLimitExceeded, OSError) as error:
            what = f"cannot write {path}: {error}" if isinstance(error, OSError) else error
            done = sum(kept.find(self.model, request) is not None for request in requests)
            raise UserError(
                f"judge {self.model} at {self.url}: {what}; {done} of {len(requests)} judgments "
                f"are kept in {path}, and the same command goes on from there"
            ) from None

    def _check_cost(self, to_ask: Sequence[JudgeRequest], total: int) -> None:
        """Says what the calls will take, if each is made once."""
        prompt = sum(map(_prompt_tokens, to_ask))
        judgment = MAX_TOKENS * len(to_ask)
        line = (
            f"judging by {self.model} at {self.url}: {len(to_ask)} of {total} calls to make; if "
            f"every judgment is as long as allowed and none has to be repeated, about {prompt:,} "
            f"prompt tokens and {judgment:,} tokens of judgments"
        )
        if self.price is not None:
            cost = CostLimit(self.price, None).cost(prompt, judgment)
            line += f", about ${cost:.2f}"
            if self.max_cost is not None and cost > self.max_cost:
                raise UserError(
                    f"{line}, above --judge-max-cost {self.max_cost:g}; the answers are kept: "
                    "run the same command with a higher limit, or a cheaper judge"
                )
        log.info(line)

    def _ask_all(
        self, requests: Sequence[JudgeRequest], answered_by: str, kept: Judgments
    ) -> Iterator[Json]:
        import openai

        client = openai.OpenAI(
            api_key=os.environ.get("OPENAI_API_KEY") or "none",
            base_url=self.url,
            timeout=openai.Timeout(self.timeout, connect=min(10.0, self.timeout)),
            max_retries=self.retries,
        )

        limit = CostLimit(self.price, self.max_cost)

        def judgment(request: JudgeRequest) -> Json:
            record = kept.find(self.model, request)
            if record is None:
                record = self._judge(client, request, answered_by, limit)
                kept.append(record)
            return record

        with client, ThreadPoolExecutor(self.workers) as pool:
            calls = [pool.submit(judgment, request) for request in requests]
            try:
                for call in calls:
                    yield call.result()
            finally:  # a fault, or Ctrl-C: calls under way end and are kept, no more begin
                pool.shutdown(wait=False, cancel_futures=True)

    def _judge(
        self, client: "openai.OpenAI", request: JudgeRequest, answered_by: str, limit: CostLimit
    ) -> Json:
        """A record of the file: the first judgment with a rating, or the last without."""
        for left in reversed(range(TRIES)):
            try:
                judgment, version = self._ask(client, request, limit)
            except NoCompletion:
                if not left:
                    raise
                time.sleep(self.pause)
                continue
            rating = read_rating(judgment)
            if rating is not None:
                break
        return {
            "question_id": request.question_id,
            "model": answered_by,
            "judge": [self.model, request.prompt_name],
            "user_prompt": request.user,
            "judgment": judgment,
            "score": MISSING if rating is None else rating,
            "turn": request.turn,
            "tstamp": time.time(),
            "judge_version": version,
            "prompt_hash": request.hash,
        }

    def _ask(
        self, client: "openai.OpenAI", request: JudgeRequest, limit: CostLimit
    ) -> tuple[str, str]:
        """The judgment, and the name of the model that made it."""
        most = limit.cost(_prompt_tokens(request), MAX_TOKENS)
        limit.reserve(most)
        content = self._send(client, request)
        try:
            completion = json.loads(content)
            judgment = completion["choices"][0]["message"]["content"]
        except (ValueError, TypeError, KeyError, IndexError):
            limit.settle(most, most)  # it may have been charged for, and does not say
            body = _one_line(content.decode(errors="replace"))
            raise NoCompletion(f"its answer is no chat completion: {body!r}") from None
        # A judge that declines may send no text at all: a judgment without a rating.
        judgment = judgment if isinstance(judgment, str) else ""
        limit.settle(most, limit.cost(*_tokens_used(completion, request, judgment)))
        return judgment, str(completion.get("model"))

    def _send(self, client: "openai.OpenAI", request: JudgeRequest) -> bytes:
        """What the endpoint answers."""
        import openai

        try:
            response = client.chat.completions.with_raw_response.create(
                model=self.model,
                messages=[
                    {"role": "system", "content": request.system},
                    {"role": "user", "content": request.user},
                ],
                temperature=0,
                max_tokens=MAX_TOKENS,
            )
        except openai.APITimeoutError:
            raise JudgeError(f"no answer within {self.timeout:g} seconds, several times") from None
        except openai.APIConnectionError as error:
            raise JudgeError(f"cannot be reached ({error.__cause__ or error})") from None
        except openai.APIStatusError as error:
            told = error.body.get("message") if isinstance(error.body, dict) else None
            hint = _HINTS.get(error.status_code, "")
            line = _one_line(str(told or error.message))
            raise JudgeError(f"status {error.status_code}{hint}: {line}") from None
        return response.content


def _prompt_tokens(request: JudgeRequest) -> int:
    """A guess, of four characters a token."""
    return (len(request.system) + len(request.user)) // 4


def _tokens_used(completion: Json, request: JudgeRequest, judgment: str) -> tuple[int, int]:
    """Of prompt and judgment, as the endpoint tells them; where it does not, guessed."""
    match completion.get("usage"):
        case {"prompt_tokens": int(read), "completion_tokens": int(written)} if (
            read >= 0 and written >= 0
        ):
            return read, written
    return _prompt_tokens(request), len(judgment) // 4


_HINTS = {
    401: " (is OPENAI_API_KEY right?)",
    404: " (are the judge's name and the address right? Most end in /v1)",
    429: " (too many requests, or nothing left to spend)",
}


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def make_judge(options: BenchmarkOptions) -> Judge | None:
    """The judge that the options name, if any.

    Raises:
      UserError: the options do not go together, or the openai library is missing.
    """
    if options.judge is None:
        if options.judge_url is not None:
            raise UserError("--judge-url says where; name the judging model too, with --judge")
        return None
    if importlib.util.find_spec("openai") is None:
        raise UserError("--judge needs the openai library: pip install openai")
    url = options.judge_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
    address = urlsplit(url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(f"--judge-url {url}: not an address such as http://localhost:8000/v1")
    if url == OPENAI and not os.environ.get("OPENAI_API_KEY"):
        raise UserError(
            f"the judge at {OPENAI} needs a key in the environment, OPENAI_API_KEY; for another "
            "endpoint give --judge-url"
        )
    if options.judge_max_cost is not None and options.judge_price is None:
        raise UserError(
            "--judge-max-cost needs --judge-price: US dollars for a million prompt tokens and for "
            "a million tokens of judgments"
        )
    for name, amounts in (
        ("--judge-price", options.judge_price or ()),
        ("--judge-max-cost", () if options.judge_max_cost is None else (options.judge_max_cost,)),
    ):
        if not all(math.isfinite(amount) and amount >= 0 for amount in amounts):
            raise UserError(f"{name} must be dollars, 0 or more")
    return Judge(options.judge, url, options.judge_price, options.judge_max_cost)
