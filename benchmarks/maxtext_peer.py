"""The memory of MaxText's train step, as the compiler of a TPU counts it.

    pip install 'maxtext[tpu]'    # Python 3.12, in an environment of its own
    python benchmarks/maxtext_peer.py BASE.yml model_name=qwen2.5-7b run_name=peer \\
        base_output_directory=DIR compile_topology=v5p-16 compile_topology_num_slices=1 \\
        per_device_batch_size=1 max_target_length=4096 remat_policy=full attention=flash \\
        dataset_type=synthetic enable_checkpointing=false

BASE.yml is maxtext/configs/base.yml of the installed package. No TPU is needed. The script runs
MaxText's own `train_compile` and prints the figures of the program that it compiles, in GiB.
"""

import os
from typing import Any

os.environ |= {
    "JAX_PLATFORMS": "cpu",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}

from absl import app
from maxtext.trainers.pre_train import train_compile

GIB = 1 << 30
FIGURES = ("argument_size_in_bytes", "temp_size_in_bytes", "peak_memory_in_bytes")


def main() -> None:
    compile_step = train_compile.jit_and_compile

    def compile_and_show(*args: Any, **options: Any) -> Any:
        compiled = compile_step(*args, **options)
        memory = compiled.memory_analysis()
        for name in FIGURES:
            print(f"{name} {getattr(memory, name) / GIB:.2f} GiB", flush=True)
        return compiled

    train_compile.jit_and_compile = compile_and_show
    app.run(train_compile.main)


if __name__ == "__main__":
    main()
