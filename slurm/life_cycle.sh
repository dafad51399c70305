#!/bin/bash
# Wait, and pass on what Slurm says. The job has succeeded when the run folder holds FINISHED, and
# only then.

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

# The end.
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
