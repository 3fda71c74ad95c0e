"""Seconds of the vocabulary loss and its gradients by the share of tokens that carry loss.

    python benchmarks/loss_tokens.py            # Qwen's vocabulary
    python benchmarks/loss_tokens.py 8192
    python benchmarks/loss_tokens.py --data DIR # data.root of configs/public_sets.yaml

4 rows of 2,048 tokens, width 256, float32, on one device. The tokens with loss are runs of 100 at
random places, as the answers of packed conversations are. The shares take turns; the fastest round
counts. The fewer tokens carry loss, the fewer logits are computed.

With --data: the share of the tokens of the public sets whose logits are computed, by the number of
devices with one row each. The device with the most loss tokens decides for all.
"""

import sys

import jax
import numpy as np
from public_rows import public_batches, public_config
from torch_peer import take_turns

from moi_jax.accounting.work import work_of
from moi_jax.models.loss import weighted_nll

ROWS, LENGTH, WIDTH, ANSWER, ROUNDS = 4, 2048, 256, 100, 4
SHARES = (1.0, 0.75, 0.5, 0.25)


def main(vocabulary: int) -> None:
    rng = np.random.default_rng(0)
    hidden = rng.normal(size=(ROWS, LENGTH, WIDTH)).astype(np.float32)
    head = rng.normal(size=(WIDTH, vocabulary)).astype(np.float32)
    targets = rng.integers(0, vocabulary, (ROWS, LENGTH)).astype(np.int32)
    weights = {share: loss_weights(rng, share) for share in SHARES}
    step = jax.jit(
        jax.value_and_grad(lambda h, w, of: weighted_nll(h, w, targets, of)[0], argnums=(0, 1))
    )
    took = take_turns(
        {
            f"{of.mean():.0%}": lambda of=of: jax.block_until_ready(step(hidden, head, of))
            for of in weights.values()
        },
        ROUNDS,
    )
    whole = min(took["100%"])
    for share, seconds in took.items():
        ratio = min(seconds) / whole
        print(f"V {vocabulary:,}, {share} with loss: {min(seconds):.2f} s, {ratio:.2f}")


def loss_weights(rng: np.random.Generator, share: float) -> np.ndarray:
    """float32[ROWS, LENGTH]: 1 in runs of ANSWER tokens, until the batch has this share of them."""
    weights = np.zeros(ROWS * LENGTH, np.float32)
    while weights.mean() < share:
        start = rng.integers(0, len(weights))
        weights[start : start + ANSWER] = 1
    return weights.reshape(ROWS, LENGTH)


def shares(root: str) -> None:
    for length in (2048, 4096):
        config = public_config(root, f"data.sequence_length={length}")
        public_batches(config, 1)  # prepares the data
        work = work_of(config)
        for devices in (1, 8, 64, 256):
            computed = work.logit_tokens(devices, devices, devices) / (devices * length)
            print(f"rows of {length:,}, {devices} devices: {computed:.0%}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--data"]:
        shares(sys.argv[2])
    else:
        main(int(sys.argv[1]) if len(sys.argv) > 1 else 151936)
