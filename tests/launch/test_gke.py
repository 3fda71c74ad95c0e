"""launch/gke: what the manifests say, that they fit their schemas, and which values are refused."""

import importlib.util
import os
import re
import subprocess
import sys

import pytest
import yaml

from moi_jax.common.errors import UserError
from moi_jax.config.load import load_config

from support.runs import ROOT, small_config

GKE = ROOT / "launch" / "gke"
TPU = ("tpu", "configs/topologies/v5e_4x8.yaml")
GPU = ("gpu", "configs/topologies/h100_8.yaml")
PREPARE = ("prepare", "configs/topologies/v5e_4x8.yaml")
IMAGE = "europe-docker.pkg.dev/project/moi/moi_jax:1.0"


@pytest.fixture(scope="module")
def schemas():
    """The kind of a manifest -> its model, made from the schemas of Kubernetes and JobSet."""
    from kubeflow_trainer_api import models  # a second of imports

    return {
        "JobSet": models.JobsetV1alpha2JobSet,
        "ConfigMap": models.IoK8sApiCoreV1ConfigMap,
        "PersistentVolumeClaim": models.IoK8sApiCoreV1PersistentVolumeClaim,
        "Pod": models.IoK8sApiCoreV1Pod,
        "Job": models.IoK8sApiBatchV1Job,
    }


