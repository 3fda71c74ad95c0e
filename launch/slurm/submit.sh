#!/usr/bin/env bash
# Submits a job of SLURM with the values of settings.env, and prints the number of the job.
#
#   launch/slurm/submit.sh prepare [options of sbatch]
#   launch/slurm/submit.sh train [options of sbatch]
#
# SETTINGS=FILE names other values. Options of sbatch come last and win.
set -euo pipefail

here=$(dirname "$(realpath "$0")")
SETTINGS=$(realpath "${SETTINGS:-$here/settings.env}")
# shellcheck source=settings.env
source "$SETTINGS"

# SLURM has to leave a run the time to save. The settings give it before the time limit. Before
# scancel, scontrol requeue and preemption the cluster does.
check_stop_seconds() {
  local grace kill_wait
  grace=$("$PYTHON" -m moi_jax.train "$@" --print-config | sed -n 's/^  grace_seconds: //p')
  if ((STOP_SECONDS < grace + 30)); then
    echo "error: $SETTINGS: STOP_SECONDS=$STOP_SECONDS is too short to save;" \
      "checkpoint.grace_seconds is $grace, so choose $((grace + 30)) or more" >&2
    exit 2
  fi
  kill_wait=$(scontrol show config | sed -n 's/^KillWait *= *\([0-9]*\).*/\1/p')
  if ((kill_wait < grace)); then
    echo "warning: after scancel, scontrol requeue or a preemption this cluster kills a job in" \
      "KillWait = $kill_wait seconds, and checkpoint.grace_seconds is $grace; a run that needs" \
      "longer to save resumes from the checkpoint before" >&2
  fi
}

submit() { sbatch --parsable --job-name="$JOB_NAME" "$@"; }

mkdir -p "$LOGS"
case ${1:-} in
  prepare)
    shift
    submit --array="1-$PREPARE_JOBS" --ntasks=1 --cpus-per-task="$PREPARE_CPUS" \
      --time="$PREPARE_TIME_LIMIT" --output="$LOGS/%A-prepare-%a.log" \
      "${PREPARE_OPTIONS[@]}" "$@" "$here/prepare.sbatch" "$SETTINGS"
    ;;
  train)
    shift
    [[ ${COMMAND[0]} != train ]] || check_stop_seconds "${COMMAND[@]:1}"
    gpus=()
    ((GPUS_PER_NODE == 0)) || gpus=(--gpus-per-node="$GPUS_PER_NODE")
    submit --nodes="$NODES" --ntasks-per-node="$TASKS_PER_NODE" "${gpus[@]}" \
      --cpus-per-task="$CPUS_PER_TASK" --time="$TIME_LIMIT" --signal="TERM@$STOP_SECONDS" \
      --output="$LOGS/%j.log" "${SBATCH_OPTIONS[@]}" "$@" "$here/train.sbatch" "$SETTINGS"
    ;;
  *)
    echo "error: say what to submit: $0 prepare|train [options of sbatch]" >&2
    exit 2
    ;;
esac
