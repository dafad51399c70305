#!/bin/bash
# The body of every job that `posttrain submit` writes.
#
# Inside the allocation one step in the background starts Ray (head on the first node, one worker
# on each other node) and a second step runs the driver, `posttrain run`, on the first node.
# The job has succeeded when the run folder holds FINISHED, and only then.
#
# Set above: POSTTRAIN_RUN (run folder), POSTTRAIN_BIN (folder of `posttrain` and `ray`),
# POSTTRAIN_INTERFACE (network interface of gloo and NCCL, may be empty).
set -u
ulimit -c 0 # a Ray process that is ended may leave a core of 300 MB

log() { echo "[$(date +%T)] $*"; }

# --- what every process of the job shares ---------------------------------------------------

export PATH=$POSTTRAIN_BIN:$PATH PYTHONUNBUFFERED=1 NO_COLOR=1
export RAY_USAGE_STATS_ENABLED=0 HF_HUB_DISABLE_TELEMETRY=1 DO_NOT_TRACK=1
export RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 # else each node drains for 30 s at the end
export RAY_prestart_worker_first_driver=0      # Ray Train starts processes of its own
if [ -n "$POSTTRAIN_INTERFACE" ]; then
  export GLOO_SOCKET_IFNAME=$POSTTRAIN_INTERFACE NCCL_SOCKET_IFNAME=$POSTTRAIN_INTERFACE
fi

# Whoever can reach Ray's ports could run code as this user, so Ray asks for a token. All nodes
# must have it, or the workers are refused; a file that only we can read, not a command line.
mkdir -p "$POSTTRAIN_RUN/ray"
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=$POSTTRAIN_RUN/ray/token-$SLURM_JOB_ID
unset RAY_AUTH_TOKEN
rm -f "$RAY_AUTH_TOKEN_PATH"
(umask 077 && od -An -tx1 -N32 /dev/urandom | tr -d ' \n' >"$RAY_AUTH_TOKEN_PATH")

# Ray's sockets: on the node itself, and short (a socket's path has at most 107 bytes).
POSTTRAIN_TEMP=${TMPDIR:-/tmp}/ray-$SLURM_JOB_ID
[ ${#POSTTRAIN_TEMP} -le 40 ] || POSTTRAIN_TEMP=/tmp/ray-$SLURM_JOB_ID
export POSTTRAIN_TEMP

# This script runs on the first node. An address, not a name: gRPC has a resolver of its own, which
# does not always find what the system finds.
own_address() {
  local found
  if [ -n "$POSTTRAIN_INTERFACE" ]; then
    found=$(ip -4 -o addr show dev "$POSTTRAIN_INTERFACE" | sed -n '1s/.* inet \([0-9.]*\).*/\1/p')
  else
    found=$(getent ahostsv4 "$(hostname)" | sed -n '1s/ .*//p')
    case $found in '' | 127.*) found=$(hostname -I | sed 's/ .*//') ;; esac
  fi
  echo "$found"
}
export -f own_address
mapfile -t nodes < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
export POSTTRAIN_HEAD=${nodes[0]} POSTTRAIN_PORT=$((20000 + SLURM_JOB_ID % 10000))
export RAY_ADDRESS
RAY_ADDRESS=$(own_address):$POSTTRAIN_PORT
log "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, nodes ${nodes[*]}, Ray at $RAY_ADDRESS"

# A checkpoint that is newer than this file is one of this start.
started=$POSTTRAIN_RUN/ray/started-$SLURM_JOB_ID
touch "$started"

# --- one step for Ray, one for the driver ---------------------------------------------------

# shellcheck disable=SC2016  # expanded on the nodes
start_ray='
  common=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
    --object-store-memory=200000000 --disable-usage-stats --block --node-ip-address="$(own_address)")
  if [ "$SLURMD_NODENAME" = "$POSTTRAIN_HEAD" ]; then
    exec ray start --head --port="$POSTTRAIN_PORT" --include-dashboard=false \
      --temp-dir="$POSTTRAIN_TEMP" "${common[@]}"
  fi
  for _ in $(seq 240); do # `ray start` does not wait for the head
    (exec 3<>"/dev/tcp/${RAY_ADDRESS/:/\/}") 2>/dev/null && break
    sleep 0.5
  done
  exec ray start --address="$RAY_ADDRESS" "${common[@]}"
'
srun --overlap --kill-on-bad-exit=1 --output="logs/ray-$SLURM_JOB_ID-%N.log" --open-mode=append \
  bash -c "$start_ray" &
ray=$!
srun --overlap --nodes=1 --ntasks=1 --nodelist="$POSTTRAIN_HEAD" \
  posttrain run "$POSTTRAIN_RUN" --address "$RAY_ADDRESS" &
driver=$!

# --- wait, and pass on what Slurm says ------------------------------------------------------

# USR1: the time limit is near. srun hands USR1 on to the driver, which saves and ends; of a TERM
# it would make a KILL.
asked_to_stop=0
trap 'log "USR1: the time limit is near"; asked_to_stop=1; kill -USR1 $driver' USR1
trap 'log "TERM: the job is being ended"; kill -USR1 $driver' TERM

ended=
while :; do # a signal that is trapped ends `wait` too
  wait -n -p ended "$driver" "$ray"
  code=$?
  [ -z "${ended:-}" ] || break
done
if [ "$ended" = "$ray" ]; then
  log "Ray ended first, with exit code $code: see logs/ray-$SLURM_JOB_ID-*.log"
  kill -TERM "$driver" 2>/dev/null
  wait "$driver"
  code=75
fi

# --- the end --------------------------------------------------------------------------------

kill -TERM "$ray" 2>/dev/null
wait "$ray" 2>/dev/null
# shellcheck disable=SC2016  # expanded on the nodes
srun --overlap --output=/dev/null bash -c '
  logs=$POSTTRAIN_RUN/ray/logs-$SLURMD_NODENAME
  rm -rf "$logs" && cp -rL "$POSTTRAIN_TEMP/session_latest/logs" "$logs"
  rm -rf "$POSTTRAIN_TEMP"'
rm -f "$RAY_AUTH_TOKEN_PATH"

if [ -e "$POSTTRAIN_RUN/FINISHED" ]; then
  log "finished"
  exit 0
fi
if [ $asked_to_stop = 1 ]; then
  # Only after progress: a job that saves nothing before its limit would come back for ever.
  saved=$(find "$POSTTRAIN_RUN/checkpoints" -path '*/step-*[0-9]/MANIFEST.json' -newer "$started" \
    -print -quit 2>/dev/null)
  if [ -n "$saved" ]; then
    log "not finished at the time limit, saved $saved: back into the queue"
    scontrol requeue "$SLURM_JOB_ID"
  else
    log "nothing was saved before the time limit, so not queued again: raise cluster.time, set" \
      "train.save_every, or ask for more time to save (--signal at the top of this script)"
  fi
fi
log "not finished; exit code of the driver: $code"
[ "$code" != 0 ] || code=1
exit "$code"
