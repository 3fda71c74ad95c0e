"""The train step on a CPU beside transformers and torch: tokens/s, in turns in one process.

    pip install '.[parity]'
    python benchmarks/torch_peer.py                           # all tokens carry loss
    python benchmarks/torch_peer.py --vocabulary 151936       # that of Qwen
    python benchmarks/torch_peer.py --data DIR                # MoI rows of the public sets
    python benchmarks/torch_peer.py --data DIR --tokenizer DIR --vocabulary 151936

Both train the same Qwen2 (6 layers, width 256, 4 heads of 64, float32) from the same weights on the
same 2,048 tokens a step, with AdamW and a clipped gradient; the losses of the first step are
compared. Without --data these are 4 rows of 512 random tokens, which are the same in each step, and
all carry loss. With --data (data.root of configs/public_sets.yaml) each step has another row of the
public sets, with its own loss tokens and chunks, which transformers finds by their positions. There
transformers runs twice: as it computes logits by itself, and with its option `logits_to_keep`. With
that a training loop can leave out those of tokens without loss, as we do.

The steps take turns, and each batch comes several times. Its fastest step counts, since other work
on the machine only ever makes a step slower. Without --data the last lines are the seconds of the
matrix products of a step, each taken alone by both libraries. No step is faster than they are, and
the rest is what a library adds.
"""

import argparse
import dataclasses
import itertools
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from public_rows import public_batches, public_config

from moi_jax import config as config_lib
from moi_jax.checkpoints.hf.weights import export_tensors
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

TOKENS, LENGTH = 2048, 512  # of a step; of a row without --data
BATCHES, PASSES = 6, 2  # of the public sets
ROUNDS = 8  # without --data
SEED = 0  # of the weights
OPTIMIZER = config_lib.Optimizer(learning_rate=1e-3)
OURS, PEER = "moi_jax", f"transformers {transformers.__version__}, torch {torch.__version__}"
Step = Callable[[], float]  # takes one train step and returns its loss
TorchBatch = tuple[dict[str, torch.Tensor], torch.Tensor]  # model inputs; targets, -100 for none


def main(args: argparse.Namespace) -> None:
    model = small_qwen(args.vocabulary)
    if args.data:
        rows = f"data.sequence_length={TOKENS}", "train.global_batch_rows=1"
        config = public_config(args.data, *rows, tokenizer=args.tokenizer)
        batches, passes = public_batches(config, BATCHES), PASSES
    else:
        batches, passes = [random_batch(args.vocabulary)], ROUNDS
    largest = max(int(batch.tokens.max()) for batch in batches)
    if largest >= args.vocabulary:
        raise SystemExit(f"there is a token {largest}: set --vocabulary to that of the tokenizer")
    theirs = [as_torch(batch) for batch in batches]
    steps = {OURS: our_step(model, batches), PEER: torch_step(model, theirs)}
    if args.data:
        steps[f"{PEER}, logits_to_keep"] = torch_step(model, theirs, keep=True)
    losses = [step() for step in steps.values()]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-5)
    with_loss = np.mean([batch.loss_weights > 0 for batch in batches])
    print(f"V {args.vocabulary:,}, {with_loss:.1%} of the tokens carry loss")
    print(f"losses of the first step: {', '.join(f'{loss:.6f}' for loss in losses)}")
    took = fastest(take_turns(steps, passes * len(batches)), len(batches))
    for name, seconds in took.items():
        ratio = "" if name == OURS else f", {seconds / took[OURS]:.2f} times as long as ours"
        print(f"{name}: {TOKENS * len(batches) / seconds:,.0f} tokens/s{ratio}")
    if not args.data:
        for name, seconds in products_alone(model).items():
            print(f"{name}: {took[name]:.2f} s a step, {seconds:.2f} s of it for the products")


