#!/usr/bin/env bash
# Training on Cloud TPU from your own computer: one or several slices, as a queued resource. See docs/tpu.md.
#
#   tpu_pod.sh create                          ask for the TPU; --wait returns when it is there
#   tpu_pod.sh setup                           copy this working tree to all hosts and install it there with uv
#   tpu_pod.sh run -- python train.py ...      start on all hosts, in tmux, restarted by scripts/supervise.py
#   tpu_pod.sh exec -- COMMAND...              run a command once on all hosts and show its output
#   tpu_pod.sh keep -- python train.py ...     create, setup and run, and again after every preemption, until it is done;
#                                              Ctrl-C ends the watching and leaves the run alone; `stop` and `delete`,
#                                              from any computer, end the watching too, for good: --again starts anew
#   tpu_pod.sh logs                            the log of host 0; --worker N|all, --node N|all, --lines N, --follow
#   tpu_pod.sh status                          the queued resource, the run on every host, the newest checkpoint
#   tpu_pod.sh ssh                             a shell on host 0; --worker N, --node N
#   tpu_pod.sh stop                            SIGTERM on all hosts: they save the same step and end; --now does not wait
#   tpu_pod.sh delete                          give the TPU back; asks first, --yes does not
#
# Settings, as flags or as environment variables:
#   --name NAME            TPU_NAME       of the queued resource
#   --project PROJECT      TPU_PROJECT    default: that of `gcloud config`
#   --zone ZONE            TPU_ZONE       such as us-central2-b
#   --type TYPE            TPU_TYPE       v2-N, v3-N, v4-N, v5p-N (N: cores), v5e-N, v6e-N (N: chips), such as v4-128
#   --slices N             TPU_SLICES     slices of that type, trained on together; default 1
#   --spot                 TPU_SPOT=1     cheaper, and may be taken away at any time
#   --reserved             TPU_RESERVED=1 from your reservation
#   --runtime VERSION      TPU_RUNTIME    software of the TPU VM; default: the one for the type
#   --setup_command "..."  TPU_SETUP_COMMAND   a shell command that `setup` runs last on every host, in the repository
#   --env NAME=VALUE                      for `run`, `exec` and `keep`; may be repeated
#   --create_flags "..."   TPU_CREATE_FLAGS   further flags of `gcloud ... create`, such as "--network=n --internal-ips"
#   --ssh_flags "..."      TPU_SSH_FLAGS      further flags of `gcloud ... ssh` and `scp`, such as "--tunnel-through-iap"
#   --dry-run                             print the commands that would be run, and run none

set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(dirname "$here")
# shellcheck source=scripts/shell.sh
source "$here/shell.sh"

name=${TPU_NAME:-}
project=${TPU_PROJECT:-}
zone=${TPU_ZONE:-}
type=${TPU_TYPE:-}
slices=${TPU_SLICES:-1}
spot=${TPU_SPOT:-}
reserved=${TPU_RESERVED:-}
runtime=${TPU_RUNTIME:-}
create_flags=${TPU_CREATE_FLAGS:-}
ssh_flags=${TPU_SSH_FLAGS:-}
setup_command=${TPU_SETUP_COMMAND:-}
poll_seconds=${TPU_POLL_SECONDS:-60}
archive=${TPU_ARCHIVE:-/tmp/octo_like.tgz}
dry_run=no
yes=no
now=no
wait=no
restart=yes
again=no
# What `keep` tries again at most so often in a row, where it has never worked or where only others can mend it.
tries=${TPU_TRIES:-20}
# Hosts that gcloud talks to at the same time. Its default of 64 would start a larger pod in parts, and the first part
# would wait for the others.
at_once=1024
worker=""
node=""
lines=50
follow=no
environment=()
command=()

die() {
  echo "tpu_pod.sh: error: $*" >&2
  exit 2
}

note() { echo "# $*" >&2; }

# Runs a command, or prints it so that it can be pasted into a shell.
run() {
  if [[ $dry_run == yes ]]; then
    quote "$@"
    echo
  else
    "$@"
  fi
}

# ------------------------------------------------------------------------------------------------------- command line

