"""What one GPU of 80 GB does with this code, in at most six minutes and without a network.

    python benchmarks/gpu.py all --out DIR
    python benchmarks/gpu.py all --out DIR --dry    # tiny sizes, on any device; the tests run it

The parts, in order of worth; each is a command of its own too:

    contract   the attention kernel against a float64 oracle, and no bit leaks between segments
    attention  its speed beside XLA's, and beside the card's rate of matrix products
    train      the train step of Qwen2.5-1.5B, full fine-tuning: tokens/s, MFU, memory
    lora       the same for LoRA adapters of Qwen2.5-7B, rows of 4,096 tokens
    largest    the train step of the largest model of LARGEST that fits, full fine-tuning
    greedy     greedy tokens in float32, equal to the CPU's

Each part is a process, so that its peak memory is its own, and writes DIR/PART.json after each of
its results. A part that lacks a package says SKIPPED and why; the others run. Without a network,
bring the packages as wheels: `pip download '.[cuda,mosaic]' -d wheels` on another machine,
then `pip install --no-index --find-links wheels ...` here.

Rows have made-up segments, as long as chunks of the public sets are on average. With --config they
are the first rows of that config, whose data must be prepared.
"""

import argparse
import dataclasses
import itertools
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

MINUTES = 6
CHUNK = 1255  # tokens of a mean chunk, see docs/benchmarks.md
# (model, batch rows), the largest first. 16 bytes a parameter: float32 parameters, gradients and
# two moments.
LARGEST = (("qwen3-4b", 2), ("qwen2.5-3b", 4))
Result = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """How large the parts are; `DRY` runs in seconds on a CPU."""

    lengths: tuple[int, ...] = (4096, 8192)
    heads: tuple[tuple[int, int], ...] = ((28, 4), (32, 32))
    width: int = 128
    matmul: int = 8192
    calls: int = 10
    model: str = "qwen2.5-1.5b"
    rows: int = 8
    lora: tuple[str, int, int] = ("qwen2.5-7b", 16, 4)  # model, rank, rows
    steps: int = 6
    largest: tuple[tuple[str, int], ...] = LARGEST
    sampled: str = "qwen2.5-0.5b"
    new_tokens: int = 32


DRY = Sizes(
    lengths=(128,), heads=((4, 2),), width=32, matmul=256, calls=2, model="tiny", rows=2,
    lora=("tiny", 2, 2), steps=2, largest=(("tiny", 2),), sampled="tiny", new_tokens=4,
)  # fmt: skip


def kernel() -> tuple[str, Any]:
    """The attention of this device and its name: a kernel on a GPU with tokamax, else blockwise."""
    import jax

    from moi_jax.models.attention.blockwise import BlockwiseAttention

    if jax.default_backend() == "gpu":
        try:
            import tokamax  # noqa: F401

            from moi_jax.models.attention.mosaic_gpu import MosaicGpuAttention

            return "mosaic_gpu", MosaicGpuAttention()
        except ImportError as error:
            print(f"mosaic_gpu SKIPPED: {error}; attention is blockwise", flush=True)
    return "blockwise", BlockwiseAttention()


def backends() -> dict[str, Any]:
    """The attention of this device, and the one of any device."""
    from moi_jax.models.attention.blockwise import BlockwiseAttention

    return dict([kernel()]) | {"blockwise": BlockwiseAttention()}


def contract(args: argparse.Namespace, sizes: Sizes) -> Iterator[Result]:
    from moi_jax.models.attention.contract import Case, cases, run_contract

    dry = [Case(4, 2, ((1, 2, 63), (65,)), 128, 32, "float32")]
    for (name, attend), case in itertools.product(backends().items(), dry if args.dry else cases()):
        found = run_contract(attend, [case])
        yield {
            "backend": name,
            "case": str(case),
            "passed": all(result.passed for result in found),
            "checks": [str(result) for result in found],
        }


