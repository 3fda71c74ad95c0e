"""Useful tokens/s on the public sets: MoI rows beside padded batches of TRL, on a CPU, in turns.

    pip install '.[peers]'
    python benchmarks/padded_peer.py DIR        # data.root of configs/public_sets.yaml
    python benchmarks/padded_peer.py DIR xla    # with another model.attention than auto

Both train the model of torch_peer.py, with a vocabulary of 8,192, on text in the tokens of the
sample set. We take batches of 4 MoI rows of 2,048 tokens from the loader. The peer gets the
instructions of the same rows, each by itself, in random order: 8 at a time, as SFTTrainer takes
them by default, padded to the longest by TRL's collator. It is transformers and torch, without
what else SFTTrainer does. A useful token is one that is no padding. Batches are made beforehand,
and taken again where the sets are small.

The ratio is that of two trainers as they come, and has three causes: the places that padding
wastes, the size of a batch (a step updates all weights once, for our 8,192 places or for those of 8
examples), and the libraries. torch_peer.py compares the libraries on equal batches.
"""

import itertools
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import torch
import trl
from torch_peer import our_step, small_qwen, take_turns, torch_step
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

import moi_jax
from moi_jax.config.load import load_config
from moi_jax.data.loader import Batch

PUBLIC_SETS = Path(__file__).parent.parent / "configs" / "public_sets.yaml"
VOCABULARY, PEER_ROWS, ROUNDS = 8192, 8, 10
OURS, PEER = "moi_jax, MoI rows", f"transformers, batches of TRL {trl.__version__}"
TorchBatch = tuple[dict[str, torch.Tensor], torch.Tensor]


def main(root: str, attention: str = "auto") -> None:
    rows = public_batches(root, "chunk")
    padded = padded_batches(instructions(public_batches(root, "instruction")))
    useful = {
        OURS: [int((batch.segment_ids > 0).sum()) for batch in rows],
        PEER: [int(inputs["attention_mask"].sum()) for inputs, _ in padded],
    }
    places = {
        OURS: [batch.tokens.size for batch in rows],
        PEER: [targets.numel() for _, targets in padded],
    }
    model = small_qwen(VOCABULARY)
    took = take_turns(
        {OURS: our_step(model, rows, attention), PEER: torch_step(model, padded)}, ROUNDS
    )
    speed = {}
    for name, seconds in took.items():
        tokens, computed = (sum(counts[name][1 : 1 + ROUNDS]) for counts in (useful, places))
        speed[name] = tokens / sum(seconds)
        print(f"{name}: {tokens / computed:.1%} useful, {speed[name]:,.0f} useful tokens/s")
    print(f"{speed[OURS] / speed[PEER]:.2f} times")


def public_batches(root: str, mask: str) -> list[Batch]:
    """Returns as many batches as there are steps; `mask` says what a segment is."""
    config = load_config(PUBLIC_SETS, [f"data.root={root}", f"data.mask={mask}"])
    return list(itertools.islice(itertools.cycle(moi_jax.batches(config)), 1 + ROUNDS))


def instructions(batches: Iterable[Batch]) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the tokens of each segment, and its labels as TRL takes them: the tokens, or -100."""
    for batch in batches:
        for tokens, segments, weights in zip(
            batch.tokens, batch.segment_ids, batch.loss_weights, strict=True
        ):
            for segment in range(1, segments.max() + 1):
                (places,) = np.nonzero(segments == segment)
                # Our weights are those of the next token.
                counts = np.append(False, weights[places[:-1]] > 0)
                yield tokens[places].tolist(), np.where(counts, tokens[places], -100).tolist()


def padded_batches(examples: Iterable[tuple[list[int], list[int]]]) -> list[TorchBatch]:
    """Returns as many batches as there are steps, of examples in random order."""
    chosen = [{"input_ids": ids, "labels": labels} for ids, labels in examples]
    order = np.random.default_rng(0).permutation(len(chosen))
    order = np.resize(order, (1 + ROUNDS, PEER_ROWS))  # again from the first where they are few
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    batches = []
    for indices in order:
        made = collate([chosen[index] for index in indices])
        targets = torch.nn.functional.pad(made.pop("labels")[:, 1:], (0, 1), value=-100)
        batches.append((dict(made), targets))
    return batches


if __name__ == "__main__":
    main(*sys.argv[1:])
