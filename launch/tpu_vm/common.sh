# shellcheck shell=bash
# What the scripts of this directory share: the settings, and commands on the workers.
set -euo pipefail

here=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
settings=$(realpath "${SETTINGS:-$here/settings.env}")
# shellcheck source=settings.env
source "$settings"
for setting in PROJECT ZONE NAME ACCELERATOR_TYPE RUNTIME_VERSION; do
  if [[ ! ${!setting:-} ]]; then
    echo "error: $settings: set $setting" >&2
    exit 2
  fi
done

tpu() { # GROUP COMMAND [arguments]: gcloud on the TPUs of the zone
  gcloud compute tpus "$1" "$2" --project="$PROJECT" --zone="$ZONE" "${@:3}"
}

on_workers() { # WORKER|all COMMAND
  tpu tpu-vm ssh "$NAME" --worker="$1" --command="$2"
}
