#!/usr/bin/env bash
# What one host of a TPU pod does. `tpu_pod.sh` runs it on every host; on a single TPU VM it can be called by hand.
#
#   bash scripts/tpu_host.sh setup                                  # uv, Python, the package: into ~/octo_venv
#   bash scripts/tpu_host.sh run [--env K=V]... -- python train.py ...   # in tmux, restarted by scripts/supervise.py
#   bash scripts/tpu_host.sh exec [--env K=V]... -- COMMAND...      # in the foreground, once
#   bash scripts/tpu_host.sh logs [--lines N] [--follow]
#   bash scripts/tpu_host.sh status                                 # running, finished or failed; the newest checkpoint
#   bash scripts/tpu_host.sh stop [--now]                           # SIGTERM and wait for the save; --now: SIGKILL
#
# Settings (environment): OCTO_VENV, OCTO_LOGS, OCTO_SESSION, OCTO_PYTHON, OCTO_EXTRAS, OCTO_STOP_SECONDS.

set -euo pipefail

repository=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
# shellcheck source=scripts/shell.sh
source "$repository/scripts/shell.sh"
venv=${OCTO_VENV:-$HOME/octo_venv}
logs=${OCTO_LOGS:-$HOME/octo_logs}
session=${OCTO_SESSION:-octo}
python=${OCTO_PYTHON:-3.11}
extras=${OCTO_EXTRAS:-data,tpu}
stop_seconds=${OCTO_STOP_SECONDS:-300}

die() {
  echo "tpu_host.sh: error: $*" >&2
  exit 2
}

say() { echo "[$(hostname)] $*"; }

# TPU VMs have sudo without a password; containers often have no sudo, and are root already.
as_root() {
  if ((EUID != 0)) && command -v sudo >/dev/null; then sudo -n "$@"; else "$@"; fi
}

# ------------------------------------------------------------------------------------------------------------- set-up

host_setup() {
  cd "$repository"
  export PATH="$HOME/.local/bin:$PATH"
  if ! command -v tmux >/dev/null; then
    say "installing tmux"
    as_root apt-get -o DPkg::Lock::Timeout=300 -qq update
    as_root apt-get -o DPkg::Lock::Timeout=300 -qq install -y tmux
  fi
  if ! command -v uv >/dev/null; then
    say "installing uv"
    curl -LsSf https://astral.sh/uv/install.sh | sh
  fi
  # uv brings its own Python where the system's is too old. The lock pins versions: every host, and every host of a pod
  # that is created again after a preemption, runs the same program.
  uv venv --quiet --allow-existing --python "$python" "$venv"
  uv pip install --quiet --compile-bytecode --python "$venv/bin/python" \
    --constraint requirements/cpu.lock --editable ".[$extras]"
  say "ready: $("$venv/bin/python" -c 'import sys, importlib.metadata as m; print("Python", sys.version.split()[0], "JAX", m.version("jax"))')"
}

# --------------------------------------------------------------------------------------------------- chips and sessions

