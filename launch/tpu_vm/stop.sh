#!/usr/bin/env bash
# Stops the command on all workers when it has saved. The slice stays, and costs money.
#
#   launch/tpu_vm/stop.sh
source "$(dirname "$0")/common.sh"

# One that ended with the others before the command came has no such service any more.
on_workers all 'sudo systemctl stop moi_jax || ! systemctl --quiet is-active moi_jax'
