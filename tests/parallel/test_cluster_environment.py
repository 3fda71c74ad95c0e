"""Where a process stands among others: by flags, and as clusters describe it."""

import os

import pytest
from jax._src.clusters import cloud_tpu_cluster

from moi_jax.common.errors import UserError
from moi_jax.parallel.cluster_environment import Place, find_place


@pytest.fixture(autouse=True)
def no_cluster(monkeypatch):
    for name in list(os.environ):
        if name.startswith(("SLURM_", "OMPI_", "TPU_", "MEGASCALE_", "JAX_COORDINATOR")):
            monkeypatch.delenv(name)


def in_cluster(monkeypatch, **variables) -> Place | None:
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))
    return find_place(None, None, None, join_seconds=1)


def slurm(monkeypatch, task: int, local: int, tasks: str, count: int = 4) -> Place | None:
    return in_cluster(
        monkeypatch,
        SLURM_JOB_ID=7,
        SLURM_STEP_NODELIST="node[07-08],big1",
        SLURM_NTASKS=count,
        SLURM_PROCID=task,
        SLURM_LOCALID=local,
        SLURM_STEP_TASKS_PER_NODE=tasks,
    )


def test_a_process_without_flags_or_cluster_is_alone():
    assert find_place(None, None, None, join_seconds=1) is None


def test_flags_say_the_place_whatever_the_cluster_says(monkeypatch):
    slurm(monkeypatch, task=1, local=0, tasks="1(x4)")
    assert find_place("a:1", 2, 0, join_seconds=1) == Place("a:1", 0, 2, None, "the flags")
    assert find_place("a:1", 1, 0, join_seconds=1) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (("a:1", 2, None), "give all three or none"),
        ((None, 2, 0), "give all three or none"),
        (("a", 2, 0), "--coordinator 'a' is not HOST:PORT"),
        (("a:b", 2, 0), "is not HOST:PORT"),
        (("a:1", 2, 2), "--process-id 2 is not below --num-processes 2"),
    ],
)
def test_flags_that_say_no_place_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        find_place(*given, join_seconds=1)


@pytest.mark.parametrize(
    ("tasks", "local", "devices"),
    [("1(x3)", 0, None), ("8(x3)", 5, [5]), ("2,1(x2)", 1, [1]), ("1,8", 0, [0])],
)
def test_a_task_of_slurm_takes_its_gpu_or_all_of_a_node_where_it_is_alone(
    tasks, local, devices, monkeypatch
):
    place = slurm(monkeypatch, task=3, local=local, tasks=tasks)
    assert place == Place("node07:61447", 3, 4, devices, "slurm")


def test_one_task_of_slurm_is_alone(monkeypatch):
    assert slurm(monkeypatch, task=0, local=0, tasks="1", count=1) is None


def test_open_mpi_says_the_place(monkeypatch):
    place = in_cluster(
        monkeypatch,
        OMPI_MCA_orte_hnp_uri="1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
        OMPI_COMM_WORLD_SIZE=2,
        OMPI_COMM_WORLD_RANK=1,
        OMPI_COMM_WORLD_LOCAL_RANK=1,
        OMPI_COMM_WORLD_LOCAL_SIZE=2,
    )
    assert place is not None
    assert place.coordinator.startswith("10.96.0.1:")
    assert (place.index, place.count, place.local_devices) == (1, 2, [1])


def test_open_mpi_that_does_not_say_where_process_0_is_asks_for_flags(monkeypatch):
    with pytest.raises(UserError, match="Open MPI started 2 processes, but"):
        in_cluster(monkeypatch, OMPI_COMM_WORLD_SIZE=2, OMPI_COMM_WORLD_RANK=1)


def test_a_tpu_slice_of_gke_says_the_place(monkeypatch):
    monkeypatch.setattr(cloud_tpu_cluster, "running_in_cloud_tpu_vm", True)
    place = in_cluster(
        monkeypatch,
        TPU_SKIP_MDS_QUERY=1,
        TPU_WORKER_HOSTNAMES="localhost,worker-1",
        TPU_WORKER_ID=1,
        MEGASCALE_NUM_SLICES=3,
        MEGASCALE_SLICE_ID=2,
        MEGASCALE_COORDINATOR_ADDRESS="localhost:8080",
    )
    assert place == Place("localhost:8482", 5, 6, None, "gketpu")
