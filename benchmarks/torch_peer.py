"""The train step on a CPU beside transformers and torch: tokens/s, in turns in one process.

    pip install '.[parity]'
    python benchmarks/torch_peer.py            # a vocabulary of 8,192
    python benchmarks/torch_peer.py 151936     # that of Qwen

Both train the same Qwen2 (6 layers, width 256, 4 heads of 64, float32) on the same 4 rows of 512
tokens, each row one segment, with AdamW and a clipped gradient. A round is one step of each. The
first round, which compiles, does not count. The fastest step counts, since other work on the
machine only ever makes a step slower. Last: the seconds of the matrix products of a step, each
taken alone by both libraries. No step is faster than they are, and the rest is what a library adds.
"""

import dataclasses
import itertools
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers

from moi_jax import config as config_lib
from moi_jax.data.loader import Batch
from moi_jax.models.attention import choose_attention
from moi_jax.models.compute import Compute
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import make_model
from moi_jax.models.parameters import random_parameters
from moi_jax.models.presets import preset
from moi_jax.parallel.mesh import make_mesh
from moi_jax.parallel.placing import place_batch
from moi_jax.training.optimizer import make_optimizer, make_schedule
from moi_jax.training.state import new_state
from moi_jax.training.step import make_train_step

ROWS, LENGTH, ROUNDS = 4, 512, 8
OPTIMIZER = config_lib.Optimizer(learning_rate=1e-3)
Step = Callable[[], float]  # takes one train step and returns its loss


def main(vocab_size: int) -> None:
    model, random = small_qwen(vocab_size), np.random.default_rng(0)
    tokens = random.integers(0, vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    ones = np.ones((ROWS, LENGTH), np.int32)
    batch = Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=ones,
        positions=np.arange(LENGTH, dtype=np.int32) * ones, domain_ids=0 * ones,
        loss_weights=ones.astype(np.float32),
    )  # fmt: skip
    ids, targets = (torch.from_numpy(x.astype(np.int64)) for x in (batch.tokens, batch.targets))
    steps = {
        "moi_jax": our_step(model, [batch]),
        "torch": torch_step(model, [({"input_ids": ids}, targets)]),
    }
    took = take_turns(steps, ROUNDS)
    speed = {name: ROWS * LENGTH / min(times) for name, times in took.items()}
    print(f"V {vocab_size:,}, tokens/s: " + ", ".join(f"{n} {s:,.0f}" for n, s in speed.items()))
    print(f"{speed['moi_jax'] / speed['torch']:.2f} times torch {torch.__version__}")
    for name, seconds in products_alone(model).items():
        print(f"{name}: {min(took[name]):.2f} s a step, {seconds:.2f} s of it for the products")


def products_alone(model: ModelConfig) -> dict[str, float]:
    """Returns the seconds of all products of a step with a weight matrix, in both libraries.

    Those of attention are left out. A matrix has three: x W, g W^T and x^T g.
    """
    d, f, layers = model.hidden_size, model.mlp_width, model.num_layers
    matrices = {(d, d): 4 * layers, (d, f): 2 * layers, (f, d): layers, (d, model.vocab_size): 1}
    rng, seconds = np.random.default_rng(0), {"moi_jax": 0.0, "torch": 0.0}
    for (inputs, outputs), count in matrices.items():
        shapes = (ROWS * LENGTH, inputs), (inputs, outputs), (ROWS * LENGTH, outputs)
        x, w, g = (rng.normal(size=shape).astype(np.float32) for shape in shapes)
        # Of each pair, the axes that the product sums over.
        for left, right, axes in ((x, w, (1, 0)), (g, w, (1, 1)), (x, g, (0, 0))):
            for name, took in product_seconds(left, right, axes).items():
                seconds[name] += count * took
    return seconds


def product_seconds(left: np.ndarray, right: np.ndarray, axes: tuple[int, int]) -> dict[str, float]:
    dims = tuple([axis] for axis in axes)
    product = jax.jit(partial(jnp.tensordot, axes=dims))
    ours = jnp.asarray(left), jnp.asarray(right)
    theirs = torch.from_numpy(left), torch.from_numpy(right)
    runs = {
        "moi_jax": lambda: jax.block_until_ready(product(*ours)),
        "torch": lambda: torch.tensordot(*theirs, dims),
    }
    return {name: min(times) for name, times in take_turns(runs, ROUNDS).items()}


def small_qwen(vocab_size: int) -> ModelConfig:
    return dataclasses.replace(
        preset("qwen2.5-0.5b"), vocab_size=vocab_size, num_layers=6, hidden_size=256, num_heads=4,
        num_kv_heads=4, head_dim=64, mlp_width=704, tied_head=False,
    )  # fmt: skip


def take_turns(steps: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, list[float]]:
    """Returns the seconds of the steps, which take turns; a first round does not count."""
    took: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 + rounds):
        for name, step in steps.items():
            started = time.monotonic()
            step()
            took[name].append(time.monotonic() - started)
    return {name: times[1:] for name, times in took.items()}


def our_step(model: ModelConfig, batches: Sequence[Batch], attention: str = "auto") -> Step:
    """Our train step, which takes the batches again and again; `attention` as in the config."""
    mesh = make_mesh(config_lib.Mesh(), jax.devices()[:1])
    optimizer, schedule = make_optimizer(OPTIMIZER, model), make_schedule(OPTIMIZER, 100)
    settings = config_lib.Model.model_validate({"attention": attention})
    attend = choose_attention(settings, model, jax.devices()[0], mesh, "float32")
    bind = make_model(model, Compute("float32", attention=attend))
    state = new_state(model, optimizer, random_parameters(model, 0, "float32", mesh), mesh)
    domains = 1 + max(int(batch.domain_ids.max()) for batch in batches)
    train_step = make_train_step(model, bind, optimizer, schedule, domains, mesh)
    rows = len(batches[0].tokens)
    placed = itertools.cycle([place_batch(b, np.arange(rows), rows, mesh) for b in batches])

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, next(placed), np.float32(np.inf))
        return float(metrics["loss"])

    return step


def torch_step(
    model: ModelConfig, batches: Sequence[tuple[dict[str, torch.Tensor], torch.Tensor]]
) -> Step:
    """The same with transformers' Qwen2.

    Args:
      batches: what the model takes, and the targets [B, S], -100 where there is none.
    """
    peer = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=model.vocab_size, hidden_size=model.hidden_size,
            intermediate_size=model.mlp_width, num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads, num_key_value_heads=model.num_kv_heads,
            tie_word_embeddings=False,
        )
    )  # fmt: skip
    o = OPTIMIZER
    optimizer = torch.optim.AdamW(
        peer.parameters(), o.learning_rate, (o.b1, o.b2), o.eps, o.weight_decay
    )
    again = itertools.cycle(batches)

    def step() -> float:
        inputs, targets = next(again)
        logits = peer(**inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8192)
