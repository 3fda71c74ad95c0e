"""Generating from a checkpoint: the sampler it needs, and the completion of one prompt."""

import dataclasses
import logging
from collections.abc import Callable, Sequence

from moi_jax.checkpoints.opener import OpenCheckpoint
from moi_jax.common.errors import UserError
from moi_jax.sampling.memory import SHORTEST_CACHE
from moi_jax.sampling.requests import Completion, GenerationConfig, Request
from moi_jax.sampling.sampler import Sampler, make_sampler

log = logging.getLogger(__name__)


def generate(
    checkpoint: OpenCheckpoint,
    prompt: Sequence[int],
    config: GenerationConfig = GenerationConfig(),  # noqa: B008  # it is frozen
    *,
    context: int | None = None,
    on_text: Callable[[str], None] | None = None,
) -> Completion:
    """Completes one prompt.

        checkpoint = open_checkpoint(Path("runs/quickstart"), devices=jax.devices())
        messages = [Message("user", "What is 12 times 3?")]
        prompt = render_prompt(messages, checkpoint.tokenizer, checkpoint.system_prompt)
        print(generate(checkpoint, prompt, GenerationConfig(max_new_tokens=64)).text)

    Args:
      prompt: token ids.
      context: tokens of the prompt and its completion together; None means what they need.
      on_text: called with new text as soon as no later token can change it.

    Raises:
      UserError: the prompt has ids that the model has not, it fills the context, or the model
        gives logits that are not finite.
    """
    vocab_size = checkpoint.config.vocab_size
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise UserError(
                f"the prompt has the token id {token}; the model knows 0 to {vocab_size - 1:,}"
            )
    length = context or default_context(checkpoint, len(prompt) + config.max_new_tokens)
    request = make_request(prompt, config)
    sampler = open_sampler(checkpoint, context=length, requests=[request])
    completion = complete(checkpoint, sampler, request, on_text)
    if completion.finish == "too_long":
        raise UserError(
            f"the prompt has {len(prompt):,} tokens and the context {length:,}, which leaves no "
            f"room for an answer; shorten the prompt or raise the context (the model's length is "
            f"{checkpoint.config.seq_length:,})"
        )
    return completion


def open_sampler(
    checkpoint: OpenCheckpoint,
    *,
    slots: int = 1,
    context: int,
    requests: Sequence[Request] = (),
) -> Sampler:
    """A sampler for a checkpoint; logs what its cache takes before anything is allocated.

    Args:
      requests: those that it will run, where they are known.
    """
    sampler = make_sampler(
        checkpoint.bind,
        checkpoint.config,
        checkpoint.tokenizer,
        slots=slots,
        context=context,
        mesh=checkpoint.mesh,
    )
    limit = checkpoint.config.seq_length
    longer = f"; the model was made for {limit:,} tokens" if context > limit else ""
    memory = sampler.describe(checkpoint.parameters, requests)
    log.info(f"{checkpoint.step} in {checkpoint.dtype}; {memory}{longer}")
    return sampler


def default_context(checkpoint: OpenCheckpoint, needed: int) -> int:
    """A context for this many tokens: rounded up, so that few programs are compiled and kept."""
    rounded = -(-needed // SHORTEST_CACHE) * SHORTEST_CACHE
    return min(rounded, checkpoint.config.seq_length)


def make_request(prompt: Sequence[int], config: GenerationConfig, number: int = 0) -> Request:
    """The request of a prompt; the `number`-th of several prompts has the seed config.seed + it."""
    settings = {**dataclasses.asdict(config), "seed": config.seed + number}
    return Request(prompt, **settings)


def complete(
    checkpoint: OpenCheckpoint,
    sampler: Sampler,
    request: Request,
    on_text: Callable[[str], None] | None = None,
) -> Completion:
    """The completion of one request.

    Raises:
      UserError: the model gives logits that are not finite.
    """
    show = (lambda _, text: on_text(text)) if on_text else None
    ((_, completion),) = sampler.run(checkpoint.parameters, [request], show)
    if completion.finish == "not_finite":
        raise not_finite(checkpoint)
    return completion


def not_finite(checkpoint: OpenCheckpoint) -> UserError:
    """The error of a model whose logits are NaN or infinite."""
    return UserError(
        f"the logits of {checkpoint.step} in {checkpoint.dtype} are not finite (NaN or infinite): "
        f"the checkpoint is damaged, or its training has diverged"
    )


def describe_cut(completion: Completion) -> str | None:
    """A note for a completion that ended by its length; None for any other."""
    if completion.finish != "length":
        return None
    return (
        f"(cut after {len(completion.tokens):,} tokens; raise max_new_tokens or context for more)"
    )
