#!/usr/bin/env bash
# One process of a run on this machine; run_pod.sh and gpu.sh call it.
#
#   launch/worker.sh [--pid-file=FILE] ARGUMENTS OF florence_jax.main
#   launch/worker.sh --pid-file=FILE --stop
#
# Its last line is "launch: exit code N". SIGTERM is passed on: training saves and ends with 75.
#   --pid-file=FILE  where the process id is kept. A process left there by an earlier attempt, whose ssh connection
#                    broke, is ended first: it would hold the accelerator.
#   --stop           only end that process, which saves first.
# Python is .venv/bin/python of the checkout where there is one, else python3; FLORENCE_JAX_PYTHON names another.
set -uo pipefail
readonly SAVING_SECONDS=600

cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
# shellcheck source=launch/common.sh
source launch/common.sh

python=${FLORENCE_JAX_PYTHON:-}
if [[ -z $python ]]; then
  if [[ -x .venv/bin/python ]]; then python=.venv/bin/python; else python=python3; fi
fi

# end_leftover FILE: ends the process named in FILE if it still runs training.
end_leftover() {
  local pid second
  [[ -s $1 ]] || return 0
  pid=$(<"$1")
  if tr '\0' ' ' 2>/dev/null <"/proc/$pid/cmdline" | grep -q 'florence_jax\.main'; then
    say "ending process $pid of an earlier attempt"
    kill -TERM "$pid"
    for ((second = 0; second < SAVING_SECONDS; second++)); do
      kill -0 "$pid" 2>/dev/null || break
      sleep 1
    done
    kill -KILL "$pid" 2>/dev/null
  fi
  rm -f "$1"
}

pid_file=/dev/null
if [[ ${1:-} == --pid-file=* ]]; then
  pid_file=${1#*=}
  shift
  end_leftover "$pid_file"
fi
[[ ${1:-} == --stop ]] && exit 0

"$python" -m florence_jax.main "$@" &
child=$!
echo "$child" >"$pid_file"
trap 'kill -TERM "$child" 2>/dev/null' TERM INT HUP
wait_fully "$child"
code=$?
[[ $pid_file == /dev/null ]] || rm -f "$pid_file"
echo "$EXIT_LINE $code"
exit "$code"
