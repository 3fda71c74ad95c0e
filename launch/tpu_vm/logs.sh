#!/usr/bin/env bash
# Follows the log of a worker; worker 0 shows the steps.
#
#   launch/tpu_vm/logs.sh [WORKER]
source "$(dirname "$0")/common.sh"

on_workers "${1:-0}" 'sudo journalctl --unit=moi_jax --output=cat --lines=1000 --follow'
