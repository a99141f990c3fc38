#!/bin/sh
# Read by hostfile.sh and run on each machine: a signal to the processes of one job, which have its
# name in their environment: KILL to all of them, others to those that train.
job=$2 signal=$3
has() { # FOLDER OF A PROCESS, START OF AN ENTRY
  tr '\0' '\n' 2>/dev/null <"$1/environ" | grep -q "^$2"
}
for folder in /proc/[0-9]*; do
  has "$folder" "MLKD_JOB=$job\$" || continue
  if [ "$signal" != KILL ]; then
    # Not to the processes that these start to collate their data.
    parent=/proc/$(awk '/^PPid:/ {print $2}' "$folder/status" 2>/dev/null)
    { has "$folder" LOCAL_RANK= && ! has "$parent" LOCAL_RANK=; } || continue
  fi
  kill -s "$signal" "${folder#/proc/}" 2>/dev/null && echo told
done
exit 0