usage() { sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"; }

parse() {
  while (($#)); do
    local flag=$1 value
    case $flag in
      --*=*)
        value=${flag#*=}
        flag=${flag%%=*}
        shift
        set -- "$flag" "$value" "$@"
        ;;
    esac
    case $flag in
      --name | --project | --zone | --type | --slices | --runtime | --worker | --node | --lines | --env | --create_flags | --ssh_flags | --setup_command)
        (($# >= 2)) || die "$flag needs a value"
        value=$2
        shift 2
        ;;
      *) shift ;;
    esac
    case $flag in
      --name) name=$value ;;
      --project) project=$value ;;
      --zone) zone=$value ;;
      --type) type=$value ;;
      --slices) slices=$value ;;
      --runtime) runtime=$value ;;
      --create_flags) create_flags=$value ;;
      --ssh_flags) ssh_flags=$value ;;
      --setup_command) setup_command=$value ;;
      --worker) worker=$value ;;
      --node) node=$value ;;
      --lines) lines=$value ;;
      --env)
        [[ $value =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || die "--env $value: expected NAME=VALUE"
        environment+=("$value")
        ;;
      --spot | --preemptible) spot=1 ;;
      --reserved) reserved=1 ;;
      --wait) wait=yes ;;
      --follow) follow=yes ;;
      --now) now=yes ;;
      --no_restart) restart=no ;;
      --again) again=yes ;;
      --yes | -y) yes=yes ;;
      --dry-run | --dry_run) dry_run=yes ;;
      --help | -h)
        usage
        exit 0
        ;;
      --)
        command=("$@")
        return
        ;;
      *) die "unknown argument $flag. A training command comes after --; all flags: tpu_pod.sh --help" ;;
    esac
  done
}

is_number() { [[ $1 =~ ^[0-9]+$ ]]; }
is_index() { [[ $1 == all || $1 =~ ^[0-9]+([-,][0-9]+)*$ ]]; }

check_settings() {
  [[ $dry_run == yes ]] || command -v gcloud >/dev/null ||
    die "gcloud is not installed: https://cloud.google.com/sdk/docs/install, then gcloud auth login"
  [[ -n $name ]] || die "no name: pass --name NAME or set TPU_NAME"
  [[ $name =~ ^[a-z]([a-z0-9-]{0,61}[a-z0-9])?$ ]] ||
    die "name '$name': expected lower-case letters, digits and dashes, a letter first, at most 63"
  if [[ -z $project ]] && command -v gcloud >/dev/null; then
    project=$(gcloud config get-value project 2>/dev/null || true)
  fi
  [[ -n $project && $project != "(unset)" ]] ||
    die "no project: pass --project PROJECT, set TPU_PROJECT, or run gcloud config set project PROJECT"
  [[ -n $zone ]] || die "no zone: pass --zone ZONE or set TPU_ZONE, such as us-central2-b; your quota is for certain zones"
  # us-central2-b; zones for accelerators have longer names, such as us-central1-ai1a.
  [[ $zone =~ ^[a-z]+-[a-z]+[0-9]+-([a-z]|ai[0-9]+[a-z])$ ]] || die "zone '$zone': expected a zone such as us-central2-b or us-central1-ai1a, not a region"
  [[ $slices =~ ^[1-9][0-9]*$ ]] || die "--slices $slices: expected a whole number from 1"
  is_number "$lines" || die "--lines $lines: expected a whole number"
  [[ -z $worker ]] || is_index "$worker" || die "--worker $worker: expected a number, a range such as 0-3, or all"
  [[ -z $node ]] || is_index "$node" || die "--node $node: expected a number, a range such as 0-3, or all"
  [[ $node == all || -z $node || $slices != 1 || $node == 0 ]] || die "--node $node: with one slice there is only node 0 (see --slices)"
}

