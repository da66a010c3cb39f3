#!/usr/bin/env bash
# Runs the loop on this machine: one process on all its devices, or several that form a small pod.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/local.sh [options] CONFIG [setting=value ...]

Runs `middo run CONFIG`. With --processes N, starts N processes that form one program, each with simulated CPU
devices: the smallest pod there is, to try a configuration before paying for a real one. Lines of output begin with
the number of their process. SIGTERM and Ctrl-C end all of them, each saving the step under way. If one process
fails, the others are ended. Started again after an interruption, the run resumes. Nothing is created that costs.

  --processes N   number of processes (default 1: the process takes all devices of this machine)
  --devices N     simulated CPU devices per process (default: the machine's real devices; 4 with several processes)
  --port PORT     port of the coordinator, process 0 (default: a free one)
  --grace SECONDS how long processes may take to save and end before they are killed (default 120)
  --dry-run       print the commands; run nothing

Environment: MIDDO, the program to run (default .venv/bin/middo of this clone).

Example:
  launch/local.sh --processes 2 --devices 4 configs/quickstart.yaml rounds=2

Exit code: that of the processes: 0, 75 if they saved after a signal, or the first failure's.
HELP
}

processes=1 devices='' port='' grace=120
while [[ $# -gt 0 ]]; do
  case $1 in
    --processes | --devices | --port | --grace)
      needs_value "$@"
      is_count "$2" || refuse "$1 $2: not a whole number"
      printf -v "${1#--}" '%s' "$2"
      shift 2
      ;;
    --dry-run) dry_run=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    -*) refuse "unknown option $1" ;;
    *) break ;;
  esac
done
[[ $# -gt 0 ]] || refuse "CONFIG is missing"
[[ $processes -gt 0 ]] || refuse "--processes $processes: at least 1"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
middo=${MIDDO:-.venv/bin/middo}
[[ -n $dry_run ]] || command -v "$middo" >/dev/null || refuse "$middo is not installed; run make quickstart, or set MIDDO"
[[ $processes -eq 1 ]] || devices=${devices:-4}
environment=()
[[ -z $devices ]] || environment=(env JAX_PLATFORMS=cpu JAX_NUM_CPU_DEVICES="$devices" JAX_CPU_COLLECTIVES_IMPLEMENTATION=gloo)

if [[ $processes -eq 1 ]]; then
  [[ -z $dry_run ]] || { show ${environment[@]+"${environment[@]}"} "$middo" run "$@" && exit 0; }
  exec ${environment[@]+"${environment[@]}"} "$middo" run "$@"
fi

((BASH_VERSINFO[0] * 100 + BASH_VERSINFO[1] >= 501)) ||
  refuse "several processes need bash 5.1 or newer; this is $BASH_VERSION"
if [[ -z $port && -z $dry_run ]]; then
  port=$(python3 -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
fi

# One process; the options before the command are how it finds the others.
command_of() {
  local job=(--coordinator "127.0.0.1:${port:-PORT}" --processes "$processes" --process "$1")
  command=("${environment[@]}" "$middo" "${job[@]}" run "${@:2}")
}
if [[ -n $dry_run ]]; then
  for ((i = 0; i < processes; i++)); do
    command_of "$i" "$@"
    show "${command[@]}"
  done
  exit 0
fi

pids=() printers=() killer='' code=0
folder=$(mktemp -d)

# Kills what has not ended after the grace period.
limit_time() {
  [[ -z $killer ]] || return 0
  (sleep "$grace" >/dev/null 2>&1 && say "not ended after $grace s: killed" && kill -KILL "${pids[@]}" 2>/dev/null) &
  killer=$!
  disown "$killer"
}
end_all() {
  kill -TERM ${pids[@]+"${pids[@]}"} 2>/dev/null || true
  limit_time
}
# shellcheck disable=SC2329  # the EXIT trap calls it
clean_up() {
  kill -KILL ${pids[@]+"${pids[@]}"} ${killer:+"$killer"} 2>/dev/null || true
  wait 2>/dev/null || true
  rm -rf "$folder"
}
trap clean_up EXIT
# Background processes of a script ignore SIGINT, so Ctrl-C has to reach them as SIGTERM.
trap end_all INT TERM HUP

for ((i = 0; i < processes; i++)); do
  mkfifo "$folder/$i"
  # A printer ignores the terminal's Ctrl-C, as the processes do: their last lines are about what was saved.
  (trap '' INT TERM HUP && exec sed -u "s/^/[$i] /" "$folder/$i") &
  printers+=($!)
  command_of "$i" "$@"
  "${command[@]}" >"$folder/$i" 2>&1 </dev/null &
  pids+=($!)
done

# Each process as it ends. A signal ends `wait` too, without a process.
while [[ ${#pids[@]} -gt 0 ]]; do
  status=0
  wait -n -p ended "${pids[@]}" 2>/dev/null || status=$?
  if [[ -z ${ended:-} && $status -eq 127 ]]; then
    # All that are left ended at once, and `wait -n` knows them no more; `wait` still has their status.
    ended=${pids[0]} status=0
    wait "$ended" || status=$?
  fi
  [[ -n ${ended:-} ]] || continue
  running=()
  for pid in "${pids[@]}"; do [[ $pid == "$ended" ]] || running+=("$pid"); done
  pids=(${running[@]+"${running[@]}"})
  [[ $status -ne 0 && $code -eq 0 ]] || continue
  code=$status
  [[ ${#pids[@]} -gt 0 ]] || continue
  if [[ $status -eq 75 ]]; then
    limit_time # the others are saving at the same agreed point
  else
    [[ -n $killer ]] || say "a process ended with $status: ending the others"
    end_all
  fi
done
wait "${printers[@]}"
exit "$code"
