#!/usr/bin/env bash
# Asks for the slice by a queued resource, and waits until it is there. It costs money from then on.
# If the request was made before, it only waits.
#
#   launch/tpu_vm/create.sh
source "$(dirname "$0")/common.sh"

MAX_FAILURES=10 # of gcloud in a row, while the request waits

request_state() { tpu queued-resources describe "$NAME" --format='value(state.state)'; }

if ! request_state >/dev/null 2>&1; then
  tpu queued-resources create "$NAME" --node-id="$NAME" --accelerator-type="$ACCELERATOR_TYPE" \
    --runtime-version="$RUNTIME_VERSION" "${CREATE_OPTIONS[@]}"
fi
trap 'echo "the request $NAME still stands, and its slice will cost money;" \
  "launch/tpu_vm/create.sh waits again, launch/tpu_vm/delete.sh deletes it" >&2' EXIT
shown='' failures=0
while true; do
  if state=$(request_state); then
    failures=0
  elif ((++failures == MAX_FAILURES)); then
    echo "error: gcloud failed $failures times in a row; the state of $NAME is not known" >&2
    exit 1
  else
    state=$shown
  fi
  [[ $state == "$shown" ]] || echo "$NAME: $state"
  shown=$state
  case $state in
    ACTIVE)
      trap - EXIT
      exit 0
      ;;
    FAILED | SUSPENDED)
      trap - EXIT
      echo "error: there is no slice; delete the request by launch/tpu_vm/delete.sh" >&2
      exit 1
      ;;
  esac
  sleep "${POLL_SECONDS:-30}"
done