need_command() {
  ((${#command[@]})) ||
    die "no command: put it after --, such as tpu_pod.sh $1 -- python train.py --config configs/octo_base.py --workdir gs://..."
}

# Accelerator types: family, what its number counts, chips per host, software of the VM.
# https://cloud.google.com/tpu/docs/runtimes and the pages of the versions
check_type() {
  local family number
  [[ -n $type ]] || die "no accelerator type: pass --type TYPE or set TPU_TYPE, such as v4-128 or v5e-64"
  type=${type/#v5e-/v5litepod-}
  type=${type/#v5lite-/v5litepod-}
  family=${type%-*}
  number=${type##*-}
  local valid="v2-N, v3-N, v4-N, v5p-N (N cores: 8, 16, 32, ...), v5e-N, v6e-N (N chips: 1, 4, 8, 16, 32, 64, 128, 256)"
  is_number "$number" || die "unknown accelerator type '$type'; valid: $valid"
  case $family in
    v2 | v3 | v4)
      ((number >= 8 && number % 8 == 0)) || die "accelerator type $type: N counts cores, 8 to a host; valid: $valid"
      : "${runtime:=tpu-ubuntu2204-base}"
      ;;
    v5p)
      ((number >= 8 && number % 8 == 0)) || die "accelerator type $type: N counts cores, 8 to a host; valid: $valid"
      : "${runtime:=v2-alpha-tpuv5}"
      ;;
    v5litepod | v6e)
      case $number in
        1 | 4 | 8 | 16 | 32 | 64 | 128 | 256) ;;
        *) die "accelerator type $type: N counts chips; valid: 1, 4, 8, 16, 32, 64, 128, 256" ;;
      esac
      if [[ $family == v6e ]]; then : "${runtime:=v2-alpha-tpuv6e}"; else : "${runtime:=v2-alpha-tpuv5-lite}"; fi
      ;;
    tpu7x) die "accelerator type $type: TPU7x is sold through GKE (scripts/xpk_run.sh --type $type), not as a queued resource; valid here: $valid" ;;
    *) die "unknown accelerator type '$type'; valid: $valid" ;;
  esac
  [[ -z $spot || -z $reserved ]] || die "--spot and --reserved exclude each other"
}

# ------------------------------------------------------------------------------------------------------ gcloud commands

gcloud_tpu() { run gcloud compute tpus queued-resources "$@" --project="$project" --zone="$zone"; }

# `remote NODE WORKER COMMAND`: on the hosts that are named, all at once.
remote() {
  # shellcheck disable=SC2086  # flags are separate words
  gcloud_tpu ssh "$name" --node="$1" --worker="$2" --batch-size="$at_once" --command="$3" $ssh_flags
}

# The command for tpu_host.sh: environment, then the words after --.
host_words() {
  local item
  local -a words=()
  for item in ${environment[@]+"${environment[@]}"}; do words+=(--env "$item"); done
  [[ $restart == yes || $1 == exec ]] || words+=(--no_restart)
  quote bash octo_like/scripts/tpu_host.sh "$1" ${words[@]+"${words[@]}"} -- "${command[@]}"
}

# Whether an error of gcloud stays the same until a person mends it: no login, no permission, unknown zone, type or project,
# no quota. Not when requests came too fast, which passes.
hopeless() {
  ! grep -qiE 'rate.?limit|per.?minute' <<<"$1" || return 1
  grep -qiE 'PERMISSION_DENIED|UNAUTHENTICATED|INVALID_ARGUMENT|SERVICE_DISABLED|not have permission|active account' <<<"$1" ||
    grep -qiE 'gcloud auth|reauthentication|refreshing your|not been used in project|unrecognized arguments' <<<"$1" ||
    grep -qE '(^|[^[:alnum:]_.-])40[013]([^[:alnum:]_.-]|$)' <<<"$1"
}
no_quota() { grep -qi 'quota' <<<"$1" && ! grep -qiE 'rate.?limit|per.?minute' <<<"$1"; }

last_line() { grep -v '^ *$' <<<"$1" | tail -n 1; }

# State of the queued resource: ACTIVE, WAITING_FOR_RESOURCES, PROVISIONING, SUSPENDED, FAILED, ... or MISSING. UNKNOWN where
# the answer may come later; an error that stays ends the script.
state() {
  local answer
  if answer=$(gcloud compute tpus queued-resources describe "$name" --format="value(state.state)" \
    --project="$project" --zone="$zone" 2>&1); then
    echo "${answer:-UNKNOWN}"
  elif hopeless "$answer"; then
    die "the state of $name in $project, $zone cannot be read: $answer"
  elif [[ $answer == *NOT_FOUND* || $answer == *"not found"* ]]; then
    echo MISSING
  else
    echo "$answer" >&2
    echo UNKNOWN
  fi
}

