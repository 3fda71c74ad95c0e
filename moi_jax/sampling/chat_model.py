"""A model as benchmarks use it: conversations in, texts and likelihoods out."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from jax.sharding import Mesh

from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import Bind, Tree
from moi_jax.models.decoding import LayerViews
from moi_jax.sampling.likelihood import LikelihoodScorer
from moi_jax.sampling.sampler import Sampler, make_sampler
from moi_jax.text.conversations import Message
from moi_jax.text.rendering import render_prompt
from moi_jax.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class ChatModel:
    """Parameters with everything that is needed to generate and to score.

    Attributes:
      parameters: stacked, as the scorer needs them; the sampler alone may have `LayerViews`.
      system_prompt: of every conversation without one of its own; None for no system block.
    """

    sampler: Sampler
    scorer: LikelihoodScorer
    parameters: Tree | LayerViews
    tokenizer: Tokenizer
    system_prompt: str | None

    @property
    def stacked(self) -> Tree:
        """The parameters for the scorer."""
        assert not isinstance(self.parameters, LayerViews)
        return self.parameters

    def prompt(
        self, messages: Sequence[Message], tools: Sequence[str] = (), *, system_block: bool = True
    ) -> list[int]:
        """The token ids of the prompt, with the conversation's own system prompt or ours."""
        system = self.system_prompt if system_block else None
        return render_prompt(messages, self.tokenizer, system, tools)


def make_chat_model(
    bind: Bind,
    config: ModelConfig,
    tokenizer: Tokenizer,
    system_prompt: str | None,
    *,
    slots: int = 16,
    context: int | None = None,
    mesh: Mesh | None = None,
) -> Callable[[Tree | LayerViews], ChatModel]:
    """A function parameters -> `ChatModel`; all models that it makes share compiled programs.

    Args:
      bind: parameters -> model.
      slots, context: see `Sampler`.
    """
    sampler = make_sampler(bind, config, tokenizer, slots=slots, context=context, mesh=mesh)
    scorer = LikelihoodScorer(bind, config, context=context, mesh=mesh)
    return lambda parameters: ChatModel(sampler, scorer, parameters, tokenizer, system_prompt)
