#!/usr/bin/env bash
# Makes a TPU slice, installs this checkout on all of its machines, and gives it back.
#
#   launch/tpu_vm.sh create  --name=NAME --zone=ZONE (--topology=v5p:4x8x8 | --type=v5p-512) [--spot] [--queued]
#   launch/tpu_vm.sh wait    --name=NAME --zone=ZONE                 until the slice can be used (after --queued)
#   launch/tpu_vm.sh install --name=NAME --zone=ZONE                 the committed state of this checkout, in ~/florence_jax
#   launch/tpu_vm.sh status  --name=NAME --zone=ZONE [--queued]
#   launch/tpu_vm.sh delete  --name=NAME --zone=ZONE [--queued]
#
# Options:
#   --topology=KIND:SHAPE  in chips, written as for florence_jax.tools.aot_compile; KIND is v4, v5e, v5p or v6e
#   --type=TYPE            instead: Google's accelerator type (v4-N and v5p-N count cores, two a chip)
#   --spot                 cheaper, and may be taken away at any time; run_pod.sh --recreate gets it back
#   --queued               wait in the queue of queued resources instead of failing where there is no capacity
#   --valid-until=TIME     --queued: give up waiting after this long, for example 6h
#   --version=VERSION      system image; default: the one for the kind
#   --project=PROJECT      default: gcloud's own
#   --python=3.12          Python version to install
#   --poll=SECONDS         `wait`: between two looks (default 60)
#   --dry-run              print the commands instead of running them
#
# Needs gcloud, logged in, with the Cloud TPU API enabled; `install` needs git, and internet access on the machines.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
# shellcheck source=launch/common.sh
source launch/common.sh

name="" zone="" project="" topology="" type="" version="" python=3.12 valid_until="" poll=60
spot=false queued=false

# image KIND: the system image with the drivers of that kind of TPU.
image() {
  case $1 in
    v4) echo tpu-ubuntu2204-base ;;
    v5e | v5litepod) echo v2-alpha-tpuv5-lite ;;
    v5p) echo v2-alpha-tpuv5 ;;
    v6e) echo v2-alpha-tpuv6e ;;
    *) die "unknown TPU kind '$1'; known: v4, v5e, v5p, v6e (others: give --type and --version)" ;;
  esac
}

# tpu GROUP VERB ARGUMENTS...: one gcloud call for the slice.
tpu() {
  local group=$1 verb=$2
  shift 2
  run gcloud compute tpus "$group" "$verb" "$name" --zone="$zone" ${project:+--project="$project"} "$@"
}

create() {
  local kind shape size
  if [[ -n $topology ]]; then
    kind=${topology%%:*} shape=${topology#*:}
    [[ $topology =~ ^[a-z0-9]+:[0-9]+(x[0-9]+)+$ ]] || die "--topology=$topology: write it like v5p:4x8x8"
    size=(--type="${kind/#v5e/v5litepod}" --topology="$shape")
  else
    kind=${type%%-*}
    [[ -n $type ]] || die "create needs --topology=KIND:SHAPE or --type=TYPE"
    size=(--accelerator-type="$type")
  fi
  [[ -n $version ]] || version=$(image "$kind")
  if $spot; then size+=(--spot); fi
  if $queued; then
    tpu queued-resources create --node-id="$name" "${size[@]}" --runtime-version="$version" \
      ${valid_until:+--valid-until-duration="$valid_until"}
  else
    tpu tpu-vm create "${size[@]}" --version="$version"
  fi
}

wait_until_active() {
  local state
  if $dry_run; then
    tpu queued-resources describe --format='value(state.state)'
    return
  fi
  while true; do
    state=$(tpu queued-resources describe --format='value(state.state)')
    case $state in
      ACTIVE) return ;;
      FAILED | SUSPENDING | SUSPENDED) die "queued resource $name is $state; delete it with" \
        "launch/tpu_vm.sh delete --queued --name=$name --zone=$zone and ask again" ;;
    esac
    say "$name is $state; looking again in $poll s"
    sleep "$poll"
  done
}

install() {
  local archive command
  archive=$(mktemp --dry-run --suffix=.tar.gz)
  git diff --quiet HEAD -- || say "uncommitted changes are not installed"
  run git archive --format=tar.gz --output="$archive" HEAD
  tpu_scp "$archive"
  command="set -e; rm -rf florence_jax/florence_jax; mkdir -p florence_jax; tar -xzf florence_jax.tar.gz -C florence_jax;"
  command+=" cd florence_jax; PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install -q --user uv;"
  command+=" ~/.local/bin/uv venv -q --allow-existing --python $python .venv;"
  command+=" ~/.local/bin/uv pip install -q --python .venv/bin/python -e '.[tpu]';"
  command+=" .venv/bin/python -c 'import jax, florence_jax; print(\"florence_jax\", florence_jax.__version__, \"jax\", jax.__version__)'"
  tpu tpu-vm ssh --worker=all --command="$command"
  run rm -f "$archive"
}

# tpu_scp FILE: copies it to the home folder of every machine.
tpu_scp() {
  run gcloud compute tpus tpu-vm scp "$1" "$name:florence_jax.tar.gz" --zone="$zone" \
    ${project:+--project="$project"} --worker=all
}

group() { if $queued; then echo queued-resources; else echo tpu-vm; fi; }

remove() {
  # --force: an active queued resource goes only together with its slice.
  if $queued; then tpu queued-resources delete --quiet --force; else tpu tpu-vm delete --quiet; fi
}

main() {
  local verb=${1:-} option
  [[ $verb == -h || $verb == --help || -z $verb ]] && { usage launch/tpu_vm.sh; exit; }
  shift
  for option in "$@"; do
    case $option in
      --name=*) name=${option#*=} ;;
      --zone=*) zone=${option#*=} ;;
      --project=*) project=${option#*=} ;;
      --topology=*) topology=${option#*=} ;;
      --type=*) type=${option#*=} ;;
      --version=*) version=${option#*=} ;;
      --python=*) python=${option#*=} ;;
      --valid-until=*) valid_until=${option#*=} ;;
      --poll=*) poll=$(number "$option") || exit ;;
      --spot) spot=true ;;
      --queued) queued=true ;;
      *) common_option "$option" || die "unknown option $option; launch/tpu_vm.sh --help lists them" ;;
    esac
  done
  [[ -n $name && -n $zone ]] || die "give --name=NAME and --zone=ZONE"
  case $verb in
    create) create ;;
    wait) wait_until_active ;;
    install) install ;;
    status) tpu "$(group)" describe ;;
    delete) remove ;;
    *) die "unknown command '$verb'; choose create, wait, install, status or delete" ;;
  esac
}

main "$@"