# ------------------------------------------------------------------------------------------- who wants the TPU to be there

# `keep` asks for the TPU whenever it is gone, so `stop` and `delete` have to reach it wherever it runs, also between two
# requests, when there is no TPU to write on. What both commands surely share is the project: its metadata hold two
# entries for each name and zone. The first is the `keep` in charge; a second `keep` takes over and the first one ends. The
# other says that somebody stopped or deleted, when and from where; only `keep --again` takes it away. They are two entries,
# because one would be overwritten by a `keep` that starts at the same moment.
gcloud_project() { run gcloud compute project-info "$@" --project="$project" --quiet; }
keeper_key() { echo "octo-keep-$zone-$name"; }
off_key() { echo "octo-off-$zone-$name"; }
stamp() { echo "$(date -u +%Y-%m-%dT%H-%M-%SZ):$(id -un)@$(hostname)" | tr -c 'A-Za-z0-9.@:\n-' _; }

# Reads both entries into `keeper` and `off`; what gcloud said is in `said`.
keeper=""
off=""
said=""
read_wanted() {
  keeper="" off=""
  said=$(gcloud_project describe --format="value(commonInstanceMetadata.items[$(keeper_key)],commonInstanceMetadata.items[$(off_key)])" 2>&1) || return
  [[ ! $said =~ (keep:[^[:space:]]+) ]] || keeper=${BASH_REMATCH[1]}
  [[ ! $said =~ ((stop|delete):[^[:space:]]+) ]] || off=${BASH_REMATCH[1]}
}

# `call_off stop|delete`, before anything is stopped or deleted. Without a `keep` there is nothing to call off.
called_off=yes
call_off() {
  if [[ $dry_run == yes ]]; then
    read_wanted || true
    echo "$said"
    note "where that names a keep, this ends it:"
    gcloud_project add-metadata --metadata="$(off_key)=$1:$(stamp)"
    return
  fi
  if read_wanted; then
    [[ -n $keeper ]] || return 0
    ! said=$(gcloud_project add-metadata --metadata="$(off_key)=$1:$(stamp)" 2>&1) || return 0
  elif grep -qE 'SERVICE_DISABLED|not been used in project' <<<"$said"; then
    return 0 # without this service no `keep` has started
  fi
  called_off=no
  note "warning: a \`keep\` of $name, if there is one, was not told to end: $(last_line "$said")"
  note "End it with Ctrl-C where it runs: it would start the run again, or ask for the TPU again."
}

pod_create() {
  check_type
  local -a flags=(--accelerator-type="$type" --runtime-version="$runtime")
  if ((slices > 1)); then
    flags+=(--node-count="$slices" --node-prefix="$name")
  else
    flags+=(--node-id="$name")
  fi
  [[ -z $spot ]] || flags+=(--spot)
  [[ -z $reserved ]] || flags+=(--reserved)
  # shellcheck disable=SC2086  # flags are separate words
  gcloud_tpu create "$name" "${flags[@]}" $create_flags || return # where `keep` calls it, a failure does not end the script
  [[ $wait == no ]] || wait_until_active
}

wait_until_active() {
  local now_state before=""
  if [[ $dry_run == yes ]]; then
    note "waits until this prints ACTIVE:"
    gcloud_tpu describe "$name" --format="value(state.state)"
    return
  fi
  while true; do
    now_state=$(state)
    [[ $now_state == "$before" ]] || announce "$now_state"
    before=$now_state
    case $now_state in
      ACTIVE) return ;;
      FAILED | SUSPENDED | SUSPENDING | DELETING | MISSING)
        die "the queued resource $name is $now_state; see tpu_pod.sh status, and delete it before asking again. FAILED is mostly quota"
        ;;
    esac
    sleep "$poll_seconds"
  done
}