def attention(args: argparse.Namespace, sizes: Sizes) -> Iterator[Result]:
    """Forward, and forward + backward, in bfloat16. Operations: two products for each pair in use
    forward and four backward, without those that a kernel computes again."""
    import jax
    import jax.numpy as jnp
    import numpy as np

    from moi_jax.models.attention.xla import xla_attention

    size = (sizes.matmul, sizes.matmul)
    matrix = jax.random.normal(jax.random.key(0), size, jnp.bfloat16)
    product = seconds(jax.jit(jnp.matmul), (matrix, matrix), sizes.calls)
    rate = 2 * sizes.matmul**3 / product
    yield {"matmul": sizes.matmul, "tflops": rate / 1e12}
    for length in sizes.lengths:
        for heads, kv_heads in sizes.heads:
            rng = np.random.default_rng(0)
            rows = max(sizes.lengths) // length
            shapes = [(rows, length, n, sizes.width) for n in (heads, kv_heads, kv_heads, heads)]
            *inputs, gradient = (jnp.asarray(rng.normal(size=s), jnp.bfloat16) for s in shapes)
            ids, positions, segments = packed_rows(rng, rows, length)
            pairs = sum(n * (n + 1) // 2 for n in segments)
            for label, function in (backends() | {"xla": xla_attention}).items():
                timed = time_attention(function, inputs, gradient, ids, positions, sizes.calls)
                for passes, (direction, took) in zip((1, 3), timed.items(), strict=True):
                    done = 4 * passes * pairs * heads * sizes.width / took
                    yield {
                        "backend": label, "S": length, "rows": rows, "heads": f"{heads}/{kv_heads}",
                        "direction": direction, "ms": took * 1e3, "useful_tflops": done / 1e12,
                        "of_matmul": done / rate,
                    }  # fmt: skip


def time_attention(
    function: Callable, inputs: Sequence, gradient: Any, ids: Any, positions: Any, calls: int
) -> dict[str, float]:
    """Seconds of a forward pass, and of a forward and backward pass."""
    import jax

    def forward(*heads: Any) -> Any:
        return function(*heads, ids, positions)

    def both(*heads: Any) -> Any:
        output, pull = jax.vjp(forward, *heads)
        return output, pull(gradient)

    return {
        "forward": seconds(jax.jit(forward), inputs, calls),
        "forward + backward": seconds(jax.jit(both), inputs, calls),
    }


def train(args: argparse.Namespace, sizes: Sizes) -> Iterator[Result]:
    yield time_train_step(sizes.model, 0, sizes.rows, args, sizes)


def lora(args: argparse.Namespace, sizes: Sizes) -> Iterator[Result]:
    yield time_train_step(*sizes.lora, args, sizes)


def largest(args: argparse.Namespace, sizes: Sizes) -> Iterator[Result]:
    import jax

    for model, rows in sizes.largest:
        try:
            result = time_train_step(model, 0, rows, args, sizes)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            # The compiler's figure leaves out what the memory loses in pieces.
            reason = str(error).splitlines()[0]
            result = {"model": model, "rows": rows, "fits": False, "reason": reason}
        yield result
        if result["fits"]:
            return


def time_train_step(
    model: str, rank: int, rows: int, args: argparse.Namespace, sizes: Sizes
) -> Result:
    """The figures of `gpu_train_step`, with the attention that it had."""
    from gpu_train_step import train_step

    attention, attend = kernel()
    batch = first_batch(args, rows, sizes.lengths[0])
    return {"attention": attention} | train_step(model, rank, batch, attend, sizes.steps, args.out)


def first_batch(args: argparse.Namespace, rows: int, length: int) -> Any:
    """A numpy batch [rows, length]: of the config, or made up. Every vocabulary has its tokens."""
    import numpy as np

    from moi_jax.data.loader import Batch

    if args.config:
        from moi_jax.config.load import load_config
        from moi_jax.training.batches import batches

        overrides = [f"train.global_batch_rows={rows}", "train.microbatch_rows=null"]
        return next(batches(load_config(args.config, overrides)))
    rng = np.random.default_rng(0)
    ids, positions, _ = packed_rows(rng, rows, length)
    tokens, targets = rng.integers(0, 2048, (2, rows, length)).astype(np.int32)
    weights = rng.random((rows, length)) < 0.5
    domains = np.zeros((rows, length), np.int32)
    return Batch(tokens, targets, ids, positions, domains, weights.astype(np.float32))


def packed_rows(rng: Any, rows: int, length: int) -> tuple[Any, Any, Any]:
    """Rows of segments of about CHUNK tokens, at most a third of a row: ids, positions, lengths."""
    import numpy as np

    ids, positions = np.zeros((2, rows, length), np.int32)
    segments = []
    for row in range(rows):
        start = 0
        while start < length:
            drawn = int(rng.lognormal(np.log(min(CHUNK, length / 3)) - 0.125, 0.5)) + 1
            end = min(start + drawn, length)
            ids[row, start:end] = ids[row, start - 1] + 1 if start else 1
            positions[row, start:end] = np.arange(end - start)
            segments.append(end - start)
            start = end
    return ids, positions, np.array(segments)


def greedy(args: argparse.Namespace, sizes: Sizes) -> Iterator[Result]:
    """A model of 4 layers with wide random weights, so that the likeliest token leads by far."""
    import jax
    import numpy as np

    from moi_jax.models.compute import Compute
    from moi_jax.models.decoder import make_model
    from moi_jax.models.parameters import random_parameters
    from moi_jax.models.presets import preset
    from moi_jax.sampling.requests import Request
    from moi_jax.sampling.sampler import Sampler

    model = dataclasses.replace(preset(sizes.sampled), num_layers=4, initializer_range=0.2)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, model.vocab_size, n).tolist() for n in (5, 17, 64, 100)]
    requests = [Request(prompt, max_new_tokens=sizes.new_tokens) for prompt in prompts]
    cpu, device = jax.devices("cpu")[0], jax.devices()[0]
    with jax.default_device(cpu):
        parameters = jax.device_get(random_parameters(model, 0, "float32"))
    answers = []
    for place in (cpu, device):
        # Without it a GPU multiplies float32 in 19 bits (TF32).
        with jax.default_device(place), jax.default_matmul_precision("highest"):
            sampler = Sampler(
                make_model(model, Compute("float32")), model, stop_ids=(),
                vocab_size=model.vocab_size, decode=str, slots=4, context=256,
            )  # fmt: skip
            done = sampler.run(jax.device_put(parameters, place), requests)
            answers.append({number: list(answer.tokens) for number, answer in done})
    yield {"model": sizes.sampled, "prompts": len(prompts), "equal": answers[0] == answers[1],
           "tokens": answers}  # fmt: skip


