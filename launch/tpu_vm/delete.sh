#!/usr/bin/env bash
# Deletes the slice and its request, after a question; --quiet leaves the question out. The shared
# disk stays.
#
#   launch/tpu_vm/delete.sh [--quiet]
source "$(dirname "$0")/common.sh"

tpu queued-resources delete "$NAME" --force "$@"