pod_setup() {
  local pack deleted=""
  if git -C "$repository" rev-parse --git-dir >/dev/null 2>&1; then
    deleted=$(git -C "$repository" ls-files --deleted)
    [[ -z $deleted ]] || die "deleted but still known to git (git rm them, or restore them): $deleted"
    # What git tracks or would add, uncommitted changes included; not data, runs or the environment.
    pack="git -C $(quote "$repository") ls-files -z --cached --others --exclude-standard |"
    pack+=" tar -C $(quote "$repository") --null -T - -czf $(quote "$archive")"
  else
    pack="tar -C $(quote "$repository") --exclude ./.venv --exclude ./runs -czf $(quote "$archive") ."
  fi
  # `|| return`: `keep` calls this where a failure does not end the script.
  if [[ $dry_run == yes ]]; then echo "$pack"; else eval "$pack" || return; fi
  # shellcheck disable=SC2086  # flags are separate words
  gcloud_tpu scp "$archive" "$name:octo_like.tgz" --node=all --worker=all --batch-size="$at_once" $ssh_flags || return
  # A runs folder that someone keeps on the host stays.
  local line="mkdir -p octo_like && find octo_like -mindepth 1 -maxdepth 1 ! -name runs -exec rm -rf {} +"
  line+=" && tar -xzf octo_like.tgz -C octo_like && bash octo_like/scripts/tpu_host.sh setup"
  [[ -z $setup_command ]] || line+=" && cd octo_like && { $setup_command; }"
  remote all all "$line"
}

pod_run() {
  need_command run
  warn_about_workdir
  remote all all "$(host_words run)"
}

# A pod's hosts share no disk: a local --workdir would leave each with its own part of every checkpoint.
warn_about_workdir() {
  local i word workdir=""
  for ((i = 0; i < ${#command[@]}; i++)); do
    word=${command[i]}
    case $word in
      --workdir) workdir=${command[i + 1]:-} ;;
      --workdir=*) workdir=${word#--workdir=} ;;
    esac
  done
  [[ -z $workdir || $workdir == gs://* ]] ||
    note "warning: --workdir $workdir is a disk of the host and is lost with it; use gs://BUCKET/..."
}

pod_exec() {
  need_command exec
  remote "${node:-all}" "${worker:-all}" "$(host_words exec)"
}

pod_logs() {
  local line="bash octo_like/scripts/tpu_host.sh logs --lines $lines"
  [[ $follow == no ]] || line+=" --follow"
  remote "${node:-0}" "${worker:-0}" "$line"
}

pod_status() {
  gcloud_tpu describe "$name" --format="table(name.basename(), state.state, tpu.nodeSpec[0].node.acceleratorType, createTime)"
  if [[ $dry_run == no ]]; then
    local now_state
    now_state=$(state)
    if [[ $now_state != ACTIVE ]]; then
      echo "Not ACTIVE: there are no hosts to ask."
      return
    fi
  fi
  remote all all "bash octo_like/scripts/tpu_host.sh status"
  remote 0 0 "bash octo_like/scripts/tpu_host.sh status --checkpoints"
}

pod_ssh() {
  # shellcheck disable=SC2086  # flags are separate words
  gcloud_tpu ssh "$name" --node="${node:-0}" --worker="${worker:-0}" $ssh_flags
}

pod_stop() {
  local line="bash octo_like/scripts/tpu_host.sh stop"
  [[ $now == no ]] || line+=" --now"
  call_off stop
  if ! remote all all "$line"; then
    local now_state
    now_state=$(state)
    [[ $now_state != ACTIVE ]] || die "not all hosts answered; run it again"
    echo "$name is $now_state: nothing runs there. What was asked for costs once it is there: tpu_pod.sh delete"
  fi
  [[ $called_off == yes ]] || exit 1
}

pod_delete() {
  local answer
  if [[ $yes == no && $dry_run == no ]]; then
    read -r -p "Delete $name in $project, $zone? What is on its disks is lost; buckets stay. Type yes: " answer || answer=no
    [[ $answer == yes ]] || die "not deleted"
  fi
  call_off delete
  if [[ -n $off$keeper && $dry_run == no && $(state) == MISSING ]]; then
    echo "there is no $name now, and no keep will ask for it"
  else
    gcloud_tpu delete "$name" --force --quiet
  fi
  [[ $called_off == yes ]] || exit 1
}

# One word for the run on all hosts: running, finished, failed:STATUS, stopped (not running somewhere), ended (by
# tpu_host.sh stop on a host) or unreachable.
run_state() {
  local answer
  # ssh fails while a host comes or goes.
  if ! answer=$(remote all all "bash octo_like/scripts/tpu_host.sh status --brief || echo octo_state=none" 2>&1); then
    [[ $answer != *PERMISSION_DENIED* && $answer != *UNAUTHENTICATED* ]] || die "the hosts of $name cannot be reached: $answer"
    last_line "$answer" >&2
    echo unreachable
    return
  fi
  answer=$(grep -o 'octo_state=[a-z]*:\{0,1\}[0-9]*' <<<"$answer" | cut -d= -f2 | sort -u || true)
  case $answer in
    "") echo unreachable ;;
    running | finished) echo "$answer" ;;
    *ended*) echo ended ;;
    # stopped: something other than tpu_pod.sh stop, such as maintenance, sent SIGTERM, and the state was saved.
    *none* | *vanished* | *stopped*) echo stopped ;;
    *failed:*) grep -m 1 failed <<<"$answer" ;;
    *) echo running ;; # some hosts finished, others about to
  esac
}

