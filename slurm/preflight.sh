#!/bin/bash
# Each node is looked at before anything is loaded on it: one task on each, in one step of srun.

# Queue the job again without the nodes that were refused.
queue_without() { # nodes...
  local excluded
  echo "$*" >>"$excluded_before"
  excluded=$(scontrol show job -o "$POSTTRAIN_JOB" | sed -n 's/.* ExcNodeList=\([^ ]*\) .*/\1/p')
  case $excluded in '' | '(null)') excluded= ;; *) excluded=$excluded, ;; esac
  excluded=$excluded$(IFS=, && echo "$*")
  log "back into the queue without $*"
  # Only a job that waits can be changed, and a requeue ends this script: not before that is done,
  # nor later than Slurm ends it, or the job that waits may be taken for one that failed.
  ended=0
  trap 'ended=1' TERM
  (
    trap '' TERM # which a requeue sends to every process of the job, scontrol's too
    scontrol requeue "$POSTTRAIN_JOB" || exit 1
    for _ in $(seq 10); do
      scontrol update "JobId=$POSTTRAIN_JOB" "ExcNodeList=$excluded" && exit
      sleep 0.5
    done
    scontrol hold "$POSTTRAIN_JOB" # else it may come to the same node again
  ) || exit 1
  for _ in $(seq 60); do
    [ $ended = 0 ] || break
    sleep 1
  done
  exit 75
}

if [ "$POSTTRAIN_PREFLIGHT" = 1 ]; then
  export POSTTRAIN_HEAD_ADDRESS POSTTRAIN_NODES="${nodes[*]}"
  POSTTRAIN_HEAD_ADDRESS=$(own_address)
  preflight_log=$POSTTRAIN_RUN/logs/nodes/preflight-$SLURM_JOB_ID.log
  excluded_before=$POSTTRAIN_RUN/logs/nodes/excluded-$SLURM_JOB_ID.txt
  mkdir -p "$POSTTRAIN_RUN/logs/nodes"
  touch "$excluded_before"
  # shellcheck disable=SC2016  # expanded on the nodes
  check_node='
    python3 -m posttrain_launch.preflight.node_check "$POSTTRAIN_RUN"
    code=$?
    [ $code -le 1 ] || echo "preflight: error: $SLURMD_NODENAME: the check ended with exit code" \
      "$code; fix: see logs/nodes; or leave the node out: cluster.exclude=[$SLURMD_NODENAME]"
    exit $code'
  # The step ends by itself; where srun itself hangs, a little later.
  timeout --kill-after=10 $((POSTTRAIN_PREFLIGHT_DEADLINE + 30)) \
    srun "${srun_options[@]}" --overlap --kill-on-bad-exit=1 --unbuffered \
    "${wrap[@]}" bash -c "$check_node" >"$preflight_log" 2>&1
  preflight_code=$?
  grep '^preflight: ' "$preflight_log" | while read -r line; do log "$line"; done
  if [ $preflight_code != 0 ]; then
    mapfile -t bad_nodes < <(sed -n 's/^preflight: error: \([^:]*\): .*/\1/p' "$preflight_log" | sort -u)
    if [ ${#bad_nodes[@]} = 0 ]; then
      [ $preflight_code -lt 124 ] || log "error: preflight did not end in time"
      tail -n 20 "$preflight_log"
      log "error: preflight failed with exit code $preflight_code; fix: see $preflight_log, or" \
        "leave it out with cluster.preflight=false"
    elif [ "$POSTTRAIN_EXCLUDE_BAD_NODES" = 1 ] && [ ${#bad_nodes[@]} -lt ${#nodes[@]} ] &&
      [ "$(wc -l <"$excluded_before")" -lt 3 ]; then # three times, not for ever
      queue_without "${bad_nodes[@]}"
    fi
    rm -f "$RAY_AUTH_TOKEN_PATH"
    exit 1
  fi
fi
