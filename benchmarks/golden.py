"""Differences from the published reference code of Qwen-7B: python benchmarks/golden.py"""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from moi_jax.checkpoints.hf.reader import read_published
from moi_jax.checkpoints.hf.weights import import_parameters
from moi_jax.models import rotary
from moi_jax.models.decoder import make_model
from moi_jax.models.loss import weighted_nll
from moi_jax.models.parameters import map_parameters

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "qwen_v1"
BAR_LOGITS, BAR_GRADIENTS = 2e-5, 1e-6


def main() -> None:
    for fixture in ("A", "B"):
        config, parameters = read_published(GOLDEN / fixture, None)
        arrays = np.load(GOLDEN / fixture / "logits.npz")
        model = make_model(config)(parameters)
        for name in sorted(arrays.files):
            if name.startswith("x") and f"eval_{name[1:]}" in arrays and "pad" not in name:
                logits = model(arrays[name].astype(np.int32))
                show(f"{fixture} logits {name[1:]}", logits, arrays[f"eval_{name[1:]}"], BAR_LOGITS)
    config, parameters = read_published(GOLDEN / "A", None)
    arrays, expected = (np.load(GOLDEN / "A" / f"{n}.npz") for n in ("logits", "grads"))
    tokens, labels = arrays["x32"].astype(np.int32), arrays["labels_32"]

    def loss(parameters: dict) -> jax.Array:
        model = make_model(config)(parameters)
        segments = jnp.ones(tokens.shape, jnp.int32)
        positions = rotary.segment_positions(segments)
        hidden = model.hidden_states(tokens, positions, segments, extend_context=False)
        hidden = hidden[:, :-1]
        targets = labels[:, 1:]
        weights = (targets >= 0) / np.sum(targets >= 0)
        targets = np.maximum(targets, 0).astype(np.int32)
        return weighted_nll(hidden, model.head_kernel(), targets, weights)[0]

    value, gradients = jax.value_and_grad(loss)(parameters)
    flat = dict(import_parameters(config, lambda name: expected[f"32/{name}"], np.float32))
    mapped = map_parameters(config, lambda path, _: flat[path])
    report = json.loads((GOLDEN / "report.json").read_text())["A"]["loss_32"]["loss"]
    print(f"A loss 32: {float(value):.7f}, reference {report:.7f}")
    worst = max(
        float(np.max(np.abs(a - b)))
        for a, b in zip(jax.tree.leaves(gradients), jax.tree.leaves(mapped), strict=True)
    )
    print(f"A gradients 32: max abs difference {worst:.2e}, bar {BAR_GRADIENTS:.0e}")


def show(what: str, ours: jax.Array, theirs: np.ndarray, bar: float) -> None:
    print(f"{what}: max abs difference {np.max(np.abs(ours - theirs)):.2e}, bar {bar:.0e}")


if __name__ == "__main__":
    main()
