"""Ratings by a judge model at any OpenAI-compatible endpoint. Each one is stored as it arrives."""

import importlib.util
import json
import logging
import math
import os
import re
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
from moi_jax.evaluation.tasks.judgments import MISSING, JudgeRequest, Judgments, judgments_path

log = logging.getLogger(__name__)


if TYPE_CHECKING:
    import openai

Json = dict[str, Any]

OPENAI = "https://api.openai.com/v1"
MAX_TOKENS = 2048  # the length of a judgment
TRIES = 3  # calls for one rating before it counts as missing
RATING = re.compile(r"\[\[(\d+\.?\d*)\]\]", re.ASCII)
FALLBACK = re.compile(r"\[(\d+\.?\d*)\]", re.ASCII)


def read_rating(judgment: str) -> float | None:
    """The rating in the first [[x]], else in the first [x]; None without one from 0 to 10."""
    match = RATING.search(judgment) or FALLBACK.search(judgment)
    return float(match[1]) if match and float(match[1]) <= 10 else None


class JudgeError(Exception):
    """The endpoint failed. The message says how, in a few words."""


class NoCompletion(JudgeError):
    """The endpoint's answer is not a chat completion."""


@dataclass(frozen=True)
class Judge:
    """A judge model at an endpoint.

    Attributes:
      price: US dollars per million prompt tokens, and per million tokens of judgments.
      max_cost: in US dollars; a call that could exceed this total is not made.
      workers: number of calls at the same time.
      timeout: seconds to wait for the endpoint.
      retries: number of retries after a timeout, a failed connection, 429 or 5xx. The openai
        library waits longer each time, or as long as the endpoint says (Retry-After).
      pause: seconds to wait after an answer that is not a chat completion.
    """

    model: str
    url: str
    price: tuple[float, float] | None = None
    max_cost: float | None = None
    workers: int = 4
    timeout: float = 300.0
    retries: int = 4
    pause: float = 2.0

    @property
    def shown_url(self) -> str:
        """The address for logs, messages and results: without password and query."""
        return without_secrets(self.url)

    def rate(
        self, requests: Sequence[JudgeRequest], answered_by: str, path: Path
    ) -> Iterator[Json]:
        """Yields the judgment of each request, in order: from the file, else from the judge.

        Args:
          answered_by: the name of the model that answered, for the file.
          path: the file of judgments. Each new judgment is added as it arrives.

        Yields:
          Records of the file: "score" (`MISSING` after `TRIES` judgments without a rating),
          "judgment", "judge_version" (the model's name according to the endpoint), ...

        Raises:
          UserError: it would cost too much, or the endpoint failed. Finished judgments are kept.
        """
        kept = Judgments(path)
        to_ask = [request for request in requests if kept.find(self.model, request) is None]
        if to_ask:
            _check_key(self.url)
            self._check_cost(to_ask, len(requests))
        try:
            yield from self._ask_all(requests, answered_by, kept)
        except (JudgeError, CostLimitExceeded, OSError) as error:
            what = f"cannot write {path}: {error}" if isinstance(error, OSError) else error
            done = sum(kept.find(self.model, request) is not None for request in requests)
            raise UserError(
                f"judge {self.model} at {self.shown_url}: {what}; {done} of {len(requests)} "
                f"judgments are kept in {path}, and the same command continues from there"
            ) from None

    def _check_cost(self, to_ask: Sequence[JudgeRequest], total: int) -> None:
        """Logs the expected cost of the calls; raises UserError where it exceeds the limit."""
        prompt = sum(map(_prompt_tokens, to_ask))
        judgment = MAX_TOKENS * len(to_ask)
        line = (
            f"judging by {self.model} at {self.shown_url}: {len(to_ask)} of {total} calls to make; "
            f"if every judgment has the maximum length and no call is repeated, about {prompt:,} "
            f"prompt tokens and {judgment:,} tokens of judgments"
        )
        if self.price is not None:
            cost = CostLimit(self.price, None).cost(prompt, judgment)
            line += f", about ${cost:.2f}"
            if self.max_cost is not None and cost > self.max_cost:
                raise UserError(
                    f"{line}, above --judge-max-cost {self.max_cost:g}; the answers are kept; "
                    "run the same command with a higher limit or a cheaper judge"
                )
        log.warning(line)

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
            finally:  # after an error or Ctrl-C, calls in progress end and no new ones start
                pool.shutdown(wait=False, cancel_futures=True)

    def _judge(
        self, client: "openai.OpenAI", request: JudgeRequest, answered_by: str, limit: CostLimit
    ) -> Json:
        """A record for the file: the first judgment with a rating, else the last one."""
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
        """The judgment, and the name of the model that wrote it."""
        most = limit.cost(_prompt_tokens(request), MAX_TOKENS)
        limit.reserve(most)
        content = self._send(client, request)
        try:
            completion = json.loads(content)
            judgment = completion["choices"][0]["message"]["content"]
        except (ValueError, TypeError, KeyError, IndexError):
            limit.settle(most, most)  # it may have been charged, so the most is assumed
            body = _one_line(content.decode(errors="replace"))
            raise NoCompletion(f"its answer is not a chat completion: {body!r}") from None
        # A judge that refuses may send no text: this is a judgment without a rating.
        judgment = judgment if isinstance(judgment, str) else ""
        limit.settle(most, limit.cost(*_tokens_used(completion, request, judgment)))
        return judgment, str(completion.get("model"))

    def _send(self, client: "openai.OpenAI", request: JudgeRequest) -> bytes:
        """The body of the endpoint's answer."""
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
    """An estimate: four characters per token."""
    return (len(request.system) + len(request.user)) // 4