def random_batch(vocabulary: int) -> Batch:
    tokens = np.random.default_rng(0).integers(0, vocabulary, (TOKENS // LENGTH, LENGTH + 1))
    tokens = tokens.astype(np.int32)
    ones = np.ones((len(tokens), LENGTH), np.int32)
    return Batch(
        tokens=tokens[:, :-1], targets=tokens[:, 1:], segment_ids=ones,
        positions=np.arange(LENGTH, dtype=np.int32) * ones, domain_ids=0 * ones,
        loss_weights=ones.astype(np.float32),
    )  # fmt: skip


def as_torch(batch: Batch) -> TorchBatch:
    """The same rows for transformers, which starts a segment wherever positions start again."""
    inputs = {"input_ids": batch.tokens, "position_ids": batch.positions}
    targets = np.where(batch.loss_weights > 0, batch.targets, -100)
    as_long = {name: torch.from_numpy(x.astype(np.int64)) for name, x in inputs.items()}
    return as_long, torch.from_numpy(targets.astype(np.int64))


def products_alone(model: ModelConfig) -> dict[str, float]:
    """Returns the seconds of all products of a step with a weight matrix, in both libraries.

    Those of attention are left out. A matrix has three: x W, g W^T and x^T g.
    """
    d, f, layers = model.hidden_size, model.mlp_width, model.num_layers
    matrices = {(d, d): 4 * layers, (d, f): 2 * layers, (f, d): layers, (d, model.vocab_size): 1}
    rng, seconds = np.random.default_rng(0), {OURS: 0.0, PEER: 0.0}
    for (inputs, outputs), count in matrices.items():
        shapes = (TOKENS, inputs), (inputs, outputs), (TOKENS, outputs)
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
        OURS: lambda: jax.block_until_ready(product(*ours)),
        PEER: lambda: torch.tensordot(*theirs, dims),
    }
    return fastest(take_turns(runs, ROUNDS), 1)


def small_qwen(vocabulary: int) -> ModelConfig:
    return dataclasses.replace(
        preset("qwen2.5-0.5b"), vocab_size=vocabulary, num_layers=6, hidden_size=256, num_heads=4,
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


def fastest(took: Mapping[str, Sequence[float]], batches: int) -> dict[str, float]:
    """Returns the seconds of one pass over the batches, of each its fastest step."""
    return {name: np.reshape(times, (-1, batches)).min(0).sum() for name, times in took.items()}


def our_step(
    model: ModelConfig,
    batches: Sequence[Batch],
    attention: str = "auto",
    microbatch_rows: int | None = None,
) -> Step:
    """Our train step, which takes the batches again and again.

    Args:
      attention, microbatch_rows: as in the config; None takes all rows at once.
    """
    mesh = make_mesh(config_lib.Mesh(), jax.devices()[:1])
    optimizer, schedule = make_optimizer(OPTIMIZER, model), make_schedule(OPTIMIZER, 100)
    settings = config_lib.Model.model_validate({"attention": attention})
    attend = choose_attention(settings, model, jax.devices()[0], mesh, "float32")
    bind = make_model(model, Compute("float32", attention=attend))
    state = new_state(model, optimizer, random_parameters(model, SEED, "float32", mesh), mesh)
    domains = 1 + max(int(batch.domain_ids.max()) for batch in batches)
    train_step = make_train_step(model, bind, optimizer, schedule, domains, mesh)
    rows = len(batches[0].tokens)
    together = microbatch_rows or rows
    placed = itertools.cycle([place_batch(b, np.arange(rows), together, mesh) for b in batches])

    def step() -> float:
        nonlocal state
        with jax.set_mesh(mesh):
            state, metrics = train_step(state, next(placed), np.float32(np.inf))
        return float(metrics["loss"])

    return step


def torch_step(model: ModelConfig, batches: Sequence[TorchBatch], keep: bool = False) -> Step:
    """The same with transformers' Qwen2.

    Args:
      keep: compute the logits of tokens with loss alone.
    """
    peer, o = qwen2(model), OPTIMIZER
    optimizer = torch.optim.AdamW(
        peer.parameters(), o.learning_rate, (o.b1, o.b2), o.eps, o.weight_decay, fused=True
    )
    again = itertools.cycle(batches)

    def step() -> float:
        inputs, targets = next(again)
        kept = {"logits_to_keep": targets >= 0} if keep else {}
        # With a cache transformers would not look for segments in the positions.
        logits = peer(**inputs, use_cache=False, **kept).logits
        targets = targets[targets >= 0] if keep else targets.flatten()
        loss = torch.nn.functional.cross_entropy(logits.reshape(len(targets), -1), targets)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(peer.parameters(), 1.0)
        optimizer.step()
        return loss.item()

    return step


def qwen2(model: ModelConfig) -> transformers.Qwen2ForCausalLM:
    """transformers' model with the weights of `our_step`."""
    peer = transformers.Qwen2ForCausalLM(
        transformers.Qwen2Config(
            vocab_size=model.vocab_size, hidden_size=model.hidden_size,
            intermediate_size=model.mlp_width, num_hidden_layers=model.num_layers,
            num_attention_heads=model.num_heads, num_key_value_heads=model.num_kv_heads,
            rms_norm_eps=model.norm_eps, tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_base},
        )
    )  # fmt: skip
    ours = random_parameters(model, SEED, "float32")

    def get(path: str, layer: int | None) -> np.ndarray:
        parameter: Any = ours
        for name in path.split("."):
            parameter = parameter[name]
        return np.asarray(parameter if layer is None else parameter[layer])

    tensors = {name: torch.tensor(values) for name, values in export_tensors(model, get)}
    peer.load_state_dict(tensors)
    return peer.train()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--vocabulary", type=int, default=8192)
    parser.add_argument("--data", metavar="DIR", help="data.root of configs/public_sets.yaml")
    parser.add_argument("--tokenizer", metavar="DIR", help="of --data; default: the sample set's")
    main(parser.parse_args())
