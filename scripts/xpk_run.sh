#!/usr/bin/env bash
# Training on GKE through XPK (pip install xpk): a container and an `xpk workload`. See docs/tpu.md.
#
#   xpk_run.sh build                           build the container and push it
#   xpk_run.sh run -- python train.py ...      create the workload
#   xpk_run.sh status                          the workloads of the cluster
#   xpk_run.sh logs                            the log of worker 0 of slice 0; --follow
#   xpk_run.sh stop                            delete the workload: its pods get SIGTERM and save
#
# Settings, as flags or as environment variables:
#   --cluster CLUSTER      XPK_CLUSTER
#   --workload NAME        XPK_WORKLOAD   at most 40 characters; the same name cannot be used twice at a time
#   --project PROJECT      XPK_PROJECT
#   --zone ZONE            XPK_ZONE
#   --type TYPE            XPK_TYPE       such as v5e-64, v6e-256 or tpu7x-128 (N: cores, two to a chip; or tpu7x-4x4x4)
#   --slices N             XPK_SLICES     default 1
#   --image IMAGE          XPK_IMAGE      such as us-docker.pkg.dev/PROJECT/REPOSITORY/octo_like:TAG
#   --extras EXTRAS        XPK_EXTRAS     for `build`; default data,tpu
#   --priority PRIORITY    XPK_PRIORITY   very-low, low, medium (default), high, very-high
#   --max_restarts N       XPK_MAX_RESTARTS   of the whole workload after lost nodes; default 100
#   --env NAME=VALUE                      for `run`; may be repeated
#   --dry-run                             print the commands that would be run, and run none

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$here")
# shellcheck source=scripts/shell.sh
source "$here/shell.sh"

cluster=${XPK_CLUSTER:-}
workload=${XPK_WORKLOAD:-}
project=${XPK_PROJECT:-}
zone=${XPK_ZONE:-}
type=${XPK_TYPE:-}
slices=${XPK_SLICES:-1}
image=${XPK_IMAGE:-}
extras=${XPK_EXTRAS:-data,tpu}
priority=${XPK_PRIORITY:-medium}
max_restarts=${XPK_MAX_RESTARTS:-100}
# From SIGTERM to SIGKILL: time enough to finish a step and write a checkpoint.
grace_seconds=300
dry_run=no
follow=no
environment=()
command=()

die() {
  echo "xpk_run.sh: error: $*" >&2
  exit 2
}

run() {
  if [[ $dry_run == yes ]]; then
    quote "$@"
    echo
  else
    command -v "$1" >/dev/null || die "$1 is not installed$([[ $1 != xpk ]] || echo ': pip install xpk')"
    "$@"
  fi
}

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

parse() {
  while (($#)); do
    local flag=$1 value=""
    case $flag in
      --*=*)
        value=${flag#*=}
        flag=${flag%%=*}
        shift
        set -- "$flag" "$value" "$@"
        ;;
    esac
    case $flag in
      --cluster | --workload | --project | --zone | --type | --slices | --image | --extras | --priority | --max_restarts | --env)
        (($# >= 2)) || die "$flag needs a value"
        value=$2
        shift 2
        ;;
      *) shift ;;
    esac
    case $flag in
      --cluster) cluster=$value ;;
      --workload) workload=$value ;;
      --project) project=$value ;;
      --zone) zone=$value ;;
      --type) type=$value ;;
      --slices) slices=$value ;;
      --image) image=$value ;;
      --extras) extras=$value ;;
      --priority) priority=$value ;;
      --max_restarts) max_restarts=$value ;;
      --env)
        [[ $value =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env $value: expected NAME=VALUE"
        environment+=("$value")
        ;;
      --follow) follow=yes ;;
      --dry-run | --dry_run) dry_run=yes ;;
      --help | -h)
        usage
        exit 0
        ;;
      --)
        command=("$@")
        return
        ;;
      *) die "unknown argument $flag. A training command comes after --; all flags: xpk_run.sh --help" ;;
    esac
  done
}

# `need flag value`: a setting without a default.
need() { [[ -n $2 ]] || die "no $1: pass --$1 or set XPK_$(tr '[:lower:]' '[:upper:]' <<<"$1")"; }

need_cluster() {
  need cluster "$cluster"
  need project "$project"
  need zone "$zone"
}

xpk_build() {
  need image "$image"
  # TPU VMs are x86: without the platform, a computer with an ARM processor would build what cannot start there.
  run docker build --platform=linux/amd64 --build-arg="EXTRAS=$extras" --tag="$image" "$repository"
  run docker push "$image"
}

xpk_run() {
  need_cluster
  need workload "$workload"
  need type "$type"
  need image "$image"
  [[ $workload =~ ^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$ ]] ||
    die "workload '$workload': expected lower-case letters, digits and dashes, a letter first, at most 40"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices $slices: expected a whole number from 1"
  [[ $max_restarts =~ ^[0-9]+$ ]] || die "--max_restarts $max_restarts: expected a whole number"
  case $priority in
    very-low | low | medium | high | very-high) ;;
    *) die "--priority $priority: valid: very-low, low, medium, high, very-high" ;;
  esac
  type=${type/#v5e-/v5litepod-}
  [[ $type =~ ^(v4|v5p|v5litepod|v6e|tpu7x)-[0-9]+$ || $type =~ ^tpu7x-[0-9]+x[0-9]+x[0-9]+$ ]] ||
    die "unknown accelerator type '$type'; valid: v4-N, v5p-N, v5e-N, v6e-N, tpu7x-N"
  ((${#command[@]})) || die "no command: put it after --, such as xpk_run.sh run -- python train.py --config configs/octo_base.py ..."
  local item
  local -a flags=()
  for item in ${environment[@]+"${environment[@]}"}; do flags+=(--env="$item"); done
  # exec: SIGTERM has to reach the supervisor, not a shell around it. The supervisor restarts after a crash. Where a node
  # goes away its pod gets SIGTERM, saves and exits with 75; XPK starts a workload again only for the codes 42, 127-255
  # and those that are named.
  run xpk workload create --cluster="$cluster" --workload="$workload" --tpu-type="$type" --num-slices="$slices" \
    --docker-image="$image" --command="exec python scripts/supervise.py -- $(quote "${command[@]}")" \
    --max-restarts="$max_restarts" --restart-on-exit-codes=75 --termination-grace-period-seconds="$grace_seconds" \
    --priority="$priority" \
    ${flags[@]+"${flags[@]}"} --project="$project" --zone="$zone"
}

xpk_status() {
  need_cluster
  run xpk workload list --cluster="$cluster" --project="$project" --zone="$zone"
}

xpk_logs() {
  need workload "$workload"
  local -a flags=()
  [[ $follow == no ]] || flags=(--follow)
  run kubectl logs --selector="jobset.sigs.k8s.io/jobset-name=$workload,batch.kubernetes.io/job-completion-index=0,jobset.sigs.k8s.io/job-index=0" \
    --tail=100 ${flags[@]+"${flags[@]}"}
}

xpk_stop() {
  need_cluster
  need workload "$workload"
  run xpk workload delete --cluster="$cluster" --workload="$workload" --project="$project" --zone="$zone"
}

what=${1:-}
(($# == 0)) || shift
case $what in
  build | run | status | logs | stop)
    parse "$@"
    "xpk_$what"
    ;;
  -h | --help | help | "") usage ;;
  *) die "unknown command '$what'; valid: build, run, status, logs, stop" ;;
esac
