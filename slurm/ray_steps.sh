#!/bin/bash
# One step in the background starts Ray (head on the first node, one worker on each other node); a
# second step runs the driver, `posttrain run`, on the first node.

export POSTTRAIN_NODES="${nodes[*]}"
# The head writes its address here once it has found a port that nobody else on its node uses. The
# file is there from the beginning: a network file system may remember for half a minute that a
# name was not there.
export POSTTRAIN_HEAD_FILE=$POSTTRAIN_RUN/ray/head-$SLURM_JOB_ID
: >"$POSTTRAIN_HEAD_FILE"

# When this job ends, for the driver, which stops the run in time: read once a minute, because
# an administrator may change the limit.
export POSTTRAIN_DEADLINE_FILE=$POSTTRAIN_RUN/ray/end-$SLURM_JOB_ID
write_end() {
  local end
  end=$(squeue -h -j "$POSTTRAIN_JOB" -o %e 2>/dev/null) # NONE without a limit
  end=$(date -d "$end" +%s 2>/dev/null) && echo "$end" >"$POSTTRAIN_DEADLINE_FILE"
}
write_end
# A `read` that waits in vain, for a `sleep` would live on when this is ended.
while ! read -rt 60 <> <(:); do write_end; done >/dev/null 2>&1 &
clock=$!

# shellcheck disable=SC2016  # expanded on the nodes
start_ray='
  # Preemption sends TERM to every process of the steps at the beginning of its grace time. Blocked
  # here, and so in all that Ray starts, it leaves the driver, which has it too, time to save. The
  # step still ends by KILL.
  block=(python3 -c "import os, signal, sys
signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
os.execvp(sys.argv[1], sys.argv[1:])")
  (umask 077 && mkdir -p "$POSTTRAIN_TEMP") # Ray opens what it makes in it to everybody
  common=(--num-cpus="$SLURM_CPUS_PER_TASK" --num-gpus="${SLURM_GPUS_ON_NODE:-0}"
    --labels="posttrain-node=$SLURMD_NODENAME" --node-ip-address="$(own_address)"
    --min-worker-port=0 --max-worker-port=0 # any that are free, not those of every Ray
    --object-store-memory=200000000 --disable-usage-stats --block)
  free_port() { # others may be on this node: jobs of Slurm, and other Rays
    local port
    for port in $(seq $((20000 + SLURM_JOB_ID % 9000)) 29999); do
      (exec 3<>"/dev/tcp/$1/$port") 2>/dev/null || { echo "$port"; return; }
    done
  }
  if [ "$SLURMD_NODENAME" = "$POSTTRAIN_HEAD" ]; then
    address=$(own_address)
    port=$(free_port "$address")
    echo "$address:$port" >"$POSTTRAIN_HEAD_FILE"
    exec "${block[@]}" ray start --head --port="$port" --include-dashboard=false \
      --temp-dir="$POSTTRAIN_TEMP/r" "${common[@]}"
  fi
  for _ in $(seq $((2 * POSTTRAIN_START_DEADLINE_S))); do # `ray start` does not wait for the head
    read -r head <"$POSTTRAIN_HEAD_FILE" && (exec 3<>"/dev/tcp/${head/:/\/}") 2>/dev/null && break
    sleep 0.5
  done
  exec "${block[@]}" ray start --address="$head" "${common[@]}"
'
srun "${srun_options[@]}" --overlap --kill-on-bad-exit=1 --output="logs/ray-$SLURM_JOB_ID-%N.log" \
  --open-mode=append "${wrap[@]}" bash -c "$start_ray" &
ray=$!
RAY_ADDRESS=
for _ in $(seq $((10 * POSTTRAIN_START_DEADLINE_S))); do
  read -r RAY_ADDRESS <"$POSTTRAIN_HEAD_FILE" && break
  kill -0 "$ray" 2>/dev/null || break
  sleep 0.1
done
export RAY_ADDRESS
log "Ray at $RAY_ADDRESS"
srun "${srun_options[@]}" --overlap --nodes=1 --ntasks=1 --nodelist="$POSTTRAIN_HEAD" \
  "${wrap[@]}" posttrain run "$POSTTRAIN_RUN" --address "$RAY_ADDRESS" &
driver=$!
