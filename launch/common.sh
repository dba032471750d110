# Shared by the launch scripts, which source it. Options every script has:
#   --dry-run          print every command instead of running it
#   --max-restarts=N   of run_pod.sh and gpu.sh: start again at most N times (default 100)
#   --delay=SECONDS    of run_pod.sh and gpu.sh: wait before starting again (default 30)
# shellcheck shell=bash

readonly EXIT_MISTAKE=2    # florence_jax: a mistake in the command, the configuration or the data
readonly EXIT_PREEMPTED=75 # florence_jax: stopped by SIGTERM after saving
readonly EXIT_INTERRUPTED=130 # florence_jax: stopped by somebody's Ctrl-C after saving
readonly EXIT_LINE="launch: exit code"

dry_run=false
max_restarts=100
delay=30
stopping=false             # the user asked to stop
return_when_preempted=false # SLURM: the machines are about to go
children=()

say() { echo "launch: $*" >&2; }

die() {
  echo "error: $*" >&2
  exit "$EXIT_MISTAKE"
}

# usage SCRIPT: the comment at its head.
usage() { sed -n '2,/^[^#]/{ s/^# \{0,1\}//p; }' "$1"; }

# show COMMAND...: the command on stdout as it could be typed.
show() {
  local word line=""
  for word in "$@"; do
    if [[ $word =~ ^[A-Za-z0-9_./:=,@%+-]+$ ]]; then line+=" $word"; else line+=" ${word@Q}"; fi
  done
  echo "${line:1}"
}

# run COMMAND...: runs it; with --dry-run prints it.
run() {
  if $dry_run; then show "$@"; else "$@"; fi
}

# in_background LOG COMMAND...: starts it with its output in LOG, so that signals are answered while it runs.
in_background() {
  local log=$1
  shift
  if $dry_run; then
    show "$@"
    return
  fi
  "$@" >"$log" 2>&1 </dev/null &
  children+=("$!")
}

# wait_fully PID: its exit code, also where signals interrupt the waiting, which `wait` shows as a code above 128.
wait_fully() {
  local code=0 again
  wait "$1" || code=$?
  while ((code > 128)); do
    again=0
    wait "$1" 2>/dev/null || again=$?
    # 127: nothing is left to wait for; the process itself was ended by a signal.
    if ((again == 127)) || { ((again == code)) && ! kill -0 "$1" 2>/dev/null; }; then break; fi
    code=$again
  done
  return "$code"
}

# collect FOLDER: waits for everything in the background; returns the exit code of the run that logs in FOLDER.
collect() {
  local child code=0
  $dry_run && return
  for child in "${children[@]}"; do
    wait_fully "$child" || code=$?
  done
  children=()
  code=$(worst_exit "$1" "$code")
  say "exit code $code, logs in $1"
  return "$code"
}

# common_option OPTION: takes one of the options above; false for another.
common_option() {
  case $1 in
    --dry-run) dry_run=true ;;
    --max-restarts=*) max_restarts=$(number "$1") || exit ;;
    --delay=*) delay=$(number "$1") || exit ;;
    *) return 1 ;;
  esac
}

# number --name=VALUE: VALUE, or an error if it is not a whole number.
number() {
  [[ ${1#*=} =~ ^[0-9]+$ ]] || die "$1: give a whole number"
  echo "${1#*=}"
}

# worst_exit FOLDER CODE: the exit code of a run from those its workers logged in FOLDER; CODE where none did.
# A mistake decides, then Ctrl-C, then a preemption, because the other workers only died of it.
worst_exit() {
  local codes
  codes=$(grep -hs "^$EXIT_LINE " "$1"/*.log | sed "s/^$EXIT_LINE //" | sort -un | tr '\n' ' ')
  case " $codes" in
    *" $EXIT_MISTAKE "*) echo "$EXIT_MISTAKE" ;;
    *" $EXIT_INTERRUPTED "*) echo "$EXIT_INTERRUPTED" ;;
    *" $EXIT_PREEMPTED "*) echo "$EXIT_PREEMPTED" ;;
    *[1-9]*) echo 1 ;;
    *) echo "$2" ;; # all that wrote one finished; a worker that was cut off shows in CODE
  esac
}

# restart_until_done FUNCTION: calls FUNCTION NAME, with a new name for each attempt, until it ends with 0, until it
# ends with EXIT_MISTAKE, which starting again would not mend, or with EXIT_INTERRUPTED, or until it was started again
# max_restarts times.
restart_until_done() {
  local attempt=0 code started
  started=$(date +%Y%m%d-%H%M%S)
  while true; do
    code=0
    "$1" "$started-attempt-$attempt" || code=$?
    $dry_run && return 0
    if ((code == EXIT_MISTAKE)); then
      say "not started again: $EXIT_MISTAKE means a mistake in the command, the configuration or the data, named in the logs"
    fi
    if ((code == EXIT_INTERRUPTED)); then say "not started again: stopped by Ctrl-C; run the same command to go on"; fi
    ((code == 0 || code == EXIT_MISTAKE || code == EXIT_INTERRUPTED)) && return "$code"
    $stopping && return "$code"
    $return_when_preempted && ((code == EXIT_PREEMPTED)) && return "$code"
    if ((attempt >= max_restarts)); then
      say "exit code $code, started again $max_restarts times already: giving up; look at the logs, then run the same" \
        "command to go on"
      return "$code"
    fi
    attempt=$((attempt + 1))
    if ((code == EXIT_PREEMPTED)); then
      say "preempted after saving; start $attempt of at most $max_restarts more in $delay s"
    else
      say "exit code $code; start $attempt of at most $max_restarts more in $delay s"
    fi
    sleep "$delay"
    $stopping && return "$code"
  done
}
