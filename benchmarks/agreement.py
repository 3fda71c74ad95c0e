"""The same run on other meshes, with accumulation and remat.

    python benchmarks/agreement.py [VARIANT ...] [KEY=VALUE ...]

Trains twenty steps on the sample set with the training command, for each variant and precision.
Prints how far the losses are from those on one device. Simulates eight devices on the CPU. Names of
variants choose some of them. KEY=VALUE, such as lora.rank=8, is set in all of them.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
SAMPLES = ROOT / "moi_jax" / "data" / "samples"
STEPS = 20
ONE = ["mesh.fsdp=1"]
VARIANTS = {
    "fsdp 4 x tensor 2": ["mesh.fsdp=4", "mesh.tensor=2"],
    "data 2 x fsdp 2 x tensor 2": ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"],
    "data 2 x fsdp 2 x context 2": ["mesh.data=2", "mesh.fsdp=2", "mesh.context=2"],
    "4 microbatches": [*ONE, "train.microbatch_rows=2"],
    "remat full": [*ONE, "model.remat=full"],
}
# First loss and all losses within; None: reported only.
BARS = {"float64": (1e-9, 1e-9), "float32": (5e-6, 2e-5), "bfloat16": (1e-3, None)}


def main(*arguments: str) -> None:
    names = [one for one in arguments if one in VARIANTS]
    common = [one for one in arguments if one not in VARIANTS]
    with tempfile.TemporaryDirectory() as directory:
        for dtype, (first_bar, bar) in BARS.items():
            one = losses(Path(directory), dtype, [*ONE, *common])
            print(f"{dtype}: one device, loss {one[0]:.6f} -> {one[-1]:.6f}")
            for name in names or VARIANTS:
                other = losses(Path(directory), dtype, [*VARIANTS[name], *common])
                differences = [abs(a - b) for a, b in zip(one, other, strict=True)]
                print(
                    f"  {name}: first step {differences[0]:.1e} (bar {first_bar:.0e}), "
                    f"{STEPS} steps {max(differences):.1e}"
                    + (f" (bar {bar:.0e})" if bar else " (no bar)"),
                    flush=True,
                )


def losses(directory: Path, dtype: str, overrides: list[str]) -> list[float]:
    """Returns the losses of a run of STEPS steps with the training command."""
    wide = "float64" if dtype == "float64" else "float32"
    lora = any(one.startswith("lora.") for one in overrides)
    stored = "lora.base_dtype" if lora else "model.param_dtype"
    config = {
        "model": {"preset": "tiny", "remat": "none", "compute_dtype": dtype},
        "tokenizer": {"path": str(SAMPLES / "tokenizer")},
        "data": {
            "root": str(SAMPLES),
            "cache_dir": str(directory / "cache"),
            "sequence_length": 256,
            "max_repeats": 100,
            "domains": [
                {"name": "chat", "sources": [{"path": "chat.jsonl"}]},
                {"name": "maths", "sources": [{"path": "maths.jsonl"}]},
            ],
        },
        "optimizer": {"learning_rate": 1e-3, "moment_dtype": wide},
        "train": {"steps": STEPS, "global_batch_rows": 8},
        "eval": {"every": 0},
        "logging": {"run_dir": str(directory / "run"), "every": 1, "trackers": []},
    }  # fmt: skip
    path = directory / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_X64": str(int(dtype == "float64")),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }
    subprocess.run(
        [sys.executable, "-m", "moi_jax.train", "--config", str(path), "--fresh", *overrides,
         f"{stored}={wide}"],
        check=True, stdout=subprocess.DEVNULL, cwd=ROOT, env=environment,
    )  # fmt: skip
    log = (directory / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    records = [json.loads(line) for line in log]
    return [record["loss"] for record in records if "token_loss" in record]


if __name__ == "__main__":
    main(*sys.argv[1:])
