#!/usr/bin/env bash
# Several machines that this one reaches by ssh, through deepspeed and pdsh.
#   [HOSTFILE=hostfile] [DRY_RUN=1] launch/hostfile.sh CONFIG [key=value ...]
# HOSTFILE has a line `host slots=N` for each machine; # starts a comment. Every machine needs this
# folder and this environment under the same paths, and run.dir and the models on a shared disk.
# TERM, USR1 and Ctrl-C reach the processes on all machines, which save and end with 75.
#   MASTER_ADDR  address of the first machine, as the others reach it (default: its name)
#   SSH_PORT     port of sshd, if not 22
#   SSH_ARGS     more for ssh, for example "-i /path/key -o StrictHostKeyChecking=no"
#   GRACE        seconds that the other machines have to end when one has failed (30)
here=$(dirname "${BASH_SOURCE[0]}")
. "$here/env.sh"
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
mapfile -t hosts < <(awk '{print $1}' <<<"$lines")
twice=$(printf '%s\n' "${hosts[@]}" | sort | uniq -d | head -n 1)
[ -z "$twice" ] || fail "'$HOSTFILE' names $twice twice; give each host one line."

# DeepSpeed takes the first address of `hostname -I`, which may be of another network.
default MASTER_ADDR "${hosts[0]}"
slots=$(awk 'NR == 1 {sub("slots=", "", $2); print $2}' <<<"$lines")
threads "$slots"

# What follows is read by pdsh, which takes % for its own, and by the shell of each machine. Words
# with spaces DeepSpeed puts into double quotes, where it escapes the quotes and nothing else.
quoted() { # WORD
  local word=${1//%/%%}
  if [[ $word == *" "* ]]; then
    printf '%s\n' "$word" | sed 's/[\\$`]/\\&/g'
  else
    printf '%q\n' "$word"
  fi
}
words=()
for word in "$@"; do words+=("$(quoted "$word")"); done

command=("$PYTHON" -m deepspeed.launcher.runner --quiet --hostfile "$HOSTFILE" --launcher pdsh)
command+=(--force_multi --no_ssh_check --master_addr "$MASTER_ADDR" --master_port "$MASTER_PORT")
[ -z "${SSH_PORT:-}" ] || command+=(--ssh_port "$SSH_PORT")
command+=(--module mlkd_dist.distill --command "${COMMAND:-distill}" "${words[@]}")
dry "${command[@]}"

command -v pdsh >/dev/null || fail "pdsh is not installed here; install it, or use slurm.sbatch."
python=$(command -v "$PYTHON") || fail "there is no '$PYTHON'; set PYTHON."
for path in "$PWD" "$python"; do
  [[ $path =~ ^[[:alnum:]_@%+=:,./-]+$ ]] || fail "DeepSpeed cannot carry the path '$path' over" \
    "ssh, since it holds more than letters, digits and -_./; use a link or another folder."
done

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# A machine that is gone says nothing; ssh else waits for it for ever.
alive=(-o BatchMode=yes -o ServerAliveInterval=10 -o ServerAliveCountMax=3)
read -ra ssh_args <<<"${SSH_ARGS:-} ${SSH_PORT:+-p $SSH_PORT}"
ssh_args+=("${alive[@]}" -o ConnectTimeout=10)

everywhere() { # NAME WORD...: a script of remote/ on all machines at once, its word and code in files
  local script=$1 host ends=()
  shift
  for host in "${hosts[@]}"; do
    {
      code=0
      # shellcheck disable=SC2029 # these words are meant to be those of here
      ssh -o ConnectionAttempts="${attempts:-1}" "${ssh_args[@]}" "$host" \
        "sh -s $(printf '%q ' "$host" "$@")" <"$here/remote/$script" \
        >"$work/$host.said" 2>&1 || code=$?
      echo "$code" >"$work/$host.code"
    } &
    ends+=($!)
  done
  wait "${ends[@]}" || true
}

# DeepSpeed asks the first host only, and waits long. A network that has just come back may need a
# second try.
attempts=3 everywhere check.sh "$PWD" "${PYTHONPATH:-}" "$python" "$MASTER_ADDR" "$MASTER_PORT" \
  "${hosts[0]}"
for host in "${hosts[@]}"; do
  why=$(tail -n 1 "$work/$host.said" | tr -d '\r')
  case $(<"$work/$host.code") in
    0) ;;
    255) fail "ssh to $host does not work, or asks for a password: $why" ;;
    *) fail "$host $why" ;;
  esac