# Ends `keep` when somebody has called it off or another `keep` has taken over. What this one had begun before it could see
# that (`begun`: create or run) is taken back.
end_if_called_off() {
  local begun=$1 now_state
  if [[ -n $off ]]; then
    announce "called off (${off/:/ }): ending. To start it all the same: tpu_pod.sh keep --again"
    case $begun-$off in
      -*) ;;
      *-delete:*)
        while true; do
          now_state=$(state) || die "$name may be there still, and then it costs: tpu_pod.sh delete"
          [[ $now_state != MISSING && $now_state != DELETING ]] || break
          announce "giving back what was asked for at the same moment"
          gcloud_tpu delete "$name" --force --quiet || sleep "$poll_seconds"
        done
        ;;
      run-*) remote all all "bash octo_like/scripts/tpu_host.sh stop" || announce "stop failed: tpu_pod.sh stop" ;;
    esac
    [[ $off == delete:* ]] || announce "what was asked for costs until it is given back: tpu_pod.sh delete"
    exit 75
  elif [[ -n $keeper && $keeper != "$mine" ]]; then
    announce "another keep has taken over (${keeper/:/ }): ending"
    exit 75
  fi
}

# Reads until there is an answer: without one nothing is asked for and nothing started.
look() {
  until read_wanted; do
    ! hopeless "$said" || die "whether $name is still wanted cannot be read: $said"
    announce "the metadata of $project cannot be read, trying again in $poll_seconds s: $(last_line "$said")"
    sleep "$poll_seconds"
  done
  end_if_called_off "$1"
}

# Puts this `keep` in charge.
mine=""
take_charge() {
  local how="It is kept there so that stop and delete end \`keep\` from anywhere. Needed: the service compute.googleapis.com"
  how+=" and the role Compute Instance Admin (v1) in $project"
  mine="keep:$(stamp):$$-$RANDOM"
  if [[ $again == yes ]]; then
    said=$(gcloud_project remove-metadata --keys="$(off_key)" 2>&1) || die "cannot write the metadata of $project: $said. $how"
  fi
  said=$(gcloud_project add-metadata --metadata="$(keeper_key)=$mine" 2>&1) ||
    die "cannot write the metadata of $project: $said. $how"
  read_wanted || die "cannot read the metadata of $project: $said. $how"
  [[ -z $off ]] || die "$name was called off (${off/:/ }); to start it all the same: tpu_pod.sh keep --again ..."
}