# Processes that have an accelerator open. As root, because they may belong to another user.
chip_holders() {
  local device
  local -a devices=()
  for device in ${OCTO_CHIP_DEVICES:-/dev/accel[0-9]* /dev/vfio/[0-9]*}; do
    [[ -e $device ]] && devices+=("$device")
  done
  [[ ${#devices[@]} -eq 0 ]] && return 0
  as_root lsof -t -w "${devices[@]}" 2>/dev/null | sort -un || true
}

# A process that died with the chips, or someone's forgotten notebook, would make libtpu refuse to load.
free_chips() {
  local pid holders
  holders=$(chip_holders)
  for pid in $holders; do
    say "killing process $pid, which holds the chips: $(ps -o args= -p "$pid" 2>/dev/null | cut -c 1-120 || true)"
    as_root kill -KILL "$pid" 2>/dev/null || true
  done
  [[ -z $holders ]] || sleep 1
  as_root rm -f "${OCTO_LOCKFILE:-/tmp/libtpu_lockfile}" || say "the lock file of another user's process is left"
}

# The session as well as the process: after a reboot the number in the file may be another process's.
is_running() {
  [[ -f $logs/pid ]] && has_session && kill -0 "$(<"$logs/pid")" 2>/dev/null
}

has_session() { tmux has-session -t "=$session" 2>/dev/null; }

# `until_true SECONDS COMMAND...`: waits, checking five times a second.
until_true() {
  local tries=$((5 * $1))
  shift
  while ! "$@" && ((tries > 0)); do
    sleep 0.2
    tries=$((tries - 1))
  done
}

is_gone() { ! kill -0 "$1" 2>/dev/null; }
no_session() { ! has_session; }

# SIGTERM lets all processes save the same step; what is still there after the deadline is killed.
end_session() {
  local now=$1 pid
  if is_running; then
    pid=$(<"$logs/pid")
    if [[ $now == no ]]; then
      say "stopping process $pid; waiting up to $stop_seconds s for its checkpoint"
      kill -TERM "$pid" 2>/dev/null || true
      until_true "$stop_seconds" is_gone "$pid"
    fi
    if ! is_gone "$pid"; then
      say "killing process $pid and its children"
      # The command was started as the leader of a process group of its own.
      kill -KILL -- "-$pid" 2>/dev/null || kill -KILL "$pid" 2>/dev/null || true
    fi
    until_true 15 no_session # it writes the exit status and ends by itself
  fi
  tmux kill-session -t "=$session" 2>/dev/null || true
}

# ----------------------------------------------------------------------------------------------------------------- run

# Reads `[--env K=V]... -- COMMAND...` into the arrays `environment` and `command`.
environment=()
command=()
parse_command() {
  while (($#)); do
    case $1 in
      --env)
        [[ ${2:-} == [A-Za-z_]*=* ]] || die "--env ${2:-}: expected NAME=VALUE"
        environment+=("$2")
        shift 2
        ;;
      --no_restart)
        restart=no
        shift
        ;;
      --)
        shift
        command=("$@")
        break
        ;;
      *) die "unknown argument $1; the command comes after --" ;;
    esac
  done
  ((${#command[@]})) || die "no command: put it after --, such as -- python train.py --config configs/octo_base.py ..."
}

host_run() {
  local restart=yes
  parse_command "$@"
  [[ -x $venv/bin/python ]] || die "$venv is missing: run setup first"
  end_session no
  free_chips
  mkdir -p "$logs"
  rm -f "$logs/exit_status" "$logs/pid" "$logs/stopped_here"
  [[ $restart == no ]] || command=(python scripts/supervise.py -- "${command[@]}")
  quote "${command[@]}" >"$logs/command"
  {
    echo "cd $(quote "$repository")"
    echo "export PATH=$(quote "$venv/bin"):\$PATH VIRTUAL_ENV=$(quote "$venv") PYTHONUNBUFFERED=1"
    ((${#environment[@]} == 0)) || echo "export $(quote "${environment[@]}")"
    echo "ulimit -n \"\$(ulimit -H -n)\""
    echo "set -m  # the command leads a process group, so that all of it can be killed"
    echo "$(quote "${command[@]}") >>$(quote "$logs/run.log") 2>&1 &"
    echo "run=\$!"
    echo "echo \$run >$(quote "$logs/pid")"
    echo "tail -n 0 -F --pid=\$run $(quote "$logs/run.log") &  # for whoever attaches to the session"
    echo "wait \$run"
    echo "echo \$? >$(quote "$logs/exit_status")"
  } >"$logs/launch.sh"
  echo "=== $(date -u '+%Y-%m-%d %H:%M:%S') UTC: $(<"$logs/command")" >>"$logs/run.log"
  tmux new-session -d -s "$session" "bash $(quote "$logs/launch.sh")"
  until_true 60 test -s "$logs/pid"
  say "started in tmux session $session: $(<"$logs/command")"
}

host_exec() {
  local restart=no
  parse_command "$@"
  cd "$repository"
  export PATH="$venv/bin:$PATH" VIRTUAL_ENV="$venv" PYTHONUNBUFFERED=1
  ((${#environment[@]} == 0)) || export "${environment[@]}"
  exec "${command[@]}"
}

host_logs() {
  local lines=50 follow=()
  while (($#)); do
    case $1 in
      --lines)
        [[ ${2:-} =~ ^[0-9]+$ ]] || die "--lines ${2:-}: expected a number"
        lines=$2
        shift 2
        ;;
      --follow)
        follow=(-F)
        shift
        ;;
      *) die "unknown argument $1; valid: --lines N, --follow" ;;
    esac
  done
  [[ -f $logs/run.log ]] || die "no log: $logs/run.log is missing; nothing was started on $(hostname)"
  exec tail -n "$lines" ${follow[@]+"${follow[@]}"} "$logs/run.log"
}

# One word for the run: running, finished, stopped (by SIGTERM, state saved), failed:STATUS, vanished (killed together
# with its session) or none.
state_word() {
  local status
  if is_running; then
    echo running
  elif [[ -f $logs/exit_status ]]; then
    status=$(<"$logs/exit_status")
    case $status in
      0) echo finished ;;
      75) echo stopped ;;
      *) echo "failed:$status" ;;
    esac
  elif [[ -f $logs/command ]]; then
    echo vanished
  else
    echo none
  fi
}

# The --workdir of the command that was started last. The file was written by `quote` above, so that eval only splits it.
last_workdir() {
  local -a words=()
  local i
  [[ -f $logs/command ]] || return 0
  eval "words=($(<"$logs/command"))"
  for ((i = 0; i < ${#words[@]}; i++)); do
    case ${words[i]} in
      --workdir) echo "${words[i + 1]:-}" ;;
      --workdir=*) echo "${words[i]#--workdir=}" ;;
    esac
  done
}

# The newest step whose manifest is there: what a restart would continue from.
newest_checkpoint() {
  local workdir=$1
  {
    case $workdir in
      gs://*) gcloud storage ls "${workdir%/}/checkpoints/*/manifest.json" 2>/dev/null || true ;;
      /*) ls -d "${workdir%/}"/checkpoints/*/manifest.json 2>/dev/null || true ;;
      *) ls -d "$repository/${workdir%/}"/checkpoints/*/manifest.json 2>/dev/null || true ;;
    esac
  } | sed -n 's|.*/\([0-9]*\)/manifest.json$|\1|p' | sort -n | tail -n 1
}

host_status() {
  local brief=no checkpoints=no workdir step
  while (($#)); do
    case $1 in
      --brief) brief=yes ;;
      --checkpoints) checkpoints=yes ;;
      *) die "unknown argument $1; valid: --brief, --checkpoints" ;;
    esac
    shift
  done
  if [[ $brief == yes ]]; then # for tpu_pod.sh keep: what a person stopped is not to be started again
    local word
    word=$(state_word)
    [[ ! -f $logs/stopped_here || $word == running || $word == finished || $word == failed* ]] || word=ended
    echo "octo_state=$word"
    return
  fi
  say "$(state_word); tmux: $(tmux list-sessions -F '#S' 2>/dev/null | tr '\n' ' ')"
  [[ ! -f $logs/run.log ]] || say "last line: $(tail -n 1 "$logs/run.log" | cut -c 1-200)"
  [[ $checkpoints == yes ]] || return 0
  workdir=$(last_workdir)
  [[ -n $workdir ]] || return 0
  step=$(newest_checkpoint "$workdir")
  say "newest checkpoint in $workdir: ${step:-none}"
}

host_stop() {
  local now=no
  case ${1:-} in
    "") ;;
    --now) now=yes ;;
    *) die "unknown argument $1; valid: --now" ;;
  esac
  mkdir -p "$logs"
  touch "$logs/stopped_here"
  end_session "$now"
  free_chips
  say "$(state_word)"
}

what=${1:-}
(($# == 0)) || shift
case $what in
  setup) host_setup "$@" ;;
  run) host_run "$@" ;;
  exec) host_exec "$@" ;;
  logs) host_logs "$@" ;;
  status) host_status "$@" ;;
  stop) host_stop "$@" ;;
  -h | --help | help) sed -n '2,/^$/s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" ;;
  *) die "unknown command '$what'; valid: setup, run, exec, logs, status, stop" ;;
esac
