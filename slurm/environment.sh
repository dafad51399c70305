#!/bin/bash
# What every process of a job shares.
set -u
ulimit -c 0 # a Ray process that is ended may leave a core of 300 MB

export PATH PYTHONUNBUFFERED=1 NO_COLOR=1
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
[ ${#POSTTRAIN_TEMP} -le 38 ] || POSTTRAIN_TEMP=/tmp/ray-$SLURM_JOB_ID
export POSTTRAIN_TEMP
# What is compiled while a run goes on: on the node, for the locks of network file systems are slow,
# and below a folder that only we can write to.
export TRITON_CACHE_DIR=${TRITON_CACHE_DIR:-$POSTTRAIN_TEMP/triton}
export TORCHINDUCTOR_CACHE_DIR=${TORCHINDUCTOR_CACHE_DIR:-$POSTTRAIN_TEMP/inductor}
export TORCH_EXTENSIONS_DIR=${TORCH_EXTENSIONS_DIR:-$POSTTRAIN_TEMP/extensions}
# A rank that dies ends the collectives of the others, which would wait for half an hour.
export TORCH_NCCL_ASYNC_ERROR_HANDLING=1 NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# This script runs on the first node. An address, not a name: gRPC has a resolver of its own, which
# does not always find what the system finds.
# shellcheck disable=SC2317  # called on the nodes
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
export POSTTRAIN_HEAD=${nodes[0]}
log "job $SLURM_JOB_ID, start ${SLURM_RESTART_COUNT:-0}, nodes ${nodes[*]}"