done

# pdsh carries no environment; DeepSpeed reads what to set on each machine from this file, and puts
# what needs it into double quotes, in which it escapes nothing.
[ -z "${HF_TOKEN:-}" ] || echo "hostfile.sh: HF_TOKEN stays here: as part of a command all users of" \
  "the machines could read it; 'hf auth login' keeps it in a file of HF_HOME." >&2
names='^(NCCL_|GLOO_|TORCH_|CUDA_|HF_|MLKD_|OMP_|DS_ACCELERATOR$)'
for name in $({ compgen -e | grep -E "$names"; printf '%s\n' "${EXPORTED[@]}"; } |
  grep -vxE 'HF_TOKEN|CUDA_VISIBLE_DEVICES' | sort -u); do
  [ -z "${!name:-}" ] || [[ ${!name} == *$'\n'* ]] || printf '%s=%s\n' "$name" "${!name}"
done | sed 's/[\\"$`]/\\&/g; s/%/%%/g' >"$work/environment"
# Last, so that these count: the person's own, which DeepSpeed would else read.
for file in "${DS_ENV_FILE:-$HOME/.deepspeed_env}" .deepspeed_env; do
  [ ! -f "$file" ] || grep '=' "$file" >>"$work/environment" || true
done
# By this the job's processes are known. Not those of here, which are to tell them something.
job=$(hostname)-$$-$(date +%s)
echo "MLKD_JOB=$job" >>"$work/environment"
export DS_ENV_FILE=$work/environment
export PDSH_SSH_ARGS_APPEND="${PDSH_SSH_ARGS_APPEND:-} ${alive[*]} ${SSH_ARGS:-}"

# DeepSpeed answers a signal by ending whatever is named like it on all machines, of other jobs too,
# and pdsh waits for all machines when one has failed. So the signals go from here to the processes
# of this job, and pdsh's word on a machine that has ended badly is heard here.
: >"$work/ended"
said='^pdsh@[^ ]*: \([^ ]*\): ssh exited with exit code \([0-9]*\).*$'
setsid "${command[@]}" 2> >(sed -u -e "/$said/{s//\\1 \\2/w $work/ended" -e 'd}' >&2) &
launcher=$!

tell() { # SIGNAL
  everywhere tell.sh "$job" "$1"
}

end() { # at once
  tell KILL
  kill -KILL -- "-$launcher" 2>/dev/null || true
}

asked_at='' early=''
# shellcheck disable=SC2329 # by a trap
stop() {
  # Schedulers and terminals send the same signal several times.
  if [ -z "$asked_at" ]; then
    asked_at=$SECONDS
    tell USR1
    # Before there are any processes nothing is there to save.
    grep -q told "$work"/*.said || { early=75 && end; }
  elif [ $((SECONDS - asked_at)) -gt 3 ]; then
    end
  fi
}
trap stop TERM INT USR1 HUP

deadline=
while kill -0 "$launcher" 2>/dev/null; do
  # In the background, so that a signal is passed on at once.
  sleep 1 &
  wait $! || true
  if [ -z "$deadline" ] && [ -s "$work/ended" ]; then
    read -r host code <"$work/ended"
    # With 75 they all were asked to stop, and are saving.
    deadline=$((SECONDS + ${GRACE:-30} + (code == 75 ? 270 : 0)))
  elif [ -n "$deadline" ] && [ "$SECONDS" -ge "$deadline" ]; then
    echo "hostfile.sh: error: $host ended with $code and the others did not; all are ended." >&2
    deadline=$((SECONDS + 1000000))
    end
  fi
done
code=0
wait "$launcher" || code=$?
# Of a machine that has failed, not of those that were ended for it.
[ ! -s "$work/ended" ] || read -r host code <"$work/ended"
if [ "$code" -ne 0 ]; then
  [ "$code" -ne 255 ] || echo "hostfile.sh: error: the connection to $host broke off." >&2
  tell KILL
fi
code=${early:-$code}
exit "$code"
