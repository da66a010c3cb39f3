#!/usr/bin/env bash
# Runs the loop on a GKE cluster of TPU slices, through xpk.
set -euo pipefail
umask 077 # xpk reads the variables, keys among them, from a file
# shellcheck source-path=SCRIPTDIR source=common.sh
source "$(dirname "${BASH_SOURCE[0]}")/common.sh"

usage() {
  cat <<'HELP'
usage: launch/xpk.sh --name NAME --cluster CLUSTER --zone ZONE --type TYPE --image IMAGE --runs gs://BUCKET/FOLDER
                     [options] CONFIG [setting=value ...]

Submits `middo run CONFIG` as a workload to a cluster that `xpk cluster create` has made, waits until it has ended,
copies the run's folder to this machine and deletes the workload. A preempted run is started again by the cluster
and resumes from its folder in the bucket. The workload is deleted at the end, after an error and on Ctrl-C; the
cluster stays, and costs what it costs.

  --name NAME             name of the run; the workload gets the time of day behind it
  --cluster CLUSTER       the cluster
  --zone ZONE             its zone
  --project PROJECT       default: gcloud's own
  --type TYPE             TPU type of a slice: v5litepod-16, v6e-64
  --slices N              number of slices (default 1)
  --image IMAGE           image built from launch/Dockerfile.tpu, in a registry that the cluster can read
  --runs gs://...         folder of runs, which all hosts share
  --env NAME              pass this environment variable; repeatable. xpk writes its value into the workload, where
                          everybody who may read the cluster's workloads sees it: for a key, use launch/jobset.yaml
  --price PER_CHIP_HOUR   your price; states the cost
  --max-restarts N        how often the workload may be started again (default 50)
  --grace SECONDS         time to save after SIGTERM (default 300)
  --yes                   do not ask before creating
  --dry-run               print every command; run nothing

CONFIG is a path inside the image: the clone's configs/ is /middo/configs.

Example:
  launch/xpk.sh --name mine --cluster pod --zone us-west4-a --type v5litepod-16 --price 0.60 \
    --image us-docker.pkg.dev/my-project/middo/tpu:1 --runs gs://my-bucket/runs configs/mine.yaml rounds=2

Exit code: 0 if the workload completed, 1 if not, 2 if the command line was wrong.
HELP
}

name='' cluster='' zone='' project='' type='' slices=1 image='' runs='' price='' max_restarts=50 grace=300
env_names=()
while [[ $# -gt 0 ]]; do
  case $1 in
    --name | --cluster | --zone | --project | --type | --slices | --image | --runs | --price | --max-restarts | --grace)
      needs_value "$@"
      variable=${1#--}
      printf -v "${variable//-/_}" '%s' "$2"
      shift 2
      ;;
    --env) needs_value "$@" && env_names+=("$2") && shift 2 ;;
    --yes) assume_yes=1 && shift ;;
    --dry-run) dry_run=1 && shift ;;
    -h | --help) usage && exit 0 ;;
    -*) refuse "unknown option $1" ;;
    *) break ;;
  esac
done
for required in name cluster zone type image runs; do
  [[ -n ${!required} ]] || refuse "--$required is missing"
done
[[ $# -gt 0 ]] || refuse "CONFIG is missing"
# xpk allows 40 characters; the time of day takes seven.
[[ $name =~ ^[a-z]([-a-z0-9]{0,31}[a-z0-9])?$ ]] || refuse "--name $name: at most 33 lower case letters, digits, hyphens"
[[ $runs == gs://?* ]] || refuse "--runs $runs: has to be a folder in a bucket, gs://BUCKET/FOLDER"
[[ -z $price ]] || is_number "$price" || refuse "--price $price: not a number"
for number in slices max_restarts grace; do
  is_count "${!number}" || refuse "--${number//_/-} ${!number}: not a whole number"
done
for variable in ${env_names[@]+"${env_names[@]}"}; do
  [[ -n ${!variable:-} ]] || refuse "--env $variable: the variable is not set"
done
require xpk gcloud

workload=$name-$(date +%H%M%S)
scope=(--cluster="$cluster" --zone="$zone")
[[ -z $project ]] || scope+=(--project="$project")
# exec: xpk's own script passes SIGTERM to the shell that it starts; this way that shell becomes the program.
printf -v command '%q ' exec middo run "$@" "name=$name" "runs_dir=$runs"
command=${command% }
chips=${type##*-}
case $type in v5litepod-* | v6e-*) ;; *) chips=$((chips / 2)) ;; esac

created='' work=WORK
# shellcheck disable=SC2329  # the EXIT trap calls it
clean_up() {
  local status=$? attempt deleted=''
  trap '' INT TERM HUP # a second Ctrl-C must not leave the workload behind
  trap - EXIT
  end_child
  if [[ -n $created ]]; then
    for attempt in 1 2 3 4 5; do
      if call xpk workload delete --workload="$workload" "${scope[@]}" --force; then
        deleted=1
        break
      fi
      say "$workload is not deleted yet (try $attempt of 5)"
      pause 2
    done
    if [[ -z $deleted ]]; then
      say "NOT DELETED, it may still hold its slices. Delete it by hand:"
      show xpk workload delete --workload="$workload" "${scope[@]}" --force >&2
      status=1
    fi
  fi
  [[ -n $dry_run ]] || rm -rf "$work"
  exit "$status"
}

say "$slices x $type on $cluster"
say_price $((chips * slices)) "$price"
confirm "submit $workload?"
[[ -n $dry_run ]] || work=$(mktemp -d)
trap clean_up EXIT
exit_on_signals
if [[ -z $dry_run ]]; then
  # A name without a value makes xpk read the variable itself, so that no command line shows a key.
  printf '%s\n' JAX_COORDINATOR_PORT=8476 ${env_names[@]+"${env_names[@]}"} >"$work/environment"
fi

created=1
call xpk workload create --workload="$workload" "${scope[@]}" --tpu-type="$type" --num-slices="$slices" \
  --docker-image="$image" --env-file="$work/environment" --restart-on-exit-codes=75 --max-restarts="$max_restarts" \
  --termination-grace-period-seconds="$grace" --command="$command" || { say "the workload was refused" && exit 1; }
say "the log of worker 0: kubectl logs --follow --selector=jobset.sigs.k8s.io/jobset-name=$workload,batch.kubernetes.io/job-completion-index=0"

# xpk ends with 0 when the workload completed, 124 after a week of waiting, 125 when it failed; anything else
# is a problem between here and the cluster.
problems=0
while :; do
  status=0
  call xpk workload list "${scope[@]}" --wait-for-job-completion="$workload" || status=$?
  case $status in
    0) break ;;
    124) ;;
    125) break ;;
    *)
      problems=$((problems + 1))
      [[ $problems -lt 10 ]] || { say "xpk could not wait for the workload" && break; }
      say "xpk could not wait for the workload ($problems of 10)"
      pause 2
      ;;
  esac
done
call gcloud storage rsync --recursive --quiet ${project:+"--project=$project"} "$runs/$name" "runs/$name" ||
  say "the run's folder could not be copied; it is in $runs/$name"
[[ $status -eq 0 ]] || { say "the workload did not complete" && exit 1; }
