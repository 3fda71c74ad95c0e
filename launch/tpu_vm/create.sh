#!/usr/bin/env bash
# Asks for the slice by a queued resource, and waits until it is there. It costs money from then on.
#
#   launch/tpu_vm/create.sh
source "$(dirname "$0")/common.sh"

tpu queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE" \
  --runtime-version="$RUNTIME_VERSION" "${CREATE_OPTIONS[@]}"
shown=
while true; do
  state=$(tpu queued-resources describe "$NAME" --format='value(state.state)')
  [[ $state == "$shown" ]] || echo "$NAME: $state"
  shown=$state
  case $state in
    ACTIVE) exit 0 ;;
    FAILED | SUSPENDED)
      echo "error: there is no slice; delete the request by launch/tpu_vm/delete.sh" >&2
      exit 1
      ;;
  esac
  sleep "${POLL_SECONDS:-30}"
done
