#!/usr/bin/env bash
# Serves a refiner by vLLM, in an environment of its own, and keeps it running.
set -euo pipefail
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/vllm.sh (--model MODEL | --watch FOLDER) [options] [-- options of vllm serve]

Installs vLLM into an environment of its own if it is not there (vLLM pins its own torch or JAX, which would break
the environment of the loop), starts the server, waits until it is healthy, and starts it again when it dies, when it
no longer answers, or when FOLDER has a new export. The first line on standard output, once it is healthy, is the
setting for the loop: refine.base_url=... SIGTERM and Ctrl-C end the server.

  --model MODEL      a hub repo id or a folder
  --watch FOLDER     serve the newest export below FOLDER (a folder with a config.json, as `middo export` writes it),
                     and the next one once it is there
  --name NAME        the model's name for clients, refine.model (default: MODEL, or `refiner` with --watch)
  --device KIND      gpu (default) or tpu
  --gpus LIST        the GPUs to use, for example 6,7; the model is split over them (default: all that are visible)
  --chips N          TPU: over how many chips the model is split (default 1)
  --host HOST        address to listen on (default 127.0.0.1). Any other one needs a key
  --port PORT        default 8000
  --environment DIR  the environment (default .venv-vllm)
  --python PROGRAM   the Python that makes it (default python3); vLLM for TPUs needs 3.11, TPU VMs have 3.10
  --timeout SECONDS  how long a start may take, with download and compilation (default 1800)
  --max-restarts N   starts after a death in a row, before giving up (default 10); a server that has been healthy for
                     ten minutes starts the count anew
  --poll SECONDS     pause between two looks at the server and the folder (default 10)
  --yes              do not ask before installing
  --dry-run          print the commands; run nothing

Environment: VLLM_API_KEY, the key that clients have to send, or OPENAI_API_KEY if that is not set. There is no
option for it: command lines are visible to all users of a machine. vLLM asks for the key on /v1 only, so do not
open the port to a network that you do not trust.

Example:
  launch/vllm.sh --model Qwen/Qwen2.5-7B-Instruct --gpus 6,7 -- --max-model-len 4096

Exit code: 0 after SIGTERM, 130 after Ctrl-C, 1 if the server could not be started or kept, 2 for a wrong command line.
HELP
}

model='' watch='' name='' device=gpu gpus='' chips=1 host=127.0.0.1 port=8000 environment=.venv-vllm python=python3
timeout=1800 max_restarts=10 poll=10
while [[ $# -gt 0 ]]; do
  case $1 in
    --model | --watch | --name | --device | --gpus | --chips | --host | --port | --environment | --python | --timeout | --max-restarts | --poll)
      needs_value "$@"
      variable=${1#--}
      printf -v "${variable//-/_}" '%s' "$2"
      shift 2
      ;;
    --yes) assume_yes=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    --) shift && break ;;
    *) refuse "unknown option $1; vLLM's own options go behind --" ;;
  esac
done
[[ -n $model || -n $watch ]] || refuse "--model or --watch is missing"
[[ -z $model || -z $watch ]] || refuse "--model and --watch exclude each other"
for number in port timeout max_restarts chips; do
  is_count "${!number}" || refuse "--${number//_/-} ${!number}: not a whole number"
done
is_number "$poll" || refuse "--poll $poll: not a number of seconds"
case $device in
  gpu) package=vllm split=1 ;;
  tpu) package=vllm-tpu split=$chips ;;
  *) refuse "--device $device: gpu or tpu" ;;
esac
for word in "$@"; do
  case $word in --api-key*) refuse "keys are given by the environment variable VLLM_API_KEY" ;; esac
done
key=${VLLM_API_KEY:-${OPENAI_API_KEY:-}}
case $host in
  127.* | localhost | ::1) ;;
  *) [[ -n $key ]] || refuse "--host $host: set VLLM_API_KEY; without it, everybody who reaches the port can use it" ;;
