#!/bin/bash
# What this site wants before anything of ours runs. The first of the parts of a job script, in this
# order: site.sh, environment.sh, preflight.sh, ray_steps.sh, life_cycle.sh; `posttrain submit`
# writes them below the #SBATCH lines and:
#   POSTTRAIN_RUN                 run folder
#   POSTTRAIN_BIN                 folder of `posttrain` and `ray`; empty in a container
#   POSTTRAIN_INTERFACE           network interface of gloo and NCCL, may be empty
#   POSTTRAIN_PREFLIGHT           1: look at every node before anything is loaded on it
#   POSTTRAIN_PREFLIGHT_DEADLINE  seconds that site.sh may take, and then preflight.sh
#   POSTTRAIN_EXCLUDE_BAD_NODES   1: queue again without the nodes that preflight.sh refuses
#   POSTTRAIN_START_DEADLINE_S    seconds until Ray must have all nodes
#   site_modules, site_setup      arrays: names for `module load`; lines of shell
#   srun_options, wrap            arrays: options of every srun; a command that every process is
#                                 run by

log() { echo "[$(date +%T)] $*"; }
refuse() { # what is wrong; how to fix it
  log "error: $1 (on $(hostname))"
  log "  fix: $2"
  exit 1
}

# As Slurm's commands have it: of the last task of an array, SLURM_JOB_ID means all of them.
export POSTTRAIN_JOB=${POSTTRAIN_JOB:-$SLURM_JOB_ID}

mkdir -p "$POSTTRAIN_RUN/ray" "$POSTTRAIN_RUN/logs" 2>/dev/null
(: >"$POSTTRAIN_RUN/ray/.written-$SLURM_JOB_ID") 2>/dev/null || refuse \
  "the run folder cannot be written: $POSTTRAIN_RUN" \
  "set output_root to a folder on storage that all nodes share, with space left"
rm -f "$POSTTRAIN_RUN/ray/.written-$SLURM_JOB_ID"

# A module or a setup line may wait for a file system that does not answer.
(
  # Short ones: what is left of this when it is ended must not hold the log open.
  for ((i = 0; i < POSTTRAIN_PREFLIGHT_DEADLINE; i++)); do sleep 1 >/dev/null 2>&1; done
  log "error: cluster.modules and cluster.setup took over $POSTTRAIN_PREFLIGHT_DEADLINE s (on $(hostname))"
  log "  fix: look at the last of them that is logged, or raise cluster.preflight_deadline_s"
  kill -TERM $$
) &
site_watch=$!
trap 'kill -TERM "$site_watch" 2>/dev/null' EXIT

find_module_command() { # a job's shell is no login shell
  local file
  for file in /etc/profile.d/lmod.sh /etc/profile.d/modules.sh /usr/share/lmod/lmod/init/bash \
    /usr/share/modules/init/bash; do
    ! type module >/dev/null 2>&1 || return 0
    # shellcheck disable=SC1090  # of the site
    [ ! -r "$file" ] || . "$file"
  done
  type module >/dev/null 2>&1
}
if [ ${#site_modules[@]} -gt 0 ]; then
  find_module_command || refuse "cluster.modules is set, and there is no command \`module\`" \
    "write into cluster.setup how this site's modules are begun, such as: source /opt/lmod/init/bash"
  for site_module in "${site_modules[@]}"; do
    log "module load $site_module"
    module load "$site_module" || refuse "the module $site_module of cluster.modules cannot be loaded" \
      "see \`module avail\` on a node: srun --nodes=1 bash -lc 'module avail'"
  done
fi
for site_line in "${site_setup[@]}"; do
  log "setup: $site_line"
  eval "$site_line" || refuse "a line of cluster.setup failed with exit code $?: $site_line" \
    "try it on a node: srun --nodes=1 --pty bash"
done
trap - EXIT
kill -TERM "$site_watch" 2>/dev/null
wait "$site_watch" 2>/dev/null

# Steps inherit the environment, also where the site's sbatch hands over none.
export SLURM_EXPORT_ENV=ALL
if [ -x "$POSTTRAIN_BIN/posttrain" ]; then
  PATH=$POSTTRAIN_BIN:$PATH
elif [ -n "$POSTTRAIN_BIN" ] && ! command -v posttrain >/dev/null; then
  refuse "posttrain is not on this node: there is no $POSTTRAIN_BIN, and no other on the PATH" \
    "install it on storage that all nodes share, or name its environment in cluster.setup"
fi
