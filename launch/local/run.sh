#!/usr/bin/env bash
# Starts a command of moi_jax in several processes on this machine, as if each were a host.
#
#   DEVICES=4 launch/local/run.sh 2 train --config configs/quickstart.yaml
#
# DEVICES: the CPU devices that each process simulates. Without it process 0 has the first GPU of
# the machine, process 1 the second, and so on; CUDA_VISIBLE_DEVICES=2,3 names others.
# LOGS: the directory of process-0.log, process-1.log, ... (default: a new one in runs/local).
# PYTHON: the interpreter (default: python).
#
# The output of process 0 is shown here too. SIGTERM and SIGINT go to all processes. The exit
# status is that of the first process that failed. It needs bash 5.1 or newer.
set -euo pipefail

if [[ ! ${1:-} =~ ^[1-9][0-9]*$ || $# -lt 2 ]]; then
  echo "error: give the number of processes and a command: $0 N COMMAND [arguments]" >&2
  exit 2
fi
if ((BASH_VERSINFO[0] * 10 + BASH_VERSINFO[1] < 51)); then
  echo "error: bash $BASH_VERSION is too old; this script needs 5.1 or newer" >&2
  exit 2
fi
processes=$1 command=$2
shift 2

mapfile -t gpus < <(seq 0 $((processes - 1)))
if [[ ${DEVICES:-} ]]; then
  export JAX_PLATFORMS=cpu
  export XLA_FLAGS="${XLA_FLAGS:-} --xla_force_host_platform_device_count=$DEVICES"
elif [[ -v CUDA_VISIBLE_DEVICES ]]; then
  IFS=, read -ra gpus <<<"$CUDA_VISIBLE_DEVICES"
  if ((${#gpus[@]} < processes)); then
    echo "error: CUDA_VISIBLE_DEVICES=$CUDA_VISIBLE_DEVICES has too few GPUs for $processes" \
      "processes; name one for each, or set DEVICES to simulate devices" >&2
    exit 2
  fi
fi

python=${PYTHON:-python}
logs=${LOGS:-runs/local/$(date +%Y%m%d-%H%M%S)-$$}
mkdir -p "$logs"
echo "logs in $logs" >&2
port=$("$python" -c 'import socket
with socket.create_server(("localhost", 0)) as server: print(server.getsockname()[1])')

# Job control: a background process of a script ignores SIGINT, one of its own process group does
# not. What shows the output of process 0 outlives the signals, which may come from the terminal.
set -m
exec {shown}> >(trap '' INT TERM HUP && exec tee -a "$logs/process-0.log")
shower=$!

declare -A running
trap 'kill -s INT -- "${!running[@]}" 2>/dev/null || true' INT
trap 'kill -s TERM -- "${!running[@]}" 2>/dev/null || true' TERM HUP

for ((i = 0; i < processes; i++)); do
  output=$shown
  ((i == 0)) || exec {output}>>"$logs/process-$i.log"
  CUDA_VISIBLE_DEVICES=${gpus[i]} "$python" -m "moi_jax.$command" "$@" \
    --coordinator "localhost:$port" --num-processes "$processes" --process-id "$i" \
    </dev/null >&"$output" 2>&1 &
  running[$!]=$i
  exec {output}>&-
done

first=0
while ((${#running[@]})); do
  wait -n -p ended "${!running[@]}" && status=0 || status=$?
  [[ ${ended:-} ]] || continue # a signal that was passed on, not the end of a process
  if ((status)); then
    echo "process ${running[$ended]} ended with status $status" >&2
    ((first)) || first=$status
  fi
  unset "running[$ended]"
done
wait "$shower" || true
exit "$first"
