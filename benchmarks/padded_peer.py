"""Useful tokens/s on the public sets: MoI rows beside padded batches of TRL, on a CPU, in turns.

    pip install '.[peers]'
    python benchmarks/padded_peer.py DIR        # data.root of configs/public_sets.yaml
    python benchmarks/padded_peer.py DIR --attention xla

All train the model of torch_peer.py from the same weights, with a vocabulary of 8,192, on text in
the tokens of the sample set. We take batches of 4 MoI rows of 2,048 tokens from the loader: whole,
and in microbatches of one row (train.microbatch_rows). The
peers get the instructions of the same rows, each by itself, in random order: 8 at a time, as
SFTTrainer takes them by default, padded to the longest by TRL's collator, and not cut to the 1,024
tokens that are its default. They are

* a step of SFTTrainer, with its metrics, in float32 and without gradient checkpointing, as we run;
* the same with per_device_train_batch_size 1 and gradient_accumulation_steps 8: nothing is padded;
* transformers and torch without what else SFTTrainer does.

The losses of their first step are compared. A useful token is one that is no padding. Batches are
made beforehand, and taken again where the sets are small.

The ratio is that of two trainers as they come, and has four causes: the places that padding wastes,
the size of a batch (a step updates all weights once, for our places or for those of 8 examples),
the libraries (torch_peer.py compares them on equal batches), and the logits: we compute those of
tokens with loss, and TRL does so on GPUs alone.
"""

import argparse
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import datasets
import numpy as np
import torch
import transformers
import trl
from public_rows import public_batches, public_config
from torch_peer import (
    OPTIMIZER,
    Step,
    TorchBatch,
    our_step,
    qwen2,
    small_qwen,
    take_turns,
    torch_step,
)
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from moi_jax.data.loader import Batch
from moi_jax.models.config import ModelConfig

VOCABULARY, PEER_ROWS, ROUNDS = 8192, 8, 10
TOKENIZER = Path(__file__).parent.parent / "moi_jax/data/samples/tokenizer/tokenizer.json"
OURS, ROW_BY_ROW = "moi_jax, MoI rows", "moi_jax, microbatches of one row"
TRAINER, LIBRARY = f"SFTTrainer of TRL {trl.__version__}", "transformers, batches of TRL"
ONE_BY_ONE = "SFTTrainer, one by one"


def main(args: argparse.Namespace) -> None:
    rows = batches_of(args.data, "chunk")
    padded = padded_batches(instructions(batches_of(args.data, "instruction")))
    ours = [(int((batch.segment_ids > 0).sum()), batch.tokens.size) for batch in rows]
    theirs = [(int(inputs["attention_mask"].sum()), targets.numel()) for inputs, targets in padded]
    model = small_qwen(VOCABULARY)
    steps = {
        OURS: our_step(model, rows, args.attention),
        ROW_BY_ROW: our_step(model, rows, args.attention, microbatch_rows=1),
        TRAINER: trainer_step(model, padded),
        ONE_BY_ONE: trainer_step(model, padded, one_by_one=True),
        LIBRARY: torch_step(model, padded),
    }
    first = {name: step() for name, step in steps.items()}
    np.testing.assert_allclose(
        [first[name] for name in (TRAINER, ONE_BY_ONE)], first[LIBRARY], rtol=1e-5
    )
    speed = {}
    for name, seconds in take_turns(steps, ROUNDS).items():
        useful, places = np.sum((ours if name in (OURS, ROW_BY_ROW) else theirs)[2:], axis=0)
        share = 1 if name == ONE_BY_ONE else useful / places
        speed[name] = useful / sum(seconds)
        print(f"{name}: {share:.1%} useful, {speed[name]:,.0f} useful tokens/s")
    for name in (OURS, ROW_BY_ROW):
        for peer in (TRAINER, ONE_BY_ONE, LIBRARY):
            print(f"{name}: {speed[name] / speed[peer]:.2f} times {peer}")


def batches_of(root: str, mask: str) -> list[Batch]:
    """As many batches as there are steps; `mask` says what a segment is."""
    return public_batches(public_config(root, f"data.mask={mask}"), 2 + ROUNDS)


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
    order = np.resize(order, (2 + ROUNDS, PEER_ROWS))  # again from the first where they are few
    collate = DataCollatorForLanguageModeling(pad_token_id=0)
    batches = []
    for indices in order:
        made = collate([chosen[index] for index in indices])
        targets = torch.nn.functional.pad(made.pop("labels")[:, 1:], (0, 1), value=-100)
        batches.append((dict(made), targets))
    return batches


def trainer_step(
    model: ModelConfig, batches: Iterable[TorchBatch], one_by_one: bool = False
) -> Step:
    """A step of SFTTrainer on the batches one after the other: its loss, clipping and optimizer.

    Args:
      one_by_one: take the examples of a batch without their padding, and add up their gradients.
    """
    trainer = new_trainer(model)
    trainer.current_gradient_accumulation_steps = PEER_ROWS if one_by_one else 1
    optimizer, coming = trainer.create_optimizer(), iter(batches)

    def step() -> float:
        inputs, targets = next(coming)
        inputs = {**inputs, "labels": torch.nn.functional.pad(targets[:, :-1], (1, 0), value=-100)}
        lengths = inputs["attention_mask"].sum(1)
        parts = [
            {name: rows[n : n + 1, :length] for name, rows in inputs.items()}
            for n, length in enumerate(lengths)
        ]
        with_loss = (targets >= 0).sum()
        loss = sum(
            trainer.training_step(trainer.model, part, with_loss).item()
            for part in (parts if one_by_one else [inputs])
        )
        trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), trainer.args.max_grad_norm)
        optimizer.step()
        trainer.model.zero_grad()
        return loss

    return step


def new_trainer(model: ModelConfig) -> trl.SFTTrainer:
    """SFTTrainer with our settings; it asks for a dataset and a tokenizer, which no step needs."""
    o = OPTIMIZER
    with tempfile.TemporaryDirectory() as folder:
        args = trl.SFTConfig(
            output_dir=folder, report_to="none", use_cpu=True, bf16=False,
            gradient_checkpointing=False, learning_rate=o.learning_rate, adam_beta1=o.b1,
            adam_beta2=o.b2, adam_epsilon=o.eps, weight_decay=o.weight_decay,
        )  # fmt: skip
        tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=str(TOKENIZER), eos_token="<|im_end|>", pad_token="<|endoftext|>"
        )
        unused = datasets.Dataset.from_list([{"input_ids": [0, 0], "labels": [0, 0]}])
        return trl.SFTTrainer(qwen2(model), args, train_dataset=unused, processing_class=tokenizer)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", metavar="DIR", help="data.root of configs/public_sets.yaml")
    parser.add_argument("--attention", default="auto", help="our backend, as in model.attention")
    main(parser.parse_args())