# Creates, sets up and runs; begins again whenever the TPU was taken away. Ends when the run does, or is called off.
pod_keep() {
  need_command keep
  check_type
  wait=no # it watches anyway
  if [[ $dry_run == yes ]]; then
    gcloud_project add-metadata --metadata="$(keeper_key)=keep:$(stamp)"
    read_wanted || true
    echo "$said"
    pod_create
    wait_until_active
    pod_setup
    pod_run
    note "then, every $poll_seconds s, asks all hosts; after a preemption deletes the queued resource and begins again:"
    remote all all "bash octo_like/scripts/tpu_host.sh status --brief || echo octo_state=none"
    gcloud_tpu delete "$name" --force --quiet
    return
  fi
  take_charge
  # started: a run of this command. seen: alive since this command last deleted it, so that somebody else has deleted it when
  # it is missing. failures: in a row. begun: what was done since the last look.
  local now_state before="" run started=no seen=no missing=0 failures=0 begun=""
  while true; do
    look "$begun"
    begun=""
    now_state=$(state)
    [[ $now_state == "$before" ]] || announce "$now_state"
    before=$now_state
    case $now_state in
      MISSING | UNKNOWN | SUSPENDING | SUSPENDED | FAILED | DELETING) ;;
      *) seen=yes missing=0 ;;
    esac
    case $now_state in
      MISSING)
        if [[ $seen == yes ]]; then
          missing=$((missing + 1)) # once may be a slip of the service
          if ((missing > 1)); then
            announce "somebody has deleted it: ending. To ask for it again: tpu_pod.sh keep"
            exit 75
          fi
        elif said=$(pod_create 2>&1); then
          echo "$said" >&2
          seen=yes begun=create
          continue
        else
          begun=create # it may have been accepted all the same
          failures=$((failures + 1))
          if hopeless "$said" || [[ $said == *NOT_FOUND* ]] || { no_quota "$said" && { [[ $started == no ]] || ((failures >= tries)); }; }; then
            die "$name cannot be created: $said"
          fi
          announce "create failed; trying again in $poll_seconds s: $said"
        fi
        ;;
      FAILED)
        # A request that never was fulfilled will not be the next time either: quota, zone or type.
        failures=$((failures + 1))
        if [[ $started == no ]] || ((failures >= tries)); then
          die "the queued resource $name FAILED; see tpu_pod.sh status, then delete it"
        fi
        seen=no
        gcloud_tpu delete "$name" --force --quiet || announce "delete failed; trying again in $poll_seconds s"
        ;;
      SUSPENDED)
        announce "taken away: asking for it again"
        seen=no
        gcloud_tpu delete "$name" --force --quiet || announce "delete failed; trying again in $poll_seconds s"
        ;;
      ACTIVE)
        run=$(run_state)
        [[ $run != ended ]] || look ""
        [[ $started == yes || $run != ended || $again == yes ]] ||
          die "the run on $name was stopped there; to start it all the same: tpu_pod.sh keep --again ..."
        # What ended before this command was given is not its result: run again, which continues from the checkpoint.
        [[ $started == yes || $run == running || $run == unreachable ]] || run=stopped
        case $run in
          running) started=yes failures=0 ;;
          finished)
            announce "the run has finished. The TPU still costs: tpu_pod.sh delete"
            return
            ;;
          failed:*) die "the run ended with status ${run#failed:}; see tpu_pod.sh logs. The TPU still costs" ;;
          ended)
            announce "stopped on its host: ending. The TPU still costs: tpu_pod.sh delete"
            exit 75
            ;;
          stopped)
            announce "setting up and starting"
            if pod_setup; then
              look "" # setting up takes minutes
              begun=run
              if pod_run; then
                started=yes failures=0
                continue
              fi
            fi
            failures=$((failures + 1))
            ((failures < tries)) || die "set-up failed $failures times in a row: see above. The TPU still costs"
            announce "set-up failed; trying again in $poll_seconds s"
            ;;
          unreachable)
            if [[ $started == no ]]; then
              failures=$((failures + 1))
              ((failures < tries)) || die "a host did not answer $failures times in a row. The TPU still costs"
            fi
            announce "a host does not answer; asking again in $poll_seconds s"
            ;;
        esac
        ;;
    esac
    sleep "$poll_seconds"
  done
}

announce() { echo "$(date '+%Y-%m-%d %H:%M:%S') $name: $*"; }

what=${1:-}
(($# == 0)) || shift
case $what in
  create | setup | run | exec | keep | logs | status | ssh | stop | delete)
    parse "$@"
    check_settings
    "pod_$what"
    ;;
  -h | --help | help | "") usage ;;
  *) die "unknown command '$what'; valid: create, setup, run, exec, keep, logs, status, ssh, stop, delete" ;;
esac
