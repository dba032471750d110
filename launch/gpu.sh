#!/usr/bin/env bash
# Trains on GPUs: this machine, several machines over ssh, or a SLURM cluster; starts again (resuming) after a
# preemption or a crash.
#
#   launch/gpu.sh [options] -- --config=configs/pretrain.py:variant=B                    this machine, all its GPUs
#   launch/gpu.sh --hosts=a,b,c [options] -- --config=... --workdir=/shared/run          several machines
#   launch/gpu.sh --slurm --nodes=4 --gpus=8 [options] -- --config=... --workdir=...     submits a job
#
# What follows -- goes to florence_jax.main in every process. On several machines the workdir, and the checkout at the
# same path, must be seen by all of them. Ctrl-C asks the training to save and stop.
#
# Options:
#   --logs=FOLDER      a folder per attempt, with a file per process, goes here (default logs/gpu)
#   --hosts=A,B        names for ssh, which must need no password; the first also coordinates
#   --port=PORT        of the coordinator, for --hosts (default 8476)
#   --slurm            submit with sbatch: a process per GPU
#   --nodes=N          --slurm: machines (default 1)
#   --gpus=N           --slurm: GPUs of a machine (default 8)
#   --sbatch=OPTION    --slurm: any other option of sbatch, for example --sbatch=--partition=a100; may be repeated
#   --max-restarts=N   start again at most N times (default 100)
#   --delay=SECONDS    before starting again (default 30)
#   --dry-run          print the commands instead of running them
#
# Python is .venv/bin/python of the checkout where there is one, else python3; FLORENCE_JAX_PYTHON names another.
# Exit codes as those of launch/run_pod.sh.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

readonly NOTICE_SECONDS=300 # SLURM sends SIGTERM this long before the time limit: time to save
logs=logs/gpu port=8476 slurm=false in_job=false nodes=1 gpus=8
hosts=() sbatch_options=() arguments=() host_command=()

attempt() {
  local folder=$logs/$1
  run mkdir -p "$folder"
  if $in_job; then
    in_background "$folder/srun.out" srun --kill-on-bad-exit=1 --output="$folder/%t.log" bash launch/worker.sh \
      "${arguments[@]}"
  elif ((${#hosts[@]})); then
    start_on_hosts "$folder"
  else
    in_background "$folder/0.log" bash launch/worker.sh "${arguments[@]}"
  fi
  $dry_run || say "output of process N in $folder/N.log"
  collect "$folder"
}

# on_host I: the ssh command that runs launch/worker.sh on the I-th host, up to its arguments.
on_host() {
  local worker
  printf -v worker 'cd %q && %s bash launch/worker.sh --pid-file=%q' "$PWD" \
    "JAX_COORDINATOR_ADDRESS=${hosts[0]}:$port JAX_NUM_PROCESSES=${#hosts[@]} JAX_PROCESS_ID=$1" \
    "/tmp/florence_jax-${USER:-user}-$port-$1.pid"
  host_command=(ssh -o BatchMode=yes -o ServerAliveInterval=30 "${hosts[$1]}" "$worker")
}

start_on_hosts() {
  local i options
  printf -v options ' %q' "${arguments[@]}"
  for i in "${!hosts[@]}"; do
    on_host "$i"
    in_background "$1/$i.log" "${host_command[@]}" "${options:1}"
  done
}

stop() {
  local i child
  stopping=true
  say "asking the training to save and stop"
  for i in "${!hosts[@]}"; do
    on_host "$i"
    "${host_command[@]}" --stop </dev/null &
  done
  # Said with 0: in a trap a bare return gives the interrupted command's status, and `set -e` would end the script.
  if ((${#hosts[@]})); then return 0; fi
  for child in "${children[@]}"; do kill -TERM "$child" 2>/dev/null || true; done
}

# submit: asks SLURM to run this script again, with --in-job, on the machines it gives.
submit() {
  local command
  printf -v command ' %q' --in-job --logs="$logs" --max-restarts="$max_restarts" --delay="$delay" -- "${arguments[@]}"
  run mkdir -p "$logs"
  run sbatch --job-name=florence_jax --nodes="$nodes" --ntasks-per-node="$gpus" --gpus-per-node="$gpus" --requeue \
    --open-mode=append --signal="TERM@$NOTICE_SECONDS" --chdir="$PWD" --output="$logs/%j.out" "${sbatch_options[@]}" \
    --wrap="bash launch/gpu.sh$command"
}

# work_in_job: a preempted job goes back to the queue, because its machines are about to be taken away.
work_in_job() {
  local code=0
  return_when_preempted=true
  restart_until_done attempt || code=$?
  if ((code == EXIT_PREEMPTED && ${SLURM_RESTART_COUNT:-0} < max_restarts)); then
    say "preempted after saving: back to the queue"
    run scontrol requeue "$SLURM_JOB_ID"
  fi
  return "$code"
}

main() {
  local option
  [[ ${1:-} == -h || ${1:-} == --help ]] && { usage launch/gpu.sh; exit; }
  while (($#)); do
    option=$1
    shift
    case $option in
      --logs=*) logs=${option#*=} ;;
      --hosts=*) IFS=, read -ra hosts <<<"${option#*=}" ;;
      --port=*) port=$(number "$option") || exit ;;
      --slurm) slurm=true ;;
      --in-job) in_job=true ;;
      --nodes=*) nodes=$(number "$option") || exit ;;
      --gpus=*) gpus=$(number "$option") || exit ;;
      --sbatch=*) sbatch_options+=("${option#*=}") ;;
      --) break ;;
      *) common_option "$option" || die "unknown option $option; options of the training come after --" ;;
    esac
  done
  (($#)) || die "give the training's own options after --, for example -- --config=configs/pretrain.py:variant=B"
  if $slurm && ((${#hosts[@]})); then die "--slurm chooses the machines itself: give it or --hosts"; fi
  arguments=("$@")
  if ((${#hosts[@]})) || $slurm; then arguments+=(--config.distributed=True); fi
  if $slurm; then
    submit
    return
  fi
  trap stop INT TERM
  if $in_job; then work_in_job; else restart_until_done attempt; fi
}

main "$@"
