"""A checkpoint as a model of lm-evaluation-harness.

The harness keeps its own prompts, few-shot examples, truncation, filters and metrics. Text becomes
tokens as in its Hugging Face backend, so that figures can be compared with published ones.
"""

import re
import zlib
from collections import Counter
from typing import Any

import tokenizers
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
from tqdm import tqdm

from moi_jax.common.errors import UserError
from moi_jax.sampling.chat_model import ChatModel
from moi_jax.sampling.requests import Request
from moi_jax.text.conversations import Message
from moi_jax.text.jinja.export import jinja_source
from moi_jax.text.tokenizer import Tokenizer
from moi_jax.text.vocabulary_files import read_object, token_text

Json = dict[str, Any]

# The generation settings that a task may use. Others are allowed with a value of no effect.
UNDERSTOOD = {"until", "max_gen_toks", "do_sample", "temperature", "top_p", "top_k"}
NOTHING = {"num_beams": 1, "repetition_penalty": 1, "length_penalty": 1, "min_p": 0}


class CheckpointLM(TemplateLM):
    """A checkpoint for `lm_eval.simple_evaluate(model=...)`.

    Attributes:
      max_length: the largest number of tokens that the model reads.
      max_gen_toks: the length of an answer where the task sets none.
      tokenizer_name: identifies tokenizer and template in the harness's caches.
      eot_token_id: the token that ends a text.
      prefix_token_id: the token before a text without context.
    """

    max_gen_toks = 256

    def __init__(self, model: ChatModel, seed: int = 0):
        """`seed` is used where a task samples its answers."""
        super().__init__()
        self._model, self._seed = model, seed
        self.max_length = model.scorer.context
        tokenizer = model.tokenizer
        self._encoder = _TextEncoder(tokenizer)
        end = _named_token(tokenizer, "eos_token")
        self._end = tokenizer.template.pad if end is None else end
        begin = _named_token(tokenizer, "bos_token")
        self._begin = self._end if begin is None else begin

    @property
    def tokenizer_name(self) -> str:
        tokenizer = self._model.tokenizer
        return f"{tokenizer.fingerprint[:16]}-{tokenizer.template.name}"

    @property
    def eot_token_id(self) -> int:
        return self._end

    @property
    def prefix_token_id(self) -> int:
        return self._begin

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """The ids of a text. Special tokens of the chat template are parsed, see `_TextEncoder`."""
        return self._encoder.encode(string, opened=add_special_tokens is not False)

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The Jinja template of `apply_chat_template`, for the results."""
        return jinja_source(self._model.tokenizer.template, self._model.system_prompt)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a chat. A chat without a system prompt gets the one of the model.

        Args:
          chat_history: role and content of each message.
          add_generation_prompt: False where the last message is the start of the answer.
        """
        messages = [Message(turn["role"], turn["content"]) for turn in chat_history]  # type: ignore[arg-type]
        begun = "" if add_generation_prompt else messages.pop().content
        return self._model.tokenizer.decode(self._model.prompt(messages)) + begun

    def _loglikelihood_tokens(
        self,
        requests: list[tuple[Any, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, is_greedy) of each (request, context, continuation).

        A context that is too long is cut on the left.

        Raises:
          UserError: a continuation is longer than the model's context, or logits are not finite.
        """
        pairs = []
        for _, context, continuation in requests:
            room = self.max_length + 1 - len(continuation)  # the last token is not read
            if room < 1:
                raise UserError(
                    f"lm-eval needs the likelihood of {len(continuation)} tokens, but the context "
                    f"has {self.max_length}; raise --context, or leave the task out"
                )
            # A context of white space is empty here: the harness moves it to the continuation.
            pairs.append((context[-room:] or [self.prefix_token_id], continuation))
        answers = [(0.0, False)] * len(pairs)
        scoring = self._model.scorer.run(self._model.stacked, pairs)
        for index, found in tqdm(scoring, "likelihoods", len(pairs), disable=disable_tqdm):
            _check_finite(found.finish, requests[index][0])
            answers[index] = (found.log_likelihood, found.greedy)
            if requests[index][0] is not None:  # the windows of a longer text have no request
                self.cache_hook.add_partial("loglikelihood", requests[index][0], answers[index])
        return answers

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Log-likelihoods of whole texts, in windows that predict each token once."""
        windows: list[tuple[Any, list[int], list[int]]] = []
        owners = []
        for number, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0])
            rolling = get_rolling_token_windows(tokens, self.prefix_token_id, self.max_length, 1)
            for context, continuation in map(make_disjoint_window, rolling):
                windows.append((None, context, continuation))
                owners.append(number)
        totals = [0.0] * len(requests)
        found = self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm)
        for owner, (log_likelihood, _) in zip(owners, found, strict=True):
            totals[owner] += log_likelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers that end at a stop string of the task or a stop token of the chat template.

        Raises:
          UserError: a task needs what the sampler cannot do, or logits are not finite.
        """
        seen: Counter[str] = Counter()
        asked = []
        for request in requests:
            text, options = request.args
            asked.append(self._request(text, options, seen[text]))
            seen[text] += 1
        texts = [""] * len(requests)
        sampling = self._model.sampler.run(self._model.parameters, asked)
        for index, completion in tqdm(sampling, "answers", len(asked), disable=disable_tqdm):
            _check_finite(completion.finish, requests[index].args)
            texts[index] = completion.text
            self.cache_hook.add_partial("generate_until", requests[index].args, completion.text)
        return texts

    def _request(self, text: str, options: Json, repeat: int) -> Request:
        wanted = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        for name in wanted.keys() - UNDERSTOOD:
            if wanted[name] not in (None, NOTHING.get(name)):
                raise UserError(
                    f"a task of lm-eval needs generation with {name}={wanted[name]}, which the "
                    f"sampler does not support; leave the task out"
                )
        # As in the harness, the prompt is cut to leave room for the answer.
        room = self.max_length - wanted["max_gen_toks"]
        if room < 1:
            raise UserError(
                f"a task of lm-eval needs answers of {wanted['max_gen_toks']} tokens, but the "
                f"context has {self.max_length}; lower --max-new-tokens or raise --context"
            )
        sampled = wanted.get("do_sample")
        return Request(
            self.tok_encode(text)[-room:] or [self.prefix_token_id],
            max_new_tokens=wanted["max_gen_toks"],
            temperature=wanted.get("temperature", 0.0) if sampled else 0.0,
            top_k=wanted.get("top_k") or 0,
            top_p=wanted.get("top_p", 1.0),
            # Made from prompt and repeat alone: an answer does not depend on other requests.
            seed=zlib.crc32(f"{self._seed}/{repeat}/{text}".encode()),
            stop_strings=tuple(string for string in wanted["until"] if string),
        )


class _TextEncoder:
    """Encodes text as Hugging Face's tokenizers do: special tokens in the text are parsed.

    Our own tokenizer never does this. The harness passes only text, chats as rendered text too,
    so the template's special tokens must be parsed here, even in the text of a task.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._specials = {
            tokenizer.decode([number]): number for number in tokenizer.template.controls
        }
        longest_first = sorted(map(re.escape, self._specials), key=len, reverse=True)
        self._split = re.compile(f"({'|'.join(longest_first)})")
        # The tokens before every text, such as Llama 3's <|begin_of_text|>: an empty text has only
        # these.
        self._opening: list[int] = []
        if "tokenizer.json" in tokenizer.files:
            theirs = tokenizers.Tokenizer.from_str(tokenizer.files["tokenizer.json"])
            self._opening = theirs.encode("").ids

    def encode(self, text: str, opened: bool) -> list[int]:
        """The ids of a text; `opened` puts the opening tokens first where they are missing."""
        pieces = self._split.split(text)
        plain = iter(self._tokenizer.encode_batch(pieces[::2]))
        ids: list[int] = []
        for number, piece in enumerate(pieces):
            ids += [self._specials[piece]] if number % 2 else next(plain)
        if opened and ids[: len(self._opening)] != self._opening:
            return self._opening + ids
        return ids


def _named_token(tokenizer: Tokenizer, name: str) -> int | None:
    """The id of the special token with this name in the tokenizer's settings, e.g. bos_token."""
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        text = token_text(read_object(tokenizer.files, file).get(name))
        if text and (number := tokenizer.special(text)) is not None:
            return number
    return None


def _check_finite(finish: str, request: Any) -> None:
    if finish == "not_finite":
        raise UserError(
            f"the model's logits are not finite (NaN) on {str(request)[:80]!r}: its figures are "
            f"meaningless; use another checkpoint, or --dtype float32"
        )
