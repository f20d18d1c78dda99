#!/usr/bin/env bash
# run.sh [--processes N] [--retries N] SCRIPT.py ARGS | run.sh [...] -m MODULE ARGS
#
# Runs Python with what bmft needs. The first use builds .venv, with the JAX for this machine; a
# change of a requirements file builds it anew. PYTHON names the Python to build it with.
#
# It starts one process. On a TPU slice, or under SLURM or MPI, that is one of those of the
# same run: call it once per host (SLURM, MPI: once per task). --processes N starts N on this
# machine's CPU instead. --retries N starts again, N times at most, what ended with status 75.
set -euo pipefail

root=$(CDPATH='' cd -- "$(dirname -- "${BASH_SOURCE[0]}")" && pwd -P)
venv=$root/.venv
usage='usage: run.sh [--processes N] [--retries N] SCRIPT.py ARGS | run.sh [...] -m MODULE ARGS'

say() { printf 'run.sh: %s\n' "$1" >&2; }
fail() { printf 'error: %s\n' "$1" >&2 && exit "$2"; }

find_python() {
  local python candidates=(python3.13 python3.12 python3.11 python3)
  [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
  for python in "${candidates[@]}"; do
    "$python" -I -c 'import sys, ensurepip, venv
sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null || continue
    printf '%s\n' "$python"
    return
  done
  fail "no Python 3.11 to 3.13 with venv under the names ${candidates[*]}: set PYTHON to one" 2
}

has_tpu() {
  [ -z "$(compgen -G '/dev/accel[0-9]*')" ] || return 0
  [ -n "$(compgen -G '/dev/vfio/[0-9]*')" ] || return 1
  # vfio hands on any device: look for a TPU's settings, or its PCI ids (those jax knows)
  [ -n "${TPU_NAME:-}${TPU_ACCELERATOR_TYPE:-}${TPU_WORKER_ID:-}" ] ||
    grep -qsE '^PCI_ID=1AE0:00(27|56|5E|62|63|6F|76)$' /sys/bus/pci/devices/*/uevent
}

find_build() { # which JAX: cpu, cuda12, cuda13 or tpu
  local driver
  driver=$({ nvidia-smi | sed -nE 's/.*CUDA [A-Za-z ]*Version: *([0-9]+).*/\1/p'; } 2>/dev/null) ||
    driver='' # no such command, or no card
  case $driver in
    '') if has_tpu; then echo tpu; else echo cpu; fi ;;
    [0-9] | 1[01]) say "JAX needs a driver for CUDA 12, not $driver: using the CPU" && echo cpu ;;
    12) echo cuda12 ;;
    *) echo cuda13 ;;
  esac
}

# current STAMP TEXT: does .venv's file STAMP say TEXT, the checksum of what was installed?
current() { [ -x "$venv/bin/python" ] && [ "$(cat "$venv/$1" 2>/dev/null)" = "$2" ]; }
is_ready() { current stamp "$needs" && { [ -z "$dev_needs" ] || current stamp-dev "$dev_needs"; }; }

install() { # STAMP TEXT FILE...
  local stamp=$1 content=$2 file arguments=()
  shift 2
  say "installing $*"
  for file in "$@"; do arguments+=(-r "$root/$file"); done
  "$venv/bin/python" -I -m pip install -qq --disable-pip-version-check "${arguments[@]}" >&2 ||
    fail "pip could not install $*" 1
  printf '%s\n' "$content" >"$venv/$stamp" # last: an interrupted build begins anew
}

build_venv() {
  local python
  python=$(find_python) || exit
  say "building .venv: $("$python" --version), JAX for $build; takes minutes, once"
  rm -f "$venv"/stamp* # first: what is half removed is not ready
  "$python" -I -m venv --clear "$venv" || fail "$python cannot make $venv" 1
  install stamp "$needs" "${files[@]}"
  say "built .venv in $SECONDS s"
}

in_cluster() { # is this process, as far as can be told here, one of several?
  local numbers=${JAX_PROCESS_ID:-}${SLURM_PROCID:-}${OMPI_COMM_WORLD_RANK:-}${PMI_RANK:-}
  [ "$build" = tpu ] || [ -n "$numbers" ]
}

launch=() # options of bmft.launch
while :; do
  case ${1:-} in
    --processes=* | --retries=*) option=${1%%=*} value=${1#*=} && shift ;;
    --processes | --retries)
      option=$1 value=${2:-}
      shift $(($# > 1 ? 2 : 1))
      ;;
    *) break ;;
  esac
  [[ $value =~ ^[0-9]{1,4}$ ]] || fail "$option takes a number, not '$value'; $usage" 2
  launch+=("$option=$value")
done

case ${1:-} in
  -h | --help) echo "$usage" && exit ;;
  -m) [ $# -ge 2 ] || fail "no module; $usage" 2 ;;
  '' | -*) fail "no script; $usage" 2 ;;
  *)
    script=$1
    [ -f "$script" ] || script=$root/$1
    [ -f "$script" ] || fail "no script '$1', neither here nor in $root; $usage" 2
    shift && set -- "$script" "$@"
    ;;
esac

build=$(find_build)
files=(requirements.txt)
[ "$build" = cpu ] || files+=("requirements-$build.txt")
needs="$build $(cd "$root" && cat "${files[@]}" | cksum)"
dev_needs=''
case "$1 ${2:-}" in
  '-m pytest' | '-m ruff') dev_needs=$(cksum <"$root/requirements-dev.txt") ;;
esac

if ! is_ready; then
  exec 9>"$root/.venv.lock" # one at a time
  ! command -v flock >/dev/null || flock -n 9 || { say 'waiting for another run.sh' && flock 9; }
  current stamp "$needs" || build_venv
  is_ready || install stamp-dev "$dev_needs" requirements-dev.txt
  exec 9>&-
fi

export PYTHONPATH=$root${PYTHONPATH:+:$PYTHONPATH}
# A step's arrays come from malloc and go back: in large pages that was 1,800 page faults a step of
# smollm2 instead of 497,000, and 7 % less time of the CPU, turn by turn on two noisy cores (glibc
# 2.35 on; others do not read it).
export GLIBC_TUNABLES=${GLIBC_TUNABLES-glibc.malloc.hugetlb=1}
[ ${#launch[@]} -gt 0 ] || in_cluster || exec "$venv/bin/python" "$@"
exec "$venv/bin/python" -m bmft.launch ${launch[@]+"${launch[@]}"} -- "$@" # signals reach Python, and its exit status is ours
