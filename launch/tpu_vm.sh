#!/usr/bin/env bash
# Runs the loop on a Cloud TPU slice that it requests, watches and deletes.
# shellcheck disable=SC2016  # the commands in single quotes expand on the hosts
set -euo pipefail
umask 077 # the archive that is sent to the hosts may contain keys
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/tpu_vm.sh --name NAME --zone ZONE --type TYPE --runs gs://BUCKET/FOLDER [options] CONFIG [setting=value ...]

Requests a slice as a queued resource, installs this clone on all its hosts, starts `middo run CONFIG` on all of
them, follows the log of worker 0, copies the run's folder to this machine and deletes the slice. A slice that is
preempted is deleted and requested again, and the run resumes from its folder in the bucket. The slice is deleted
whatever happens: at the end, after an error, on Ctrl-C, SIGTERM or a closed terminal.

  --name NAME             name of the slice and of the run: lower case letters, digits, hyphens
  --zone ZONE             for example us-west4-a
  --type TYPE             accelerator type: v5litepod-16, v6e-64, v5p-128, v4-8
  --runs gs://...         folder of runs. The hosts of a slice share no disk, and a preempted slice loses its own
  --capacity KIND         spot (default), on-demand or reserved
  --project PROJECT       default: gcloud's own
  --runtime VERSION       runtime image; default: the one for the type
  --env NAME              pass this environment variable to the hosts; repeatable. Keys are passed only so
  --send FILE             a file of this clone that git does not track, such as a dataset; repeatable
  --price PER_CHIP_HOUR   your price; states the cost before and after
  --chips N               number of chips, for types whose name does not tell
  --max-restarts N        how often a preempted run is started again (default 20)
  --wait-timeout SECONDS  how long to wait for a slice (default 86400)
  --poll SECONDS          pause between two looks at the slice (default 20)
  --yes                   do not ask before creating
  --dry-run               print every command of a run without incidents; run nothing

CONFIG and --send are paths relative to the root of this clone. Tracked files are sent as they are on disk.
For several hosts, gcloud needs your key in an agent: ssh-add ~/.ssh/google_compute_engine

Example:
  launch/tpu_vm.sh --name mine --zone us-west4-a --type v5litepod-16 --runs gs://my-bucket/runs --price 0.60 \
    --env OPENAI_API_KEY --send data/alpaca.json configs/mine.yaml rounds=2

Exit code: the run's own; 75 if it was still preempted after the last restart; 1 if the slice could not be had or
not be deleted; 2 if the command line was wrong.
HELP
}

name='' zone='' type='' runs='' capacity=spot project='' runtime='' price='' chips='' config=''
max_restarts=20 wait_timeout=86400 poll=20
env_names=() sent=() settings=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --name | --zone | --type | --runs | --capacity | --project | --runtime | --price | --chips | --max-restarts | --wait-timeout | --poll)
      needs_value "$@"
      variable=${1#--}
      printf -v "${variable//-/_}" '%s' "$2"
      shift 2
      ;;
    --env) needs_value "$@" && env_names+=("$2") && shift 2 ;;
    --send) needs_value "$@" && sent+=("$2") && shift 2 ;;
    --yes) assume_yes=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    -*) refuse "unknown option $1" ;;
    *) break ;;
  esac
