#!/bin/bash
# One step in the background starts Ray (head on the first node, one worker on each other node); a
# second step runs the driver, `posttrain run`, on the first node.

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
srun "${srun_options[@]}" --overlap --kill-on-bad-exit=1 --output="logs/ray-$SLURM_JOB_ID-%N.log" --open-mode=append \
  "${wrap[@]}" bash -c "$start_ray" &
ray=$!
srun "${srun_options[@]}" --overlap --nodes=1 --ntasks=1 --nodelist="$POSTTRAIN_HEAD" \
  "${wrap[@]}" posttrain run "$POSTTRAIN_RUN" --address "$RAY_ADDRESS" &
driver=$!
