"""The train step on one device, for gpu.py: what it needs by three counts, and how fast it is."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from moi_jax import config as config_lib
from moi_jax.data.loader import Batch
from moi_jax.models.attention import AttentionFn
from moi_jax.models.compute import Compute, resolve_dtype
from moi_jax.models.config import ModelConfig
from moi_jax.models.decoder import make_model
from moi_jax.models.flops import causal_pairs
from moi_jax.models.lora import adapted
from moi_jax.models.parameters import random_parameters
from moi_jax.models.presets import preset
from moi_jax.models.remat import remat_policy
from moi_jax.parallel.chips import chip_of
from moi_jax.parallel.mesh import make_mesh
from moi_jax.parallel.placing import place_batch
from moi_jax.training.device_figures import DeviceFigures, Work
from moi_jax.training.optimizer import make_optimizer, make_schedule
from moi_jax.training.state import abstract_state, new_state
from moi_jax.training.step import make_train_step

Result = dict[str, Any]
REMAT = config_lib.Model().remat
NO_LIMIT = np.float32(np.inf)  # of the loss


def train_step(
    name: str, rank: int, rows: Batch, attend: AttentionFn, steps: int, out: Path
) -> Result:
    """Compiles the train step of a preset, and runs it if the compiler's figure fits the device.

    Args:
      rank: of LoRA adapters beside a base in the compute dtype; 0 trains all parameters.
      rows: a numpy batch [B, S].
      steps: how many are timed, after one that is not.
      out: the directory for the config that `moi_jax.plan` reads.

    Returns:
      Sizes, the compiler's and the plan's bytes; if the step fits, also its time, tokens/s and the
      figures of `DeviceFigures`.
    """
    device, lora = jax.devices()[0], config_lib.LoRA(rank=rank)
    model = adapted(preset(name), lora)
    mesh = make_mesh(config_lib.Mesh(), [device])
    settings = config_lib.Optimizer()
    optimizer, schedule = make_optimizer(settings, model), make_schedule(settings, 1000)
    dtype = resolve_dtype("auto", device.platform)
    bind = make_model(model, Compute(dtype, remat_policy(REMAT, {}), attend))
    step = make_train_step(model, bind, optimizer, schedule, 4, mesh)
    batch = place_batch(rows, np.arange(len(rows.tokens)), len(rows.tokens), mesh)
    stored = dtype if rank else "float32"
    abstract = abstract_state(model, optimizer, stored, mesh)
    with jax.set_mesh(mesh):
        started = time.monotonic()
        compiled = step.lower(abstract, batch, NO_LIMIT).compile()  # type: ignore[attr-defined]
        result = {"model": name, "lora_rank": rank, "remat": REMAT}
        result["compile_seconds"] = time.monotonic() - started
        result |= memory_figures(compiled, device) | planned_bytes(name, rank, rows, device, out)
        if not result["fits"]:
            return result
        state = new_state(model, optimizer, random_parameters(model, 0, stored, mesh), mesh)
        took = []
        for _ in range(steps + 1):
            started = time.monotonic()
            state, metrics = compiled(state, batch, NO_LIMIT)
            loss = float(metrics["loss"])
            took.append(time.monotonic() - started)
    return result | {"loss": loss} | speed_figures(model, rows, mesh, median(took[1:]))


def memory_figures(compiled: Any, device: jax.Device) -> Result:
    """What the compiler says that the step needs, and whether the device has it."""
    memory = compiled.memory_analysis()
    needs = memory.argument_size_in_bytes + memory.temp_size_in_bytes
    has = (device.memory_stats() or {}).get("bytes_limit", needs)
    return {"compiler_bytes": needs, "limit_bytes": has, "fits": needs <= has}


def speed_figures(model: ModelConfig, rows: Batch, mesh: Mesh, seconds: float) -> Result:
    """Tokens/s, utilisation and peak memory of a step that takes so long."""
    real = rows.segment_ids > 0
    tokens, (count, length) = int(real.sum()), real.shape
    segments = [np.bincount(ids)[1:] for ids in rows.segment_ids]
    pairs, loss_tokens = causal_pairs(np.concatenate(segments)), int((rows.loss_weights > 0).sum())
    work = Work(count, tokens, pairs, loss_tokens, seconds)
    return {
        "rows": count, "S": length, "tokens": tokens, "step_seconds": seconds,
        "tokens_per_second": tokens / seconds, **DeviceFigures(model, length, mesh).record(work),
    }  # fmt: skip


def planned_bytes(name: str, rank: int, rows: Batch, device: jax.Device, out: Path) -> Result:
    """What `moi_jax.plan` says of the peak memory, which it knows by arithmetic for GPUs."""
    if (chip := chip_of(device.device_kind)) is None:
        return {}
    count, length = rows.tokens.shape
    source = {"name": "chat", "sources": [{"path": "chat.jsonl"}]}
    sections: dict[str, Any] = {
        "model": {"preset": name},
        "data": {"sequence_length": length, "domains": [source]},
        "train": {"steps": 100, "global_batch_rows": count},
    }
    if rank:
        sections["lora"] = {"rank": rank}
    config = out / f"plan_{name}_{rank}.json"  # JSON is YAML
    config.write_text(json.dumps(sections))
    command = ["-m", "moi_jax.plan", "--config", config, "--topology", f"{chip.name}:1", "--json"]
    done = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )  # fmt: skip
    if done.returncode:
        return {"plan": f"SKIPPED: {done.stderr.strip().splitlines()[-1]}"}
    return {"plan_bytes": json.loads(done.stdout)["per_chip"]["peak_bytes"]}
