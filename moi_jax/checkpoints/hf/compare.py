"""Comparing a checkpoint with published weights: tensors bit by bit, logits with transformers."""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from moi_jax.checkpoints.hf.safetensors_reader import Header
from moi_jax.models.config import ModelConfig
from moi_jax.text.tokenizer import Tokenizer

Report = dict[str, Any]

PROMPT_TOKENS = 500
# Where the segments of each row of the packed batch begin, as shares of the row.
PACKED = ((0, 3 / 8), (0, 1 / 6, 3 / 4))
TEXT = """\
Please read the notes below and answer each of the questions in turn.

1. A train leaves at 9:40 and arrives at 13:05. How long is the journey, and what is the mean \
speed over its 287 kilometres? Show every step: 3 h 25 min = 205 min, 287 / 205 * 60 = 84 km/h.
2. What does this function return for n = 10, and how would you make it faster?

def fib(n: int) -> int:
    return n if n < 2 else fib(n - 1) + fib(n - 2)

3. Übersetze bitte: "The weather is fine today, so we shall walk by the river." 今天天气很好。
4. Call the tool {"name": "get_weather", "arguments": {"city": "Zürich", "days": 3}} and explain \
its result to a reader who has never seen JSON. Name two things which it does not tell you.
5. Write a short, friendly letter to a neighbour whose dog barks at night; do not accuse anybody.
"""


class PublishedTensors(Protocol):
    """Published tensors by their names, read one at a time: `TensorFiles`, `GgufCheckpoint`."""

    @property
    def headers(self) -> Mapping[str, Header]: ...

    def read(self, name: str) -> np.ndarray: ...


def prompt_ids(tokenizer: Tokenizer, longest: int) -> np.ndarray:
    """int32[S]: PROMPT_TOKENS ids of the fixed text, which is repeated if it is too short.

    Args:
      longest: the most ids to return.
    """
    ids = tokenizer.encode(TEXT)
    return np.resize(np.array(ids, np.int32), min(PROMPT_TOKENS, longest))


