#!/usr/bin/env bash
# The processes of one node, for schedulers that start one task per node: slurm.sbatch (srun), and
# kubernetes/ (Kubeflow's TrainJob, and mpirun). Nothing stands between them and the scheduler: TERM
# and USR1 reach every process, and the exit code is theirs.
#   [DRY_RUN=1] launch/node.sh CONFIG [key=value ...]
# Who this node is, comes from the scheduler; NODES, NODE_RANK, MASTER_ADDR, MASTER_PORT overrule.
#   GRACE        seconds that the others have to end when one has failed (60)
[ -z "${PET_MASTER_PORT:-}" ] || : "${MASTER_PORT:=$PET_MASTER_PORT}"
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -gt 0 ] || usage "launch/node.sh CONFIG [key=value ...]"

nodes=${NODES:-${SLURM_NNODES:-${PET_NNODES:-${OMPI_COMM_WORLD_SIZE:-1}}}}
node=${NODE_RANK:-${SLURM_NODEID:-${PET_NODE_RANK:-${OMPI_COMM_WORLD_RANK:-0}}}}
export MASTER_ADDR=${MASTER_ADDR:-${PET_MASTER_ADDR:-127.0.0.1}}
if [ "$nodes" -gt 1 ] && [ "$MASTER_ADDR" = 127.0.0.1 ]; then
  echo "node.sh: error: $nodes nodes need MASTER_ADDR, the address of the first one." >&2
  exit 2
fi
count=$(processes)
threads "$count"
export WORLD_SIZE=$((nodes * count)) LOCAL_SIZE=$count

command=("$PYTHON" -u -m mlkd_dist.distill --command "${COMMAND:-distill}" "$@")
dry env "MASTER_ADDR=$MASTER_ADDR" "MASTER_PORT=$MASTER_PORT" "WORLD_SIZE=$WORLD_SIZE" \
  "LOCAL_SIZE=$LOCAL_SIZE" "RANK=$((node * count))..$((node * count + count - 1))" "${command[@]}"

children=()
for ((local = 0; local < count; local++)); do
  RANK=$((node * count + local)) LOCAL_RANK=$local "${command[@]}" &
  children+=($!)
done

tell() { [ ${#children[@]} -eq 0 ] || kill -s "$1" "${children[@]}" 2>/dev/null || true; }
trap 'tell TERM' TERM INT
trap 'tell USR1' USR1

# The first one that fails ends the others, which would wait for it in a collective.
worst=0
while [ ${#children[@]} -gt 0 ]; do
  # In the background, so that a signal is passed on at once.
  sleep 0.5 &
  wait $! || true
  running=()
  for child in "${children[@]}"; do
    if kill -0 "$child" 2>/dev/null; then
      running+=("$child")
      continue
    fi
    code=0
    wait "$child" || code=$?
    if [ "$code" -ne 0 ] && [ "$worst" -eq 0 ]; then
      worst=$code
      deadline=$((SECONDS + ${GRACE:-60}))
      # With 75 they all were asked to stop, and are saving.
      [ "$code" -eq 75 ] || tell TERM
    fi
  done
  children=("${running[@]+"${running[@]}"}")
  [ "$worst" -eq 0 ] || [ "$SECONDS" -lt "$deadline" ] || tell KILL
done
exit "$worst"