PARTS: dict[str, Callable[[argparse.Namespace, Sizes], Iterator[Result]]] = {
    "contract": contract, "attention": attention, "train": train, "lora": lora, "largest": largest,
    "greedy": greedy,
}  # fmt: skip


def seconds(function: Callable, arguments: Sequence, calls: int) -> float:
    """The median time of a call, over five rounds after one that compiles."""
    import jax

    jax.block_until_ready(function(*arguments))
    rounds = []
    for _ in range(5):
        started = time.monotonic()
        outputs = [function(*arguments) for _ in range(calls)]
        jax.block_until_ready(outputs)
        rounds.append((time.monotonic() - started) / calls)
    return median(rounds)


def run_part(name: str, args: argparse.Namespace) -> int:
    """Runs a part in this process, and writes its JSON after each result.

    Returns:
      1 if a result is wrong, else 0.
    """
    from moi_jax.parallel.xla_flags import apply_flags, likely_platform

    apply_flags(likely_platform())
    os.environ.setdefault("XLA_CLIENT_MEM_FRACTION", "0.92")
    import jax

    started, results = time.monotonic(), []
    report: Result = {"part": name, "device": jax.devices()[0].device_kind, "jax": jax.__version__}

    def write(status: str, **more: Any) -> None:
        report.update(status=status, seconds=time.monotonic() - started, results=results, **more)
        (args.out / f"{name}.json").write_text(json.dumps(report, indent=1))

    write("running")
    try:
        for result in PARTS[name](args, DRY if args.dry else Sizes()):
            results.append(result)
            write("running")
            print(name, json.dumps(result), flush=True)
    except ImportError as error:
        write("skipped", reason=str(error))
        print(f"{name} SKIPPED: {error}", flush=True)
        return 0
    except Exception as error:
        write("failed", reason=repr(error))
        raise
    write("done")
    return int(any(False in (result.get("passed"), result.get("equal")) for result in results))


def run_all(args: argparse.Namespace) -> int:
    """Runs all parts, each in a process of its own, until the time is over."""
    end, status = time.monotonic() + 60 * MINUTES, 0
    options = [
        *(["--dry"] if args.dry else []),
        *(["--config", args.config] if args.config else []),
    ]
    for name in PARTS:
        command = [sys.executable, __file__, name, "--out", str(args.out), *options]
        try:
            status |= subprocess.run(command, timeout=max(0, end - time.monotonic())).returncode
        except subprocess.TimeoutExpired:
            print(f"{name} SKIPPED: {MINUTES} minutes are over; what it had is in {name}.json")
    return status


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("all", *PARTS))
    parser.add_argument("--out", type=Path, required=True, metavar="DIR")
    parser.add_argument("--dry", action="store_true", help="tiny sizes")
    parser.add_argument("--config", metavar="FILE", help="a config whose rows are trained on")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    if args.part == "all":
        return run_all(args)
    return run_part(args.part, args)


if __name__ == "__main__":
    sys.exit(main())
