# shellcheck shell=bash
# Sourced by every script here. Each setting gives way to one that is already in the environment.

set -euo pipefail

# What all of them are called with.
: "${PROCESSES:=}" # per node; empty: one per GPU, or one on a CPU
: "${PYTHON:=python3}"

default() { # NAME VALUE: only where NAME is not set, and for what is started from here
  export "$1=${!1:-$2}"
  EXPORTED+=("$1")
}
EXPORTED=()

# A rank that fails in a collective tells where only if these are on: the stack of each thread, and
# the last collectives of each rank (the flight recorder), written when NCCL's watchdog gives up.
default PYTHONFAULTHANDLER 1
default TORCH_NCCL_TRACE_BUFFER_SIZE 2000
default TORCH_NCCL_DUMP_ON_TIMEOUT 1
# Only what is wrong; INFO writes pages per rank.
default NCCL_DEBUG WARN
# Lines in the order in which they happened; a pipe would else be buffered.
default PYTHONUNBUFFERED 1

# NCCL and gloo each guess a network card, and on hosts with several (or docker0) they guess wrong:
# name it once, for example MLKD_NIC=eth0.
if [ -n "${MLKD_NIC:-}" ]; then
  default NCCL_SOCKET_IFNAME "$MLKD_NIC"
  default GLOO_SOCKET_IFNAME "$MLKD_NIC"
fi

# ZeRO-3 takes and frees layers of many sizes at every step; without segments that grow, the gaps
# between them add up until memory is out.
default PYTORCH_ALLOC_CONF expandable_segments:True

# Tokenizers' threads do not survive the fork of data-loading workers, and warn at each.
default TOKENIZERS_PARALLELISM false

# Compiled kernels go to the node's own disk: hundreds of ranks that lock one shared folder wait for
# one another. Tokenised data goes to a shared one: the first rank writes it and all others read it.
default TRITON_CACHE_DIR "${TMPDIR:-/tmp}/mlkd-${USER:-$(id -un)}/triton"
default TORCH_EXTENSIONS_DIR "${TMPDIR:-/tmp}/mlkd-${USER:-$(id -un)}/extensions"
default MLKD_CACHE "${XDG_CACHE_HOME:-$HOME/.cache}/mlkd_dist"

# A port of its own for each job of a scheduler, so that two jobs can share a node; alone, torch's.
default MASTER_PORT "$([ -n "${SLURM_JOB_ID:-}" ] && echo $((20000 + SLURM_JOB_ID % 20000)) || echo 29500)"

processes() { # per node
  if [ -n "$PROCESSES" ]; then
    echo "$PROCESSES"
  elif command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then
    nvidia-smi -L | wc -l
  else
    echo 1
  fi
}

# A thread per core and rank is what torch takes by itself; together they are slower than one each.
threads() { # PROCESSES
  local cores
  cores=$(nproc)
  default OMP_NUM_THREADS "$((cores > $1 ? cores / $1 : 1))"
}

usage() { # WORD...
  echo "usage: $*" >&2
  exit 2
}

dry() { # COMMAND...: where DRY_RUN=1, say it and end
  [ "${DRY_RUN:-0}" = 1 ] || return 0
  printf '%q ' "$@" | sed 's/ $//'
  echo
  exit 0
}
