#!/usr/bin/env bash
# Trains on all machines of a TPU slice, and starts again (resuming) after a preemption or a crash.
#
#   launch/run_pod.sh --name=NAME --zone=ZONE [options] -- --config=configs/pretrain.py:variant=H --workdir=/shared/run
#
# What follows -- goes to florence_jax.main on every machine, with --config.distributed=True. The workdir must be seen
# by all of them. The slice must exist and be installed (launch/tpu_vm.sh). Run this in tmux on a machine that stays
# on; Ctrl-C asks the training to save and stop.
#
# Options:
#   --logs=FOLDER          a folder per attempt, with a file per worker, goes here (default logs/NAME)
#   --recreate="OPTIONS"   where the slice is gone (spot): make and install it again with these options of
#                          launch/tpu_vm.sh create, for example "--topology=v5e:16x16 --spot --queued"
#   --project=PROJECT      default: gcloud's own
#   --max-restarts=N       start again at most N times (default 100)
#   --delay=SECONDS        before starting again (default 30)
#   --dry-run              print the commands instead of running them
#
# Exit code: 0 finished; 2 a mistake in the command, the configuration or the data (not started again); 130
# Ctrl-C on a worker (not started again); otherwise that of the last attempt, 75 if it was stopped after saving.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

readonly PID_FILE=.training.pid # in the checkout on the worker, which runs one training at a time: it has one TPU
name="" zone="" project="" logs="" recreate=""
arguments=() ssh=()

# slice VERB OPTIONS...: launch/tpu_vm.sh for this slice; with --dry-run it prints its own commands.
slice() {
  local verb=$1
  shift
  if $dry_run; then set -- "$@" --dry-run; fi
  launch/tpu_vm.sh "$verb" --name="$name" --zone="$zone" ${project:+--project="$project"} "$@"
}

# ensure_slice: makes the slice again where it is gone and --recreate says how.
ensure_slice() {
  local describe state options queued=()
  describe=(gcloud compute tpus tpu-vm describe "$name" --zone="$zone" ${project:+--project="$project"}
    "--format=value(state)")
  if $dry_run; then
    show "${describe[@]}"
    [[ -n $recreate ]] || return 0
    echo "# unless that says READY:"
  else
    state=$("${describe[@]}") || state=MISSING
    [[ $state == READY ]] && return
    [[ -n $recreate ]] || die "TPU $name in $zone is $state: make it with launch/tpu_vm.sh, or give --recreate"
    say "TPU $name is $state: making it again"
  fi
  read -ra options <<<"$recreate"
  if [[ " $recreate " == *" --queued "* ]]; then queued=(--queued); fi
  slice delete "${queued[@]}" || say "nothing to delete"
  slice create "${options[@]}" || return 1 # whatever went wrong may go right the next time
  if ((${#queued[@]})); then slice wait || return 1; fi
  slice install || return 1
}

attempt() {
  local folder=$logs/$1 command
  # In a subshell: where `die` is called, only the attempt ends, with EXIT_MISTAKE.
  (ensure_slice) || return
  run mkdir -p "$folder"
  printf -v command ' %q' "${arguments[@]}"
  in_background "$folder/gcloud.out" "${ssh[@]}" --output-directory="$folder" \
    --command="cd florence_jax && bash launch/worker.sh --pid-file=$PID_FILE$command"
  $dry_run || say "output of worker N in $folder/N.log"
  collect "$folder"
}

stop() {
  stopping=true
  say "asking every worker to save and stop"
  "${ssh[@]}" --command="cd florence_jax && bash launch/worker.sh --pid-file=$PID_FILE --stop" || true
}

main() {
  local option
  [[ ${1:-} == -h || ${1:-} == --help ]] && { usage launch/run_pod.sh; exit; }
  while (($#)); do
    option=$1
    shift
    case $option in
      --name=*) name=${option#*=} ;;
      --zone=*) zone=${option#*=} ;;
      --project=*) project=${option#*=} ;;
      --logs=*) logs=${option#*=} ;;
      --recreate=*) recreate=${option#*=} ;;
      --) break ;;
      *) common_option "$option" || die "unknown option $option; options of the training come after --" ;;
    esac
  done
  [[ -n $name && -n $zone ]] || die "give --name=NAME and --zone=ZONE"
  (($#)) || die "give the training's own options after --, for example -- --config=configs/pretrain.py:variant=H"
  arguments=("$@" --config.distributed=True)
  logs=${logs:-logs/$name}
  ssh=(gcloud compute tpus tpu-vm ssh "$name" --zone="$zone" ${project:+--project="$project"} --worker=all
    "--ssh-flag=-o ServerAliveInterval=30")
  trap stop INT TERM
  restart_until_done attempt
}

main "$@"
