#!/usr/bin/env bash
# One machine: a process per GPU, or PROCESSES of them.
#   [PROCESSES=2] [COMMAND=distill] [DRY_RUN=1] launch/local.sh CONFIG [key=value ...]
# `mlkd` starts the deepspeed launcher, and its exit code is that of the run.
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -gt 0 ] || usage "launch/local.sh CONFIG [key=value ...]"

count=$(processes)
threads "$count"
command=("$PYTHON" -m mlkd_dist.cli "${COMMAND:-distill}" "$@" "launch.processes=$count")
dry "${command[@]}"
exec "${command[@]}"
