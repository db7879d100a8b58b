#!/usr/bin/env bash
# Training on a Slurm cluster with GPUs: one task per GPU, saved and requeued on preemption and at the time limit.
#
#   NODES=4 GPUS_PER_NODE=8 TIME=24:00:00 bash scripts/slurm_train.sh \
#       python train.py --config configs/octo_base.py:base,learned_text --workdir /shared/runs/base \
#           --config.data.data_dir=/shared/oxe --config.data.mix=oxe_magic_soup
#
# Run on the login node it submits itself with sbatch; `--dry-run` as the first argument prints that command instead.
# Settings (environment): NODES, GPUS_PER_NODE, CPUS_PER_TASK, TIME, JOB_NAME, PARTITION, ACCOUNT, QOS,
# SBATCH_FLAGS (further flags of sbatch), SRUN_FLAGS, SAVE_SECONDS (from SIGTERM to the time limit), MAX_CRASHES.
#
# One task per GPU is what JAX's detection of Slurm expects: a process takes the one GPU with the number of its
# SLURM_LOCALID. GPUs must therefore not be bound to tasks (no --gpus-per-task): every task has to see all of its node.
#
# Slurm sends SIGTERM to the tasks SAVE_SECONDS before the time limit, and at preemption. train.py then saves and exits
# with 75, and the job is requeued: the same command continues from that checkpoint. `scancel` does not requeue. A crash
# is tried again in the same allocation, MAX_CRASHES times in a row at most, with growing pauses; what cannot get better
# (a mistake in the config, the NaN guard) is not.

set -euo pipefail

nodes=${NODES:-1}
gpus=${GPUS_PER_NODE:-8}
cpus=${CPUS_PER_TASK:-8}
time_limit=${TIME:-24:00:00}
job_name=${JOB_NAME:-octo_like}
save_seconds=${SAVE_SECONDS:-300}
max_crashes=${MAX_CRASHES:-5}
pause_seconds=${PAUSE_SECONDS:-15}
# Exit statuses of train.py, see docs/training.md.
preempted=75
usage=2       # a mistake in command line, config or data: it would happen again
not_finite=76 # stopped by the NaN guard: a person has to look

die() {
  echo "slurm_train.sh: error: $*" >&2
  exit 2
}

quote() {
  local word out="" escaped="'\\''"
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]]; then out+=" $word"; else out+=" '${word//\'/$escaped}'"; fi
  done
  printf '%s' "${out# }"
}

check() { [[ $2 =~ ^[1-9][0-9]*$ ]] || die "$1=$2: expected a whole number from 1"; }

submit() {
  local dry_run=no
  case ${1:-} in
    --dry-run | --dry_run)
      dry_run=yes
      shift
      ;;
    -h | --help)
      sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}"
      exit 0
      ;;
  esac
  [[ ${1:-} != -- ]] || shift
  (($#)) || die "no command, such as: bash scripts/slurm_train.sh python train.py --config configs/octo_base.py ..."
  [[ $1 != -* ]] || die "unknown flag $1; settings are environment variables, see --help"
  check NODES "$nodes"
  check GPUS_PER_NODE "$gpus"
  check CPUS_PER_TASK "$cpus"
  check SAVE_SECONDS "$save_seconds"
  [[ $dry_run == yes ]] || command -v sbatch >/dev/null || die "sbatch is not on PATH: run this on a login node of the cluster"
  local -a flags=(
    --job-name="$job_name" --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --cpus-per-task="$cpus"
    --time="$time_limit" --signal="TERM@$save_seconds" --requeue --open-mode=append --output="$job_name-%j.log"
  )
  [[ -z ${PARTITION:-} ]] || flags+=(--partition="$PARTITION")
  [[ -z ${ACCOUNT:-} ]] || flags+=(--account="$ACCOUNT")
  [[ -z ${QOS:-} ]] || flags+=(--qos="$QOS")
  # shellcheck disable=SC2206  # flags are separate words
  flags+=(${SBATCH_FLAGS:-})
  if [[ $dry_run == yes ]]; then
    quote sbatch "${flags[@]}" "${BASH_SOURCE[0]}" "$@"
    echo
  else
    sbatch "${flags[@]}" "${BASH_SOURCE[0]}" "$@"
  fi
}

# Whether SIGTERM for the time limit was already sent: what failed now failed because of it, or has no time to restart.
near_the_end() { [[ -n ${SLURM_JOB_END_TIME:-} ]] && (($(date +%s) >= SLURM_JOB_END_TIME - save_seconds)); }

# In the job. SIGTERM reaches this shell only when the job is cancelled or preempted; at the time limit it is the tasks
# alone that get it, and it is for us to requeue.
train() {
  local status crashes=0 started cancelled=no
  trap 'cancelled=yes' TERM
  # shellcheck source=/dev/null
  [[ ! -f .venv/bin/activate ]] || source .venv/bin/activate
  export PYTHONUNBUFFERED=1
  echo "job $SLURM_JOB_ID on ${SLURM_JOB_NODELIST:-?}, start number $((${SLURM_RESTART_COUNT:-0} + 1)): $(quote "$@")"
  while true; do
    started=$SECONDS
    # In the foreground: bash runs the trap when srun has ended, which is when tasks told to stop have saved. (Bash 5.2
    # forgets the status of a background job that ends while a signal interrupts `wait`.) No --kill-on-bad-exit: the
    # first task that has saved and exits with 75 must not end the others. srun does not take the CPUs from sbatch by
    # itself.
    status=0
    # shellcheck disable=SC2086  # flags are separate words
    srun --kill-on-bad-exit=0 --cpus-per-task="${SLURM_CPUS_PER_TASK:-$cpus}" ${SRUN_FLAGS:-} "$@" || status=$?
    ((status != 0)) || exit 0
    if [[ $cancelled == yes ]]; then
      # After scancel nothing is requeued; after a preemption Slurm does it by itself.
      echo "stopped by Slurm, status $status"
      exit "$status"
    fi
    if ((status == preempted)) || near_the_end; then
      echo "stopped before the time limit, status $status: requeueing"
      scontrol requeue "$SLURM_JOB_ID"
      exit 0
    fi
    if ((status == usage || status == not_finite)); then
      die "the run ended with status $status: see the log above"
    fi
    # A crash after an hour of work is not a crash at start.
    ((SECONDS - started < 3600)) || crashes=0
    crashes=$((crashes + 1))
    ((crashes <= max_crashes)) || die "crashed $crashes times in a row, the last time with status $status"
    echo "status $status; crash $crashes of $max_crashes, trying again in $((pause_seconds * crashes)) s"
    # In small steps, because bash runs the trap only between commands. What Slurm ends in the pause is not started again.
    local until=$((SECONDS + pause_seconds * crashes))
    while [[ $cancelled == no ]] && ((SECONDS < until)); do sleep 0.5; done
    [[ $cancelled == no ]] || { echo "stopped by Slurm, status $status" && exit "$status"; }
    if near_the_end; then
      echo "no time left before the time limit: requeueing"
      scontrol requeue "$SLURM_JOB_ID"
      exit 0
    fi
  done
}

if [[ -n ${SLURM_JOB_ID:-} && ${SLURM_PROCID:-0} == 0 && -n ${SLURM_JOB_NUM_NODES:-} ]]; then
  train "$@"
else
  submit "$@"
fi
