"""Which processes belong together, as flags, SLURM, Open MPI, GKE or a TPU VM say."""

import os
import re
from dataclasses import dataclass

from moi_jax.common.errors import UserError

FLAGS = "--coordinator HOST:PORT --num-processes N --process-id I"


@dataclass(frozen=True)
class Place:
    """The place of this process among the processes of a run.

    Attributes:
      coordinator: host:port where process 0 is found.
      local_devices: the numbers of the GPUs of this process; None means all of its host.
      found_by: how the place was found, for messages.
    """

    coordinator: str
    index: int
    count: int
    local_devices: list[int] | None
    found_by: str


def find_place(
    coordinator: str | None, count: int | None, index: int | None, join_seconds: int
) -> Place | None:
    """The place that the flags give or, without flags, the cluster. None: there is one process.

    Raises:
      UserError: some of the flags are missing or wrong, or the cluster does not say enough.
    """
    if coordinator is None and count is None and index is None:
        return _of_cluster(join_seconds)
    if coordinator is None or count is None or index is None:
        raise UserError(f"the flags {FLAGS} go together; give all three or none")
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal():
        raise UserError(f"--coordinator {coordinator!r} is not HOST:PORT, as in node-1:12345")
    if not index < count:
        raise UserError(
            f"--process-id {index} is not below --num-processes {count}; the processes are "
            f"numbered from 0 to {count - 1}"
        )
    return Place(coordinator, index, count, None, "the flags") if count > 1 else None


def _of_cluster(join_seconds: int) -> Place | None:
    # jax knows how SLURM, Open MPI, GKE and TPU VMs describe themselves. Its public function tells
    # only by failing whether there is a cluster, and gives each process of SLURM one GPU.
    from jax._src.clusters import ClusterEnv

    for found in ClusterEnv._cluster_types:
        if not found.opt_in_only_method and found.is_env_present():
            break
    else:
        if (size := _number("OMPI_COMM_WORLD_SIZE")) > 1:
            raise UserError(
                f"Open MPI started {size} processes, but this version of it does not say where "
                f"process 0 is; give {FLAGS}"
            )
        return None
    count = found.get_process_count()
    if count == 1:
        return None
    port = os.environ.get("JAX_COORDINATOR_PORT")
    try:
        coordinator = found.get_coordinator_address(join_seconds, port)
    except RuntimeError as error:
        raise UserError(
            f"the {found.name} cluster has {count} processes, but process 0 cannot be found "
            f"({error}); give {FLAGS}"
        ) from None
    return Place(coordinator, found.get_process_id(), count, _local_devices(), found.name)


def _local_devices() -> list[int] | None:
    """The GPU of a process that shares its host with others, as SLURM and Open MPI number them.

    One process alone on its host takes all GPUs; so does one that sees no more than its own.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None and "," not in visible:
        return None
    tasks = os.environ.get("SLURM_STEP_TASKS_PER_NODE", "")  # by node, such as 4(x2),1
    by_node = re.findall(r"(?:^|,)(\d+)", tasks)
    if max(*map(int, by_node), _number("OMPI_COMM_WORLD_LOCAL_SIZE"), 0) <= 1:
        return None
    return [max(_number("SLURM_LOCALID"), _number("OMPI_COMM_WORLD_LOCAL_RANK"))]


def _number(variable: str) -> int:
    text = os.environ.get(variable, "")
    return int(text) if text.isdecimal() else 0