@pytest.fixture
def render(tmp_path, monkeypatch, capsys):
    """Runs render.py in this process: (arguments, settings to change) -> kind -> manifest."""
    spec = importlib.util.spec_from_file_location("render", GKE / "render.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.chdir(ROOT)

    def run(*arguments, **changes):
        lines = (GKE / "settings.env").read_text(encoding="utf-8").splitlines()
        values = {"IMAGE": IMAGE, **changes}
        lines = [line for line in lines if line.partition("=")[0] not in values]
        lines += [f"{name}={value}" for name, value in values.items() if value is not None]
        settings = tmp_path / "settings.env"
        settings.write_text("\n".join(lines), encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["render.py", *arguments, "--settings", str(settings)])
        module.main()
        return {part["kind"]: part for part in yaml.safe_load_all(capsys.readouterr().out)}

    return run


def pod(jobset):
    job = jobset["spec"]["replicatedJobs"][0]["template"]["spec"]
    return job, job["template"]["spec"], job["template"]["spec"]["containers"][0]


@pytest.mark.parametrize(
    "arguments", [TPU, GPU, PREPARE, ("volume",), ("files",)], ids=lambda a: a[0]
)
def test_every_manifest_fits_its_schema(render, schemas, arguments):
    """A key that the schema does not have is lost on the way through the model."""
    for kind, manifest in render(*arguments).items():
        assert schemas[kind].from_dict(manifest).to_dict() == manifest, kind


def test_a_manifest_with_a_mistake_does_not_fit(render, schemas):
    """That the test above can fail."""
    jobset = render(*TPU)["JobSet"]
    pod(jobset)[1]["terminationGraceSeconds"] = 180
    assert schemas["JobSet"].from_dict(jobset).to_dict() != jobset
    pod(jobset)[0]["parallelism"] = "eight"
    with pytest.raises(ValueError, match="parallelism"):
        schemas["JobSet"].from_dict(jobset)


@pytest.mark.parametrize("arguments", [TPU, GPU], ids=lambda a: a[0])
def test_what_is_restarted_and_what_ends_the_run(render, arguments):
    jobset = render(*arguments, MAX_RESTARTS=7)["JobSet"]
    policy, (job, pod_spec, _) = jobset["spec"]["failurePolicy"], pod(jobset)
    # No pod is restarted alone. 75, 143 and evictions count as failures of the job, which restart
    # all of the set; any other status fails by the policy of pods, which ends it.
    assert (job["backoffLimit"], pod_spec["restartPolicy"]) == (0, "Never")
    evicted, status = job["podFailurePolicy"]["rules"]
    assert evicted["action"] == "Count"
    assert evicted["onPodConditions"] == [{"type": "DisruptionTarget", "status": "True"}]
    assert status["action"] == "FailJob"
    assert status["onExitCodes"]["operator"] == "NotIn"
    assert status["onExitCodes"]["values"] == [75, 143]
    assert policy["maxRestarts"] == 7
    (rule,) = policy["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])


def test_the_pods_of_prepare_make_all_blocks_of_the_cache(render, tmp_path):
    """Each pod's command is run here with the variables that Kubernetes gives it."""
    config = small_config(tmp_path)
    rendered = render("prepare", str(config), PREPARE_JOBS=2)
    path = tmp_path / "resolved.yaml"
    path.write_text(rendered["ConfigMap"]["data"]["config.yaml"], encoding="utf-8")
    job = rendered["Job"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (2, 2, "Indexed")
    *shell, script = job["template"]["spec"]["containers"][0]["command"]
    script = script.replace("$$", "$").replace("/etc/moi/config.yaml", str(path))
    script = script.replace("python", sys.executable)
    told = []
    for index in ("0", "1"):
        done = subprocess.run(
            [*shell, script], check=True, cwd=ROOT, capture_output=True, text=True,
            env=os.environ | {"JOB_COMPLETION_INDEX": index},
        )  # fmt: skip
        told += re.findall(r"shard (\d) of 2: (\d+) of (\d+) blocks", done.stdout)
    assert told == [("1", "1", "2"), ("2", "1", "2")]
    assert len(list((tmp_path / "cache" / "blocks").iterdir())) == 2


@pytest.mark.parametrize(("slices", "mesh"), [(1, "mesh.data=1"), (2, "mesh.data=2")])
def test_a_tpu_slice_is_a_job_with_a_pod_for_each_host(render, slices, mesh):
    jobset = render(*TPU, mesh, TPU_SLICES=slices)["JobSet"]
    job, pod_spec, container = pod(jobset)
    assert jobset["spec"]["replicatedJobs"][0]["replicas"] == slices
    assert (job["parallelism"], job["completions"]) == (8, 8)
    assert pod_spec["nodeSelector"]["cloud.google.com/gke-tpu-topology"] == "4x8"
    assert container["resources"]["limits"] == {"google.com/tpu": "4"}
    assert "--coordinator" not in container["command"]


def test_gpu_nodes_find_each_other_by_the_name_of_the_first_pod(render):
    jobset = render(*GPU, "mesh.data=3", GPU_NODES=3, NAME="blue")["JobSet"]
    job, _, container = pod(jobset)
    assert (job["parallelism"], job["completions"], job["completionMode"]) == (3, 3, "Indexed")
    flags = container["command"][container["command"].index("--coordinator") :]
    # JobSet names a pod <set>-<replicated job>-<job>-<pod>.<subdomain>.
    worker, network = jobset["spec"]["replicatedJobs"][0]["name"], jobset["spec"]["network"]
    coordinator = f"blue-{worker}-0-0.{network['subdomain']}:8476"
    index = "$(JOB_COMPLETION_INDEX)"
    assert flags == ["--coordinator", coordinator, "--num-processes", "3", "--process-id", index]


@pytest.mark.parametrize("arguments", [TPU, GPU], ids=lambda a: a[0])
def test_the_run_has_its_config_and_the_volume(render, arguments, tmp_path):
    prompt = "data.domains.0.prompt='Be: {kind}\\n  - $HOME # x'"
    rendered = render(*arguments, prompt)
    path = tmp_path / "config.yaml"
    path.write_text(rendered["ConfigMap"]["data"]["config.yaml"], encoding="utf-8")
    assert load_config(path) == load_config(arguments[1], [prompt])
    _, pod_spec, container = pod(rendered["JobSet"])
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in pod_spec["volumes"]}
    assert container["command"][4] == f"{mounts['config']}/config.yaml"
    name = rendered["ConfigMap"]["metadata"]["name"]
    assert volumes["config"]["configMap"]["name"] == name
    claim = render("volume")["PersistentVolumeClaim"]["metadata"]["name"]
    assert volumes["workspace"]["persistentVolumeClaim"]["claimName"] == claim
    assert container["workingDir"] == mounts["workspace"]


@pytest.mark.parametrize("run_dir", ["runs/x", "~/x", "/workspace/x", "runs/../x"])
def test_a_run_on_the_volume_with_time_to_save_is_rendered(render, run_dir):
    assert render(*TPU, f"logging.run_dir={run_dir}", TERMINATION_SECONDS=150)["JobSet"]


@pytest.mark.parametrize(
    ("arguments", "changes", "message"),
    [
        (TPU, {"IMAGE": ""}, "IMAGE has no value; set it"),
        (TPU, {"NAMESPACE": None}, "NAMESPACE has no value; set it"),
        (TPU, {"NAME": "moi}; rm -rf /"}, "NAME=moi}; rm -rf / does not match"),
        (TPU, {"IMAGE": '"x"'}, 'IMAGE="x" does not match'),
        (TPU, {"GPU_NODES": "0"}, "GPU_NODES=0 does not match"),
        (TPU, {"NODES": "3"}, "'NODES=3' is not NAME=VALUE with one of the names NAME, "),
        (TPU, {"TPU_CHIPS_PER_HOST": 5}, "32 chips, which is not a multiple of TPU_CHIPS_PER"),
        (TPU, {"TERMINATION_SECONDS": 149}, "grace_seconds is 120, so choose 150 or more"),
        (TPU, {"TPU_SLICES": 2}, "does not fit the 64 devices of the settings"),
        (GPU, {"GPUS_PER_NODE": 4}, "does not fit the 4 devices of the settings"),
        ((*TPU, "logging.run_dir=/tmp/run"), {}, "/tmp/run is not on the volume"),
        ((*TPU, "logging.run_dir=../tmp/run"), {}, "../tmp/run is not on the volume"),
        ((*TPU, "logging.run_dir=~/../run"), {}, "~/../run is not on the volume"),
        ((*TPU, "logging.run_dir=/workspace/../run"), {}, "/workspace/../run is not on the volume"),
        ((*TPU, "train.rows=1"), {}, "unknown key 'rows' in train"),
        (("gpu",), {}, "render.py gpu needs a config"),
        (PREPARE, {"PREPARE_MEMORY": "16"}, "PREPARE_MEMORY=16 does not match"),
    ],
)
def test_a_mistake_is_one_line(render, arguments, changes, message):
    with pytest.raises(UserError) as error:
        render(*arguments, **changes)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
