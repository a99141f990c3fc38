#!/usr/bin/env bash
# Several machines that this one reaches by ssh, through deepspeed and pdsh.
#   [HOSTFILE=hostfile] [DRY_RUN=1] launch/hostfile.sh CONFIG [key=value ...]
# HOSTFILE has a line `host slots=N` for each machine; # starts a comment. Every machine needs this
# folder and this environment under the same paths, and run.dir and the models on a shared disk.
#   MASTER_ADDR  address of the first machine, as the others reach it (default: its name)
#   SSH_PORT     port of sshd, if not 22
#   SSH_ARGS     more for ssh, for example "-i /path/key -o StrictHostKeyChecking=no"
. "$(dirname "${BASH_SOURCE[0]}")/env.sh"
[ $# -gt 0 ] || usage "launch/hostfile.sh CONFIG [key=value ...]"

fail() {
  echo "hostfile.sh: error: $*" >&2
  exit 2
}

# DeepSpeed passes over a file that is missing, and trains on this machine alone.
: "${HOSTFILE:=hostfile}"
[ -f "$HOSTFILE" ] || fail "there is no hostfile '$HOSTFILE'; write one, or set HOSTFILE."
lines=$(tr -d '\r' <"$HOSTFILE" | sed 's/#.*//; s/[[:space:]]*$//' | grep -v '^$' || true)
[ -n "$lines" ] || fail "'$HOSTFILE' names no host; give lines like: node1 slots=8"
bad=$(grep -Evm1 '^[[:alnum:]_.:-]+[[:space:]]+slots=[1-9][0-9]*$' <<<"$lines" || true)
[ -z "$bad" ] || fail "'$HOSTFILE' has the line '$bad'; give lines like: node1 slots=8"
hosts=$(awk '{print $1}' <<<"$lines")
twice=$(sort <<<"$hosts" | uniq -d | head -n 1)
[ -z "$twice" ] || fail "'$HOSTFILE' names $twice twice; give each host one line."

# DeepSpeed takes the first address of `hostname -I`, which may be of another network.
default MASTER_ADDR "$(head -n 1 <<<"$hosts")"
slots=$(awk 'NR == 1 {sub("slots=", "", $2); print $2}' <<<"$lines")
threads "$slots"

command=("$PYTHON" -m deepspeed.launcher.runner --quiet --hostfile "$HOSTFILE" --launcher pdsh)
command+=(--force_multi --no_ssh_check --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
[ -z "${SSH_PORT:-}" ] || command+=(--ssh_port "$SSH_PORT")
command+=(--module mlkd_dist.distill --command "${COMMAND:-distill}" "$@")
dry "${command[@]}"

command -v pdsh >/dev/null || fail "pdsh is not installed here; install it, or use slurm.sbatch."
# With --no_ssh_check above: DeepSpeed asks the first host only, and waits long.
read -ra ssh_args <<<"${SSH_ARGS:-} -o BatchMode=yes ${SSH_PORT:+-p $SSH_PORT}"
while read -r host; do
  ssh -n -o ConnectTimeout=10 "${ssh_args[@]}" "$host" true ||
    fail "ssh to $host does not work without a password; see the line above."
done <<<"$hosts"

# pdsh carries no environment; DeepSpeed reads what to set on each machine from this file.
environment=$(mktemp)
trap 'rm -f "$environment"' EXIT
for name in "${EXPORTED[@]}" DS_ACCELERATOR HF_HOME HF_TOKEN HF_HUB_OFFLINE; do
  [ -z "${!name:-}" ] || printf '%s=%q\n' "$name" "${!name}" >>"$environment"
done
export DS_ENV_FILE=$environment
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} -o BatchMode=yes ${SSH_ARGS:-}"
"${command[@]}" &
launcher=$!
# The launcher ends what it started on all machines when it is told to.
trap 'kill -TERM "$launcher" 2>/dev/null' TERM INT
code=0
wait "$launcher" || code=$?
# A signal ends the first wait, not the launcher.
while kill -0 "$launcher" 2>/dev/null; do
  code=0
  wait "$launcher" || code=$?
done
exit "$code"
