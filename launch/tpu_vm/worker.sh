#!/usr/bin/env bash
# Runs on each worker, called by run.sh: installs the code and starts COMMAND as a service of
# systemd, which outlives the ssh connection.
set -euo pipefail
cd "$(dirname "$(realpath "$0")")/../.."
# shellcheck source=settings.env
source ./settings.env

if [[ $NFS_EXPORT ]] && ! mountpoint --quiet "$MOUNT_POINT"; then
  command -v mount.nfs >/dev/null || sudo apt-get install --yes nfs-common
  sudo mkdir -p "$MOUNT_POINT"
  sudo mount -t nfs "$NFS_EXPORT" "$MOUNT_POINT"
  [[ -w $MOUNT_POINT ]] || sudo chown "$(id -u):$(id -g)" "$MOUNT_POINT"
fi

# The images have an older Python than moi_jax needs; uv brings one. Newer images let pip install
# nothing without being asked like this.
PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv
python3 -m uv venv --quiet --python 3.12 --allow-existing .venv
python3 -m uv pip install --quiet --python .venv --editable '.[tpu]'

# It starts again after another worker was lost (75), and where it was itself killed. The others
# must have noticed that it is gone before it joins them again, hence the pause. systemd would
# expand a $NAME in the command.
arguments=("${COMMAND[@]:1}")
sudo systemd-run --unit=moi_jax --collect --uid="$(id -u)" --gid="$(id -g)" \
  --working-directory="$PWD" --setenv=HOME="$HOME" --setenv=PYTHONUNBUFFERED=1 \
  --setenv=MOI_JAX_STAGING="${STAGING:-}" \
  --property=Restart=on-abnormal --property=RestartForceExitStatus=75 \
  --property=RestartSec="$RESTART_SECONDS" \
  --property=StartLimitIntervalSec=1d --property=StartLimitBurst="$((MAX_RESTARTS + 1))" \
  --property=TimeoutStopSec="$STOP_SECONDS" \
  "$PWD/.venv/bin/python" -m "moi_jax.${COMMAND[0]}" "${arguments[@]//\$/\$\$}"
