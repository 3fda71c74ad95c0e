"""Sample completions of a run: each question with its domain's system prompt and the default."""

from collections.abc import Callable

from jax.sharding import Mesh

from moi_jax import config
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind, Tree
from moi_jax.sampling.requests import Request
from moi_jax.sampling.sampler import make_sampler
from moi_jax.text.conversations import Message
from moi_jax.text.prompts import resolve_prompt
from moi_jax.text.rendering import render_prompt
from moi_jax.text.tokenizer import Tokenizer


def make_sample_completions(
    samples: tuple[config.SamplePrompt, ...],
    max_new_tokens: int,
    data: config.Data,
    tokenizer: Tokenizer,
    bind: Bind,
    model: ModelConfig,
    mesh: Mesh,
) -> Callable[[Tree], list[dict[str, str]]]:
    """A function parameters -> completions, one object each, as samples.jsonl holds them."""
    domains = {domain.name: domain for domain in data.domains}
    asked, prompts = [], []
    for question in samples:
        own = resolve_prompt(data, domains[question.domain])
        for system, prompt in (("own", own), ("default", data.default_system_prompt)):
            asked.append(
                {
                    "domain": question.domain,
                    "prompt": question.prompt,
                    "system": system,
                    "system_prompt": prompt or "",
                }
            )
            prompts.append(render_prompt([Message("user", question.prompt)], tokenizer, prompt))
    requests = [Request(prompt, max_new_tokens=max_new_tokens) for prompt in prompts]
    sampler = make_sampler(
        bind,
        model,
        tokenizer,
        context=max(len(prompt) for prompt in prompts) + max_new_tokens,
        mesh=mesh,
    )

    def sample(parameters: Tree) -> list[dict[str, str]]:
        answers = dict(sampler.run(parameters, requests))
        return [
            {**line, "answer": answers[index].text, "finish": answers[index].finish}
            for index, line in enumerate(asked)
        ]

    return sample