done
config=${1:-}
[[ $# -eq 0 ]] || shift
settings=("$@")

for required in name zone type runs config; do
  [[ -n ${!required} ]] || refuse "$([[ $required == config ]] && echo CONFIG || echo "--$required") is missing"
done
[[ $name =~ ^[a-z]([-a-z0-9]*[a-z0-9])?$ ]] || refuse "--name $name: lower case letters, digits and hyphens only"
[[ $runs == gs://?* ]] || refuse "--runs $runs: has to be a folder in a bucket, gs://BUCKET/FOLDER"
[[ -z $price ]] || is_number "$price" || refuse "--price $price: not a number"
is_count "$max_restarts" || refuse "--max-restarts $max_restarts: not a whole number"
is_count "$wait_timeout" || refuse "--wait-timeout $wait_timeout: not a whole number of seconds"
is_number "$poll" || refuse "--poll $poll: not a number of seconds"
cd "$(dirname "${BASH_SOURCE[0]}")/.."
for file in "$config" ${sent[@]+"${sent[@]}"}; do
  [[ -f $file ]] || refuse "$file: no such file in this clone"
  case $file in /* | *../*) refuse "$file: has to be inside this clone, relative to its root" ;; esac
done
for variable in ${env_names[@]+"${env_names[@]}"}; do
  [[ -n ${!variable:-} ]] || refuse "--env $variable: the variable is not set"
done
case $capacity in
  spot) tier=(--spot) ;;
  reserved) tier=(--reserved) ;;
  on-demand) tier=() ;;
  *) refuse "--capacity $capacity: spot, on-demand or reserved" ;;
esac

# The number at the end of a type counts chips since v5e and v6e, and TensorCores, two per chip, elsewhere.
size=${type##*-}
case $type in
  v5litepod-* | v6e-*) known_chips=$size image=$([[ $type == v6e-* ]] && echo v2-alpha-tpuv6e || echo v2-alpha-tpuv5-lite) ;;
  v5p-*) known_chips=$((size / 2)) image=v2-alpha-tpuv5 ;;
  v2-* | v3-* | v4-*) known_chips=$((size / 2)) image=tpu-ubuntu2204-base ;;
  *) known_chips='' image='' ;;
esac
chips=${chips:-$known_chips} runtime=${runtime:-$image}
[[ -n $chips && -n $runtime ]] || refuse "--type $type: unknown here; give --chips and --runtime with it"
is_count "$chips" || refuse "--chips $chips: not a whole number"
require gcloud git tar

scope=(--zone="$zone" --quiet)
[[ -z $project ]] || scope+=("--project=$project")
tpus=(gcloud compute tpus)
# Without these, a connection to a host that is gone would hang for hours.
alive=(--ssh-flag=-oServerAliveInterval=30 --ssh-flag=-oServerAliveCountMax=4)

on_all() { call "${tpus[@]}" tpu-vm ssh "$name" "${scope[@]}" "${alive[@]}" --worker=all --command="$1"; }
on_first() { call "${tpus[@]}" tpu-vm ssh "$name" "${scope[@]}" "${alive[@]}" --worker=0 --command="$1"; }

# What runs on the hosts. Their system Python is 3.10, too old: uv brings one of its own.
install='rm -rf middo && mkdir middo && tar -xzf source.tar.gz -C middo && rm source.tar.gz && cd middo'
install+=' && python3 -m pip install --quiet --user uv && python3 -m uv venv --quiet --python 3.12 .venv'
install+=' && python3 -m uv pip install --quiet --python .venv/bin/python ".[tpu,gcs]"'
end_run='cd middo && if [ -s run.pid ] && kill -TERM "$(cat run.pid)" 2>/dev/null; then'
end_run+=' timeout 120 tail --pid="$(cat run.pid)" -f /dev/null || kill -KILL "$(cat run.pid)"; fi; rm -f run.pid'
# Detached, so that the run outlives a broken connection.
start='cd middo && rm -f run.pid run.exit && (nohup setsid bash run.sh > run.log 2>&1 < /dev/null &)'
follow='cd middo && until [ -s run.pid ]; do sleep 1; done; tail --pid="$(cat run.pid)" -F run.log -n'
ask='cd middo && if [ -s run.exit ]; then cat run.exit; elif kill -0 "$(cat run.pid)"; then echo running; else echo vanished; fi'

# Prints the state of a resource, ABSENT, or UNKNOWN where gcloud got no answer.
state_of() {
  local kind=$1 field=$2 state
  if state=$("${tpus[@]}" "$kind" describe "$name" "${scope[@]}" --format="value($field)" 2>"$work/error"); then
    printf '%s' "${state:-UNKNOWN}"
  elif grep -qi 'not[ _]found' "$work/error"; then
    printf ABSENT
  else
    printf UNKNOWN
  fi
}
queued_state() { state_of queued-resources state.state; }
show_question() { show "${tpus[@]}" queued-resources describe "$name" "${scope[@]}" --format='value(state.state)'; }

# Writes the archive that every host gets: tracked files, sent files, the start script, the variables.
pack() {
  local variable
  if [[ -n $dry_run ]]; then
    say "would pack the tracked files, ${sent[*]:-nothing else} and the variables ${env_names[*]:-(none)}"
  else
    git ls-files -z >"$work/files"
    printf '%s\0' "$config" ${sent[@]+"${sent[@]}"} >>"$work/files"
    {
      printf '#!/usr/bin/env bash\ncd "$(dirname "$0")"\nset -a; source ./run.env; set +a\n'
      # JAX's own default, 8482, is closed between the hosts of a slice: the automatic firewall rule opens
      # 8470, 8471, 8474, 8476 and 11211. On another port, all hosts but worker 0 wait until they time out.
      printf 'export JAX_COORDINATOR_PORT=8476\n'
      printf '%q ' .venv/bin/middo run "$config" "name=$name" "runs_dir=$runs" ${settings[@]+"${settings[@]}"}
      printf '&\necho $! > run.pid\nstatus=0\nwait $! || status=$?\necho $status > run.exit\n'
    } >"$work/run.sh"
    : >"$work/run.env"
    for variable in ${env_names[@]+"${env_names[@]}"}; do
      printf '%s=%q\n' "$variable" "${!variable}" >>"$work/run.env"
    done
  fi
  call tar -czf "$work/source.tar.gz" --null -T "$work/files" -C "$work" run.sh run.env
}

# Requests the slice and waits for it. Returns 1 if it was lost before it could be used.
request_slice() {
  local began=$SECONDS state before='' unknown=0
  requested=1
  call "${tpus[@]}" queued-resources create "$name" "${scope[@]}" --node-id="$name" --accelerator-type="$type" \
    --runtime-version="$runtime" ${tier[@]+"${tier[@]}"} || { say "the request was refused" && exit 1; }
  if [[ -n $dry_run ]]; then
    show_question
    return
  fi
  while :; do
    state=$(queued_state)
    if [[ $state == UNKNOWN ]]; then unknown=$((unknown + 1)); else unknown=0; fi
    if [[ $state != "$before" || $((SECONDS - noted)) -ge 60 ]]; then
      say "$name: $state after $((SECONDS - began)) s"
      before=$state noted=$SECONDS
    fi
    case $state in
      ACTIVE) active_since=$SECONDS && return ;;
      FAILED)
        call "${tpus[@]}" queued-resources describe "$name" "${scope[@]}" --format='value(state.failedData.error.message)' || true
        say "the request failed"
        exit 1
        ;;
      SUSPENDING | SUSPENDED | ABSENT) return 1 ;;
    esac
    [[ $unknown -lt 30 ]] || { cat "$work/error" >&2 && say "gcloud does not answer" && exit 1; }
    [[ $((SECONDS - began)) -lt $wait_timeout ]] || { say "no slice within --wait-timeout $wait_timeout s" && exit 1; }
    pause "$poll"
  done
}

# Deletes the slice and looks that it is gone. Deleting fails while a slice is being provisioned, and now and
# then for no reason; so it is tried for a while.
delete_slice() {
  local attempt
  [[ -n $requested ]] || return 0
  [[ -z $active_since ]] || held=$((held + SECONDS - active_since))
  active_since=''
  for ((attempt = 1; attempt <= 15; attempt++)); do
    call "${tpus[@]}" queued-resources delete "$name" "${scope[@]}" --force || true
    if [[ -n $dry_run ]]; then show_question; fi
    if [[ -n $dry_run || $(queued_state) == ABSENT ]]; then
      requested=''
      return 0
    fi
    say "$name is not deleted yet"
    pause "$poll"
  done
  say "NOT DELETED, it may still cost money. Delete it by hand:"
  show "${tpus[@]}" queued-resources delete "$name" "${scope[@]}" --force >&2
  return 1
}

# True if the slice is lost for good. A slice that restarts, is repaired or does not answer is not.
slice_is_lost() {
  case $(queued_state) in SUSPENDING | SUSPENDED | FAILED | DELETING | ABSENT) return 0 ;; esac
  case $(state_of tpu-vm state) in PREEMPTED | TERMINATED | STOPPING | STOPPED | DELETING | ABSENT) return 0 ;; esac
  return 1
}

# Follows the run on the slice until it ends. Sets outcome: its exit code, `vanished` if a host was restarted
# under it, `lost` if the slice is gone.
watch_run() {
  local lines=+1 answer silent=0
  while :; do
    on_first "$follow $lines" || true
    if [[ -n $dry_run ]]; then
      on_first "$ask"
      outcome=0
      return
    fi
    answer=''
    if on_first "$ask" >"$work/answer" 2>"$work/error"; then answer=$(<"$work/answer"); fi
    case $answer in
      running)
        lines=20 silent=0
        say "the connection broke, the run goes on; the last 20 lines come again"
        pause "$poll"
        ;;
      vanished) outcome=vanished && break ;;
      [0-9]*) outcome=$answer && break ;;
      *)
        silent=$((silent + 1)) lines=20
        if slice_is_lost || [[ $silent -ge 30 ]]; then outcome=lost && return; fi
        say "worker 0 does not answer ($silent of 30)"
        pause "$poll"
        ;;
    esac
  done
  # One lost host ends the run on the others with an error, before or after the cloud reports the loss.
  if [[ $outcome != 0 ]]; then
    pause "$poll"
    if slice_is_lost; then outcome=lost; fi
  fi
}

# shellcheck disable=SC2329  # the EXIT trap calls it
clean_up() {
  local status=$?
  trap '' INT TERM HUP # a second Ctrl-C must not leave the slice behind
  trap - EXIT
  end_child
  case $status in
    129 | 130 | 143)
      [[ -z $running ]] || { say "the run saves and ends, 2 minutes at most" && on_all "$end_run" || true; }
      ;;
  esac
  [[ -z $requested || -n $dry_run ]] || say "deleting $name; Ctrl-C has no effect until that is done"
  delete_slice || status=1
  [[ -n $dry_run || -z $work ]] || rm -rf "$work"
  if [[ -z $dry_run && $held -gt 0 ]]; then
    say "the slice was held for $held s$([[ -z $price ]] || echo ", about $(cost "$chips" "$price" "$held")")"
  fi
  exit "$status"
}

requested='' running='' active_since='' held=0 noted=0 outcome='' restarts=0
say "$type, $capacity, in $zone"
say_price "$chips" "$price"
if [[ -n $dry_run ]]; then
  work=WORK
  show_question
else
  work=$(mktemp -d)
  case $(queued_state) in
    ABSENT) ;;
    UNKNOWN) cat "$work/error" >&2 && rm -rf "$work" && refuse "gcloud cannot tell whether $name exists" ;;
    *) rm -rf "$work" && refuse "a queued resource $name exists already; delete it, or take another --name" ;;
  esac
fi
trap clean_up EXIT
exit_on_signals
confirm "request $name?"
pack

fresh=1
while :; do
  if [[ -n $fresh ]]; then
    if request_slice; then
      # A host may be lost while it installs, too.
      if call "${tpus[@]}" tpu-vm scp "$work/source.tar.gz" "$name:" "${scope[@]}" --worker=all && on_all "$install"; then
        fresh=''
      elif [[ -n $dry_run ]] || ! slice_is_lost; then
        say "installing failed" && exit 1
      fi
    fi
    [[ -z $fresh ]] || outcome=lost
  fi
  if [[ -z $fresh ]]; then
    running=1
    if on_all "$start"; then watch_run; elif slice_is_lost; then outcome=lost; else say "starting failed" && exit 1; fi
    running=''
  fi
  case $outcome in
    75 | vanished | lost) ;;
    *) break ;;
  esac
  [[ $restarts -lt $max_restarts ]] || { say "preempted, and started again $restarts times already" && break; }
  restarts=$((restarts + 1))
  say "preempted ($outcome); start $restarts of $max_restarts"
  if [[ $outcome == lost ]]; then
    delete_slice || exit 1
    fresh=1
  else
    on_all "$end_run" || true
  fi
done

say "the run ended: $outcome"
call mkdir -p "runs/$name"
call gcloud storage rsync --recursive --quiet ${project:+"--project=$project"} "$runs/$name" "runs/$name" ||
  say "the run's folder could not be copied; it is in $runs/$name"
[[ ! -f runs/$name/report.html ]] || say "runs/$name/report.html"
case $outcome in lost | vanished) exit 75 ;; *) exit "$outcome" ;; esac
