"""python launch/gke/render.py tpu CONFIG: the manifests of a run on GKE, on standard output.

The values come from settings.env, and each of them is checked. The config is resolved here, with
its base and the overrides, so a mistake in it is told before a node is paid for.
"""

import argparse
import math
import os
import re
import string
import sys
import textwrap
from pathlib import Path

from moi_jax.cli.command import run_command
from moi_jax.common.errors import UserError
from moi_jax.config import Config
from moi_jax.config.load import load_config

HERE = Path(__file__).parent
WORKSPACE = Path("/workspace")
MARGIN = 30  # seconds beside checkpoint.grace_seconds, to notice the signal and to end

NAME = r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?"
COUNT = r"[1-9][0-9]*"
# Setting -> what a value must look like. No value holds a character that means something in YAML.
SETTINGS = {
    "NAME": NAME,
    "NAMESPACE": NAME,
    "IMAGE": r"[a-z0-9][A-Za-z0-9._/-]*(:[A-Za-z0-9._-]+)?(@sha256:[0-9a-f]{64})?",
    "VOLUME": NAME,
    "VOLUME_SIZE": r"[1-9][0-9]*(Gi|Ti)",
    "STORAGE_CLASS": NAME,
    "TERMINATION_SECONDS": COUNT,
    "MAX_RESTARTS": r"[0-9]+",
    "PREPARE_JOBS": COUNT,
    "PREPARE_CPUS": COUNT,
    "PREPARE_MEMORY": r"[1-9][0-9]*Gi",
    "TPU_ACCELERATOR": NAME,
    "TPU_TOPOLOGY": r"[1-9][0-9]*(x[1-9][0-9]*){1,2}",
    "TPU_CHIPS_PER_HOST": COUNT,
    "TPU_SLICES": COUNT,
    "GPU_ACCELERATOR": NAME,
    "GPU_NODES": COUNT,
    "GPUS_PER_NODE": COUNT,
}
Settings = dict[str, str]


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python launch/gke/render.py",
        description="Writes the manifests of a run on GKE to standard output.",
    )
    parser.add_argument(
        "what",
        choices=("tpu", "gpu", "prepare", "volume", "files"),
        help="a run on TPU slices or GPU nodes, the preparing of its data by many pods, its "
        "volume, or a pod to copy files with",
    )
    parser.add_argument(
        "config", nargs="?", help="of tpu, gpu and prepare: YAML, see docs/config.md"
    )
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="section.key=value",
        help="settings that win over the config",
    )
    parser.add_argument(
        "--settings",
        type=Path,
        default=HERE / "settings.env",
        metavar="FILE",
        help="default: settings.env beside this script",
    )
    args = parser.parse_args()
    settings = read_settings(args.settings)
    if args.what in ("volume", "files"):
        sys.stdout.write(fill(args.what, settings))
        return
    if args.config is None:
        raise UserError(f"render.py {args.what} needs a config; name one of configs/topologies")
    config = load_config(args.config, args.overrides)
    if args.what != "prepare":
        devices = settings["TPU_DEVICES" if args.what == "tpu" else "GPU_DEVICES"]
        check(config, settings, int(devices))
    text = textwrap.indent(config.to_yaml(), " " * 4).rstrip()
    sys.stdout.write(fill("config", settings | {"CONFIG": text}))
    sys.stdout.write("---\n" + fill(args.what, settings))


def read_settings(path: Path) -> Settings:
    """Reads NAME=VALUE lines, and adds TPU_HOSTS, TPU_DEVICES and GPU_DEVICES.

    Raises:
      UserError: a line is not of this form, or a value is missing, unknown, doubled or malformed.
    """
    settings: Settings = {}
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise UserError(f"cannot read the settings {path}: {error.strerror}") from None
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        name, equals, value = line.partition("=")
        if not equals or name not in SETTINGS or name in settings:
            raise UserError(
                f"{path}:{number}: {line!r} is not NAME=VALUE with one of the names "
                f"{', '.join(SETTINGS)}, each once"
            )
        settings[name] = value
    for name, pattern in SETTINGS.items():
        if not settings.get(name):
            raise UserError(f"{path}: {name} has no value; set it")
        if not re.fullmatch(pattern, settings[name]):
            raise UserError(f"{path}: {name}={settings[name]} does not match {pattern}")
    return settings | derived(settings, path)


def derived(settings: Settings, path: Path) -> Settings:
    """Returns the numbers that follow from the settings."""
    chips = math.prod(map(int, settings["TPU_TOPOLOGY"].split("x")))
    hosts, left = divmod(chips, int(settings["TPU_CHIPS_PER_HOST"]))
    if left:
        raise UserError(
            f"{path}: TPU_TOPOLOGY={settings['TPU_TOPOLOGY']} has {chips} chips, which is not a "
            f"multiple of TPU_CHIPS_PER_HOST={settings['TPU_CHIPS_PER_HOST']}"
        )
    return {
        "TPU_HOSTS": str(hosts),
        "TPU_DEVICES": str(chips * int(settings["TPU_SLICES"])),
        "GPU_DEVICES": str(int(settings["GPU_NODES"]) * int(settings["GPUS_PER_NODE"])),
    }


def check(config: Config, settings: Settings, devices: int) -> None:
    """Raises UserError if the run would lose work, write to another disk, or not use its nodes."""
    grace, termination = config.checkpoint.grace_seconds, settings["TERMINATION_SECONDS"]
    if int(termination) < grace + MARGIN:
        raise UserError(
            f"TERMINATION_SECONDS={termination} is too short to save; checkpoint.grace_seconds is "
            f"{grace}, so choose {grace + MARGIN} or more"
        )
    # A path that starts with ~ is below HOME, which is the volume as well.
    run_dir = config.logging.run_dir
    below = run_dir.relative_to("~") if run_dir.parts[:1] == ("~",) else run_dir
    if not Path(os.path.normpath(WORKSPACE / below)).is_relative_to(WORKSPACE):
        raise UserError(
            f"logging.run_dir {run_dir} is not on the volume, which is mounted at {WORKSPACE}; use "
            f"a relative path"
        )
    mesh = config.mesh
    sizes = (mesh.data, mesh.fsdp, mesh.tensor, mesh.context)
    known = abs(math.prod(sizes))
    if devices % known if -1 in sizes else devices != known:
        raise UserError(
            f"the mesh data={mesh.data}, fsdp={mesh.fsdp}, tensor={mesh.tensor} does not fit the "
            f"{devices} devices of the settings; choose a config of this topology or set mesh"
        )


def fill(template: str, settings: Settings) -> str:
    """Returns the template with its placeholders filled in."""
    text = (HERE / f"{template}.yaml").read_text(encoding="utf-8")
    return string.Template(text).substitute(settings)


if __name__ == "__main__":
    run_command(main)
