#!/usr/bin/env bash
# Copies the code to all workers, as it is here, and starts COMMAND of the settings on each of them.
# It does the same to resume.
#
#   launch/tpu_vm/run.sh
source "$(dirname "$0")/common.sh"

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# All that git does not ignore, with what is not committed yet.
export GIT_INDEX_FILE=$work/index
root=$(git -C "$here" rev-parse --show-toplevel)
git -C "$root" add --all
git -C "$root" archive --output="$work/moi_jax.tar.gz" "$(git -C "$root" write-tree)"
cp "$settings" "$work/settings.env"

# It runs also in the pause before it starts again ("activating"). The files that were sent last go
# away, or one that was deleted here would stay there; what was made there stays, such as .venv.
# shellcheck disable=SC2016 # $(...) is for the worker
on_workers all 'set -eu
case $(systemctl is-active moi_jax) in active | *activating)
  echo "error: it runs already on $(hostname); launch/tpu_vm/stop.sh stops it" >&2
  exit 2
esac
mkdir -p moi_jax
cd moi_jax
if [ -e moi_jax.tar.gz ]; then
  tar --list --quoting-style=literal --file=moi_jax.tar.gz | grep -v /$ | xargs -d "\n" rm -f --
fi'
tpu tpu-vm scp "$work/moi_jax.tar.gz" "$work/settings.env" "$NAME:moi_jax/" --worker=all
on_workers all 'cd moi_jax && tar --extract --file=moi_jax.tar.gz && launch/tpu_vm/worker.sh'
echo "started; launch/tpu_vm/logs.sh follows it"