def _tokens_used(completion: Json, request: JudgeRequest, judgment: str) -> tuple[int, int]:
    """The tokens of prompt and judgment as the endpoint reports them, else estimates."""
    match completion.get("usage"):
        case {"prompt_tokens": int(read), "completion_tokens": int(written)} if (
            read >= 0 and written >= 0
        ):
            return read, written
    return _prompt_tokens(request), len(judgment) // 4


_HINTS = {
    401: " (is OPENAI_API_KEY right?)",
    404: " (are the judge's name and the address right? Most end in /v1)",
    429: " (too many requests, or no credit left)",
}


def without_secrets(url: str) -> str:
    """An address without a user name and password, and without its query, which may be a key."""
    return re.sub(r"[?#].*", "", re.sub(r"^([^/]*://)?[^/?#]*@", r"\1", url), flags=re.DOTALL)


def _one_line(text: str) -> str:
    return " ".join(text.split())[:200]


def _check_key(url: str) -> None:
    if url == OPENAI and not os.environ.get("OPENAI_API_KEY"):
        raise UserError(
            f"the judge at {OPENAI} needs the environment variable OPENAI_API_KEY; for another "
            "endpoint use --judge-url"
        )


def make_judge(options: BenchmarkOptions) -> Judge | None:
    """The judge that the options name; None where they name none.

    Raises:
      UserError: the options do not fit together, or the openai library is missing.
    """
    if options.judge is None:
        if options.judge_url is not None:
            raise UserError("--judge-url needs the name of the judge model: add --judge MODEL")
        return None
    if importlib.util.find_spec("openai") is None:
        raise UserError("--judge needs the openai library: pip install openai")
    url = options.judge_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
    address = urlsplit(url)
    if address.scheme not in ("http", "https") or not address.hostname:
        raise UserError(
            f"--judge-url {without_secrets(url)} is not an address such as http://localhost:8000/v1"
        )
    if not judgments_path(options.out, options.judge).is_file():  # else nothing may be to ask
        _check_key(url)
    if options.judge_max_cost is not None and options.judge_price is None:
        raise UserError(
            "--judge-max-cost needs --judge-price: US dollars per million prompt tokens and per "
            "million tokens of judgments"
        )
    for name, amounts in (
        ("--judge-price", options.judge_price or ()),
        ("--judge-max-cost", () if options.judge_max_cost is None else (options.judge_max_cost,)),
    ):
        if not all(math.isfinite(amount) and amount >= 0 for amount in amounts):
            raise UserError(f"{name} must be dollars, 0 or more")
    return Judge(options.judge, url, options.judge_price, options.judge_max_cost)
