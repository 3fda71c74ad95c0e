"""The train step on a CPU beside transformers and torch: tokens/s, in turns in one process.

    pip install '.[parity]'
    python benchmarks/torch_peer.py            # a vocabulary of 8,192
    python benchmarks/torch_peer.py 151936     # that of Qwen

Both train the same Qwen2 (6 layers, width 256, 4 heads of 64, float32) on the same 4 rows of 512
tokens, each row one segment, with AdamW and a clipped gradient. A round is one step of each. The
first round, which compiles, does not count.
"""

import dataclasses
import sys
import time
from collections.abc import Callable
from statistics import median

import jax
import numpy as np
import torch
import transformers

from moi_jax import config as config_lib
from moi_jax.data.loader import Batch
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


def main(vocab_size: int) -> None:
    model = dataclasses.replace(
        preset("qwen2.5-0.5b"), vocab_size=vocab_size, num_layers=6, hidden_size=256, num_heads=4,
        num_kv_heads=4, head_dim=64, mlp_width=704, tied_head=False,
    )  # fmt: skip
    tokens = np.random.default_rng(0).integers(0, vocab_size, (ROWS, LENGTH + 1)).astype(np.int32)
    steps = {"moi_jax": our_step(model, tokens), "torch": torch_step(model, tokens)}
    took: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(1 + ROUNDS):
        for name, step in steps.items():
            started = time.monotonic()
            step()
            took[name].append(time.monotonic() - started)
    speed = {name: ROWS * LENGTH / median(times[1:]) for name, times in took.items()}
    print(f"V {vocab_size:,}, tokens/s: " + ", ".join(f"{n} {s:,.0f}" for n, s in speed.items()))
    print(f"{speed['moi_jax'] / speed['torch']:.2f} times torch {torch.__version__}")


def our_step(model: ModelConfig, tokens: np.ndarray) -> Callable[[], float]:
    """One train step on the rows; returns the loss."""
    mesh = make_mesh(config_lib.Mesh(), jax.devices()[:1])
    optimizer, schedule = make_optimizer(OPTIMIZER, model), make_schedule(OPTIMIZER, 100)
    bind = make_model(model, Compute("float32"))
    state = new_state(model, optimizer, random_parameters(model, 0, "float32", mesh), mesh)
    train_step = make_train_step(model, bind, optimizer, schedule, 1, mesh)
    ones = np.ones((ROWS, LENGTH), np.int32)
    batch = Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=ones,
        positions=np.arange(LENGTH, dtype=np.int32) * ones, domain_ids=0 * ones,
        loss_weights=ones.astype(np.float32),
    )  # fmt: skip
    placed = place_batch(batch, np.arange(ROWS), ROWS, mesh)

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, placed, np.float32(np.inf))
        return float(metrics["loss"])

    return step


def torch_step(model: ModelConfig, tokens: np.ndarray) -> Callable[[], float]:
    """The same with transformers' Qwen2."""
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
    ids, labels = (torch.from_numpy(a.astype(np.int64)) for a in (tokens[:, :-1], tokens[:, 1:]))

    def step() -> float:
        logits = peer(input_ids=ids).logits
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 8192)