def batches(ids: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields (tokens, segment_ids), both int32[B, S]: the prompt alone, then the packed batch."""
    yield ids[None], np.ones((1, len(ids)), np.int32)
    length = len(ids) // 2
    rows = np.resize(ids, (len(PACKED), length))
    places = np.arange(length) / length
    segments = [np.searchsorted(starts, places, side="right") for starts in PACKED]
    yield rows, np.array(segments, np.int32)


def compare_configs(ours: ModelConfig, theirs: ModelConfig) -> Report:
    """Field -> both values, for the fields of the architecture that differ."""
    left, right = ours.to_json(), theirs.to_json()
    return {
        field: {"ours": left[field], "theirs": right[field]}
        for field in left
        if left[field] != right[field] and field != "default_system_prompt"
    }


def total_bytes(files: PublishedTensors) -> int:
    """Bytes of all tensors, for a progress bar."""
    return sum(
        int(np.prod(header.shape)) * header.dtype.itemsize for header in files.headers.values()
    )


def compare_tensors(
    ours: Iterable[tuple[str, np.ndarray]],
    files: PublishedTensors,
    ignored: Collection[str],
    progress: Callable[[int], None],
    rounded: Callable[[str, np.ndarray], np.ndarray] | None = None,
) -> Report:
    """Compares every tensor of both sides, bit by bit.

    Args:
      ignored: names of published tensors that only repeat others.
      rounded: gives our tensor as the published files would hold it, in their dtype. One that is
        equal only so counts as `rounded` too.

    If our tensor has another dtype, theirs is cast to it first; such a match is counted as
    `cast` too.

    Returns:
      matched, cast and rounded (counts), missing (names that only the published files have),
      unexpected (only ours), mismatched (name, what: shape or value, and how).
    """
    waiting = files.headers.keys() - set(ignored)
    lists: Report = {"missing": [], "unexpected": [], "mismatched": []}
    report: Report = {"matched": 0, "cast": 0, "rounded": 0, **lists}
    for name, tensor in ours:
        if name not in waiting:
            report["unexpected"].append(name)
            continue
        waiting.remove(name)
        header = files.headers[name]
        if header.shape != tensor.shape:
            how = {"what": "shape", "ours": list(tensor.shape), "theirs": list(header.shape)}
            report["mismatched"].append({"name": name, **how})
            continue
        published = files.read(name)
        progress(published.nbytes)
        with np.errstate(over="ignore"):
            cast = published.astype(tensor.dtype, copy=False)
        different = _different(tensor, cast)
        if different and rounded and _different(rounded(name, tensor), published) is None:
            report["matched"] += 1
            report["rounded"] += 1
            continue
        if different:
            report["mismatched"].append({"name": name, "what": "value", **different})
            continue
        report["matched"] += 1
        if published.dtype != tensor.dtype:
            report["cast"] += 1
            report["dtypes"] = {"ours": str(tensor.dtype), "theirs": str(published.dtype)}
    report["missing"] = sorted(waiting)
    return report


def _different(ours: np.ndarray, theirs: np.ndarray) -> Report | None:
    """How many values differ, and by how much; None if all bits are equal."""
    bits = np.dtype(f"u{ours.dtype.itemsize}")
    unequal = np.ascontiguousarray(ours).view(bits) != np.ascontiguousarray(theirs).view(bits)
    count = int(np.count_nonzero(unequal))
    if not count:
        return None
    gap = np.abs(ours[unequal].astype(np.float64) - theirs[unequal].astype(np.float64))
    return {"count": count, "of": ours.size, "max_abs": float(gap.max())}


def compare_logits(
    ours: list[np.ndarray], ids: np.ndarray, published: Path, dtype: np.dtype
) -> Report:
    """Compares logits of both batches with transformers' model of `published`, all in float32.

    Args:
      ours: float32 logits [B, S, V] of each of `batches(ids)`.
      published: a directory, or a .gguf file.
      dtype: our stored dtype; the published weights are rounded to it first.

    Returns:
      max_abs and mean_kl over all, and of `prompt` and `packed` alone; `largest` (absolute logit);
      `top5` (the likeliest next tokens of the prompt).
    """
    reference = _reference(published, dtype)
    theirs = []
    for tokens, segment_ids in batches(ids):
        logits = [
            np.concatenate([reference(row[of == n]) for n in np.unique(of)])
            for row, of in zip(tokens, segment_ids, strict=True)
        ]
        theirs.append(np.stack(logits))
    vocabulary = theirs[0].shape[-1]
    pairs = [
        (a.reshape(-1, vocabulary), b.reshape(-1, vocabulary))
        for a, b in zip(ours, theirs, strict=True)
    ]
    parts = {
        name: {
            "tokens": len(a),
            "max_abs": float(np.max(np.abs(a - b))),
            "mean_kl": float(np.mean(_divergence(b, a))),
        }
        for name, (a, b) in zip(("prompt", "packed"), pairs, strict=True)
    }
    last, reference_last = pairs[0][0][-1], pairs[0][1][-1]
    best = np.argsort(-reference_last)[:5]
    return {
        "max_abs": max(part["max_abs"] for part in parts.values()),
        "mean_kl": max(part["mean_kl"] for part in parts.values()),
        "largest": float(max(np.max(np.abs(b)) for _, b in pairs)),
        **parts,
        "top5": [
            {"token": int(t), "ours": float(last[t]), "theirs": float(reference_last[t])}
            for t in best
        ],
        "top5_order_equal": bool(np.array_equal(np.argsort(-last)[:5], best)),
    }


def _reference(published: Path, dtype: np.dtype) -> Callable[[np.ndarray], np.ndarray]:
    """transformers' model: int32[S] -> float32 logits [S, V]."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    rounded = getattr(torch, str(dtype))
    place: dict[str, Any] = {"pretrained_model_name_or_path": published}
    if published.is_file():  # transformers reads and dequantises GGUF by code of its own
        place = {"pretrained_model_name_or_path": published.parent, "gguf_file": published.name}
    model = AutoModelForCausalLM.from_pretrained(
        **place, dtype=rounded, attn_implementation="eager", local_files_only=True
    )
    # Its own float() refuses weights that came from GGUF, though they are dequantised.
    model = torch.nn.Module.float(model).eval()

    def logits(tokens: np.ndarray) -> np.ndarray:
        with torch.no_grad():
            return model(torch.from_numpy(tokens.astype(np.int64))[None]).logits[0].numpy()

    return logits


def _divergence(reference: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """KL(reference || logits) of every row [S, V], in nats, in float64."""
    divergence = np.empty(len(reference))
    for row, (p, q) in enumerate(zip(reference, logits, strict=True)):
        p, q = (x.astype(np.float64) - np.max(x) for x in (p, q))
        log_p, log_q = p - np.log(np.exp(p).sum()), q - np.log(np.exp(q).sum())
        divergence[row] = np.sum(np.exp(log_p) * (log_p - log_q))
    return divergence