esac
if [[ -n $gpus ]]; then
  [[ $gpus =~ ^[0-9]+(,[0-9]+)*$ ]] || refuse "--gpus $gpus: numbers with commas between"
  export CUDA_VISIBLE_DEVICES=$gpus
  only_commas=${gpus//[0-9]/}
  split=$((${#only_commas} + 1))
fi
if [[ -n $key ]]; then export VLLM_API_KEY=$key; fi
name=${name:-${model:-refiner}}
require curl

server=''
# shellcheck disable=SC2329  # called by clean_up and restarts
end_server() {
  [[ -n $server ]] || return 0
  kill -TERM "$server" 2>/dev/null || true
  # vLLM ends its workers itself; if it hangs, it would hold the GPUs.
  local waited
  for ((waited = 0; waited < 60; waited++)); do
    kill -0 "$server" 2>/dev/null || break
    sleep 0.5
  done
  kill -KILL "$server" 2>/dev/null || true
  wait "$server" 2>/dev/null || true
  server=''
}
# shellcheck disable=SC2329  # the EXIT trap calls it
clean_up() {
  local status=$?
  trap '' INT TERM HUP
  end_server
  end_child
  [[ $status -ne 143 ]] || status=0 # told to end, and ended
  exit "$status"
}
trap clean_up EXIT
exit_on_signals

if [[ ! -x $environment/bin/vllm ]]; then
  require "$python"
  say "$environment has no vLLM: it will be installed there, several GB"
  confirm "install $package into $environment?"
  call "$python" -m venv "$environment"
  call "$environment/bin/python" -m pip install --quiet "$package"
fi

# The newest export below the watched folder. Exports get their names when they are whole, and are hidden before.
newest_export() {
  find "$watch" -name '.?*' -prune -o -name config.json -printf '%T@ %h\n' 2>/dev/null | sort -n | tail -1 | cut -d' ' -f2-
}
healthy() { curl --fail --silent --output /dev/null --max-time 10 "http://$host:$port/health"; }

# Starts the server and waits until it is healthy. Returns 1 if it dies or takes too long.
start_server() {
  local began=$SECONDS
  command=("$environment/bin/vllm" serve "$model" --served-model-name "$name" --host "$host" --port "$port" --tensor-parallel-size "$split" "$@")
  if [[ -n $dry_run ]]; then
    show "${command[@]}"
    show curl --fail --silent --output /dev/null --max-time 10 "http://$host:$port/health"
    return
  fi
  "${command[@]}" >&2 &
  server=$!
  until healthy; do
    kill -0 "$server" 2>/dev/null || { say "the server ended while it started" && end_server && return 1; }
    [[ $((SECONDS - began)) -lt $timeout ]] || { say "not healthy after $timeout s" && end_server && return 1; }
    pause "$poll"
  done
  say "healthy after $((SECONDS - began)) s: $model as $name"
}

if [[ -n $watch && -z $dry_run ]]; then
  until model=$(newest_export) && [[ -n $model ]]; do
    say "waiting for an export below $watch"
    pause "$poll"
  done
fi
[[ -z $dry_run || -n $model ]] || model="$watch/EXPORT"

restarts=0 told='' silent=0
while :; do
  if start_server "$@"; then
    [[ -z $dry_run ]] || exit 0
    [[ -n $told ]] || printf 'refine.base_url=http://%s:%s/v1 refine.model=%s\n' "$host" "$port" "$name"
    told=1 since=$SECONDS silent=0
    while kill -0 "$server" 2>/dev/null; do
      pause "$poll"
      if [[ $((SECONDS - since)) -ge 600 ]]; then restarts=0; fi
      if healthy; then silent=0; else silent=$((silent + 1)); fi
      [[ $silent -lt 6 ]] || { say "no answer to six health checks" && break; }
      newest=$model
      if [[ -n $watch ]]; then newest=$(newest_export) || true; fi
      if [[ -n $newest && $newest != "$model" ]]; then
        model=$newest
        say "new export: $model"
        end_server
        continue 2
      fi
    done
    say "the server ended, or hangs"
    end_server
  fi
  [[ $restarts -lt $max_restarts ]] || { say "started again $restarts times already: giving up" && exit 1; }
  restarts=$((restarts + 1))
  say "start $restarts of $max_restarts"
  pause "$poll"
done
