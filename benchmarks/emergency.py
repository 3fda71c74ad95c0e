"""What orbax's emergency checkpoints do on two simulated hosts: python benchmarks/emergency.py

Two processes of two CPU devices each train nothing on a mesh (data=2, fsdp=2), so that each holds a
whole copy of the state. Each saves every step in a folder of its own, and every fifth one in a
folder that both share. After step 7 both are killed. Then both are started again: with the
folders as they are, with a bit flipped in a file of a host's own folder, and without this folder.
Prints the step and the values that each process restores, and whether a saved -0.0 is one still.
docs/reliability.md says why training has local copies of its own.
"""

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HOSTS, DEVICES, STEPS, PERSISTENT_EVERY = 2, 2, 8, 5
TIMEOUT = 60  # seconds


def work(act: str, index: int, port: int, place: Path) -> None:
    """One process: it saves steps until it is killed, or restores the newest one."""
    from absl import flags

    flags.FLAGS(sys.argv[:1])  # the restore reads a flag of absl, and fails if none was parsed

    import jax
    import numpy as np
    import orbax.checkpoint as ocp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec
    from orbax.checkpoint._src.multihost import multihost
    from orbax.checkpoint.experimental.emergency import checkpoint_manager as emergency

    jax.distributed.initialize(f"localhost:{port}", HOSTS, index)
    multihost.initialize_runtime_to_distributed_ids()
    multihost.initialize_distributed_to_device_ids()
    mesh = Mesh(np.array(jax.devices()).reshape(HOSTS, DEVICES), ("data", "fsdp"))
    rows = NamedSharding(mesh, PartitionSpec("fsdp"))

    def state(step: int) -> dict[str, jax.Array]:
        part = np.full((4, 4), step, np.float32)
        zero = np.full((4, 4), -0.0, np.float32)
        return {
            "kernel": jax.make_array_from_callback((8, 4), rows, lambda _: part),
            "zero": jax.make_array_from_callback((8, 4), rows, lambda _: zero),
        }

    own = place / f"host{index}"
    own.mkdir(exist_ok=True)
    manager = emergency.CheckpointManager(
        own,
        place / "shared",
        global_mesh=mesh,
        abstract_state=jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state(0)
        ),
        options=emergency.CheckpointManagerOptions(
            local=emergency.LocalCheckpointOptions(save_interval_steps=1, max_to_keep=2),
            persistent=emergency.PersistentCheckpointOptions(
                save_interval_steps=PERSISTENT_EVERY, max_to_keep=2
            ),
            replica_axis_index=0,
        ),
    )
    if act == "save":
        for step in range(STEPS):
            manager.save(step, ocp.args.Composite(state=ocp.args.PyTreeSave(state(step))))
            manager.wait_until_finished()
        os.kill(os.getpid(), signal.SIGKILL)
    step = manager.latest_step()
    restored = manager.restore(step)
    restored = restored.get("state", restored)
    values, zeros = (
        sorted({float(value) for shard in restored[name].addressable_shards
                for value in np.ravel(shard.data)}, key=str)
        for name in ("kernel", "zero")
    )  # fmt: skip
    print(f"process {index} restores step {step} with the values {values}; -0.0 became {zeros}")


def run(act: str, place: Path) -> str:
    """Runs an act in both processes; returns what they print, or the last lines of an error."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    environment = {
        **{**os.environ, "JAX_PLATFORMS": "cpu"},
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={DEVICES}",
    }
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, act, str(index), str(port), place],
            env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for index in range(HOSTS)
    ]  # fmt: skip
    deadline = time.monotonic() + TIMEOUT
    while any(process.poll() is None for process in processes) and time.monotonic() < deadline:
        time.sleep(0.1)
    hanging = [process.poll() is None for process in processes]
    for process in processes:
        process.kill()
    said = []
    for index, (process, hangs) in enumerate(zip(processes, hanging, strict=True)):
        out, error = process.communicate()
        lines = [line for line in out.splitlines() if line.startswith("process ")]
        errors = [
            line for line in error.splitlines() if re.match(r"[\w.]*(Error|Exception)\b", line)
        ]
        end = f"still there after {TIMEOUT} s" if hangs else f"status {process.returncode}"
        said += lines or [f"process {index}: {end} {errors[-1][:200] if errors else ''}"]
    return "\n".join(said)


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def main() -> None:
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        print(f"saved, and killed after step {STEPS - 1}")
        run("save", place)
        for host in range(HOSTS):
            steps = sorted(path.name for path in (place / f"host{host}").iterdir())
            print(f"own folder of process {host}: {steps}")
        print(run("restore", place))
        last = place / f"host{HOSTS - 1}"
        files = [path for path in (last / f"{STEPS - 1}/state").rglob("d/*") if path.is_file()]
        for file in files:
            flip(file)
        print(f"with a bit flipped in each of {len(files)} files of data of process {HOSTS - 1}")
        print(run("restore", place))
        shutil.rmtree(last)
        print(f"without the folder of process {HOSTS - 1}")
        print(run("restore", place))


if __name__ == "__main__":
    if len(sys.argv) > 1:
        work(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
    else:
        main()
