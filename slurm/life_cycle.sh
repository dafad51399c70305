#!/bin/bash
# Wait, and pass on what Slurm says. The job has succeeded when the run folder holds FINISHED, and
# only then. What follows from an end is decided by posttrain_launch.lifecycle; docs/slurm.md has the
# table.

# USR1: the time limit is near (the driver knows by itself, and this comes if it does not). srun
# hands USR1 on to the driver, which saves and ends; of a TERM it would make a KILL.
# TERM: Slurm ends the job now, to cancel it or to queue it again; srun has had it too.
signal=none
trap 'log "USR1: the time limit is near"; signal=USR1; kill -USR1 $driver' USR1
trap 'log "TERM: Slurm ends the job"; signal=TERM' TERM

ended=
while :; do # a signal that is trapped ends `wait` too
  wait -n -p ended "$driver" "$ray"
  code=$?
  [ -z "${ended:-}" ] || break
done
ray_ended=()
if [ "$ended" = "$ray" ]; then
  log "Ray ended first, with exit code $code: see logs/ray-$SLURM_JOB_ID-*.log"
  ray_ended=(--ray-ended)
  kill -TERM "$driver" 2>/dev/null
  wait "$driver"
  code=$?
fi
kill "$clock" 2>/dev/null

# What now? One line, ACTION CODE; where Python cannot run any more, what the driver's code says.
ask=("${wrap[@]}" python3 -P -m posttrain_launch.lifecycle.after "$POSTTRAIN_RUN" --code "$code"
  --signal "$signal" "${ray_ended[@]}" --state "$(scontrol show job -o "$POSTTRAIN_JOB" 2>/dev/null)")
if [ ${#srun_options[@]} -gt 0 ]; then
  ask=(srun "${srun_options[@]}" --overlap --nodes=1 --ntasks=1 --nodelist="$POSTTRAIN_HEAD" "${ask[@]}")
fi
reason=$(mktemp)
if ! read -r action job_code < <("${ask[@]}" 2>"$reason"); then
  cat "$reason"
  action=end job_code=$code
  case $code in 75 | 85) action=requeue ;; esac
fi
log "driver ended with exit code $code: $(tail -n 1 "$reason"); $action"
rm -f "$reason"

# End Ray, and keep its logs. TERM of an srun is KILL for its step, on each node that still answers.
kill -TERM "$ray" 2>/dev/null
wait "$ray" 2>/dev/null
# shellcheck disable=SC2016  # expanded on the nodes
timeout 30 srun --overlap --output=/dev/null bash -c '
  logs=$POSTTRAIN_RUN/ray/logs-$SLURMD_NODENAME
  rm -rf "$logs" && cp -rL "$POSTTRAIN_TEMP/r/session_latest/logs" "$logs"
  rm -rf "$POSTTRAIN_TEMP"'
rm -f "$RAY_AUTH_TOKEN_PATH" "$POSTTRAIN_HEAD_FILE" "$POSTTRAIN_DEADLINE_FILE"

# Until Slurm ends this script, or for so many seconds; whether it does.
ended_by_slurm() {
  for _ in $(seq "$1"); do
    [ $signal != TERM ] || return 0
    sleep 1
  done
  return 1
}
if [ "$action" = wait ]; then
  # Slurm queues a preempted job again only if the script is still there when its grace time ends;
  # then TERM comes. If it does not come at all, the preemption was called off.
  if ! ended_by_slurm 600; then
    log "Slurm has not ended the job within 600 s: back into the queue"
    action=requeue
  fi
fi
if [ "$action" = requeue ]; then
  # Refused where Slurm has queued the job already: it is started once. A script that leaves before
  # Slurm ends it may be taken for the end of the job that waits: FAILED.
  # It sends TERM to every process of the job, scontrol's too.
  (trap '' TERM && scontrol requeue "$POSTTRAIN_JOB") && ended_by_slurm 60
fi
exit "$job_code"
