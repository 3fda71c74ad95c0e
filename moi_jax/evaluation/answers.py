"""Sample answers of a run: each prompt under its domain's own and under the default prompt."""

from collections.abc import Callable

from moi_jax import config
from moi_jax.data.cache import resolve_prompt
from moi_jax.data.chatml import render_prompt
from moi_jax.data.conversations import Message
from moi_jax.data.tokenizer import Tokenizer
from moi_jax.models.decoder import Decoder
from moi_jax.models.parameters import Tree
from moi_jax.sampling.greedy import make_greedy


def make_sampler(
    samples: tuple[config.SamplePrompt, ...],
    max_new_tokens: int,
    data: config.Data,
    tokenizer: Tokenizer,
    make_model: Callable[[Tree], Decoder],
) -> Callable[[Tree], list[dict[str, str]]]:
    """A function from parameters to the answers, one object each as samples.jsonl holds them."""
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
    greedy = make_greedy(make_model, tokenizer.template.stops, tokenizer.vocab_size)

    def sample(parameters: Tree) -> list[dict[str, str]]:
        answers = greedy(parameters, prompts, max_new_tokens)
        return [
            {**line, "answer": tokenizer.decode(answer)}
            for line, answer in zip(asked, answers, strict=True)
        ]

    return sample
