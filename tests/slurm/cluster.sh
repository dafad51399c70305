#!/usr/bin/env bash
# A real Slurm of N nodes on this one machine, for the tests. Needs root and Debian's slurm-wlm.
#
#   cluster.sh FOLDER up N        start it; returns when all nodes are idle
#   cluster.sh FOLDER fault NAME [I]
#       power-off I               node I is gone from one moment to the next; ends with `boot I`
#       unplug I, plug I          its network cable
#       kill-slurmd I, start-slurmd I
#       restart-controller        slurmctld ends and comes back
#   cluster.sh FOLDER env         print what a client must export
#   cluster.sh FOLDER login CMD…  run CMD where sbatch and squeue reach the controller
#   cluster.sh FOLDER down        end it, with everything that runs in its nodes
#
# A node is a set of namespaces (network, processes, mounts, host name, shared memory) around one
# slurmd. Nodes and controller meet on a bridge in a network namespace of its own: nothing listens
# on, or travels over, this machine's own network. FOLDER holds all state and should be short and
# on a file system that stays visible in the nodes; FOLDER/tmp is private to each node.
#
# Partitions: main (the default), low (whose jobs `urgent` preempts, after GRACE seconds).
# From the environment of `up`: GRACE (30), SLURMD_TIMEOUT (10 s until a silent node is down).
set -euo pipefail
export PATH=/usr/sbin:/sbin:$PATH

self=$(readlink -f "$0")
state=$(readlink -f "$1")
action=$2
shift 2
name=$(basename "$state" | tr -cd 'a-zA-Z0-9' | tail -c 8)
switch=$name-sw
net=10.231.77
export SLURM_CONF=$state/slurm.conf

# What runs on after `up` holds no file of its caller, such as a lock.
for open in "/proc/$$/fd/"*; do
  open=${open##*/}
  case $open in [0-2] | 255) ;; *) exec {open}>&- ;; esac
done

fail() { echo "cluster.sh: $*" >&2; exit 1; }

within() { # SECONDS COMMAND…: repeat until it succeeds
  local end=$((SECONDS + $1))
  shift
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || return 1
    sleep 0.1
  done
}

# --- processes: known by pid and start time, so that a reused pid is never signalled -----------

birth() { # of a pid, in clock ticks; fails for a process that is gone or a zombie
  local stat
  stat=$(cat "/proc/$1/stat" 2>/dev/null) || return 1
  read -ra stat <<<"${stat##*) }"
  [ "${stat[0]}" != Z ] && echo "${stat[19]}"
}
note() { echo "$1 $(birth "$1")" >>"$state/processes"; }
background() { # LOG COMMAND…
  local log=$state/log/$1
  shift
  setsid "$@" </dev/null >>"$log" 2>&1 &
  note $!
}
lives() { [ "$(birth "$1" || true)" = "$2" ]; }
dead() { ! lives "$@"; }
end_all() { # youngest first: nodes, then the controller, then munged
  local pid born
  [ -e "$state/processes" ] || return 0
  while read -r pid born; do
    lives "$pid" "$born" || continue
    kill -KILL "$pid" 2>/dev/null || true
    within 5 dead "$pid" "$born" || fail "process $pid does not end"
  done < <(tac "$state/processes")
}

# --- configuration ----------------------------------------------------------------------------

write_configuration() { # N
  local n=$1 i
  cat >"$SLURM_CONF" <<END
ClusterName=$name
SlurmctldHost=localhost($net.253)
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket=$state/munge/socket
CredType=cred/munge
StateSaveLocation=$state/controller
SlurmdSpoolDir=$state/spool-%n
SlurmctldPidFile=$state/slurmctld.pid
SlurmdPidFile=$state/slurmd-%n.pid
SlurmctldLogFile=$state/log/slurmctld.log
SlurmdLogFile=$state/log/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=1000
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/none
SlurmdParameters=config_overrides
ReturnToService=2
KillWait=10
SlurmdTimeout=${SLURMD_TIMEOUT:-10}
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
PropagateResourceLimits=NONE
SchedulerParameters=batch_sched_delay=0,sched_interval=2,sched_min_interval=100000
NodeName=node[1-$n] NodeAddr=$net.[1-$n] CPUs=2 RealMemory=8000 State=UNKNOWN
PartitionName=main Nodes=ALL Default=YES MaxTime=60 State=UP PreemptMode=OFF
PartitionName=low Nodes=ALL MaxTime=60 State=UP PriorityTier=1 GraceTime=${GRACE:-30}
PartitionName=urgent Nodes=ALL MaxTime=60 State=UP PriorityTier=10 PreemptMode=OFF
END
  # Named, or slurmd looks for a mounted cgroup file system and ends without one.
  printf 'CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n' >"$state/cgroup.conf"
  {
    echo "127.0.0.1 localhost"
    for ((i = 1; i <= n; i++)); do echo "$net.$i node$i"; done
  } >"$state/hosts"
}

# --- network ----------------------------------------------------------------------------------

make_switch() {
  ip netns add "$switch" || fail "cannot make a network namespace (CAP_SYS_ADMIN, CAP_NET_ADMIN)"
  ip -n "$switch" link set lo up
  ip -n "$switch" link add bridge type bridge forward_delay 0
  ip -n "$switch" addr add "$net.253/24" dev bridge
  ip -n "$switch" link set bridge up
}
plug_in() { # I: a namespace for node I, wired to the bridge
  local space=$name-node$1
  ip netns add "$space"
  ip -n "$switch" link add "port$1" type veth peer name eth0 netns "$space"
  ip -n "$switch" link set "port$1" master bridge up
  ip -n "$space" link set lo up
  ip -n "$space" addr add "$net.$1/24" dev eth0
  ip -n "$space" link set eth0 up
  # Leads nowhere; programs find their own address by asking for the way out.
  ip -n "$space" route add default via "$net.253"
}
in_switch() { nsenter --net="/run/netns/$switch" "$@"; }

# --- a node -----------------------------------------------------------------------------------

start_node() { # I
  plug_in "$1"
  run_node "$1"
}
run_node() { # I
  mkdir -p "$state/spool-node$1"
  rm -f "$state/init-node$1"
  background "node$1.log" nsenter --net="/run/netns/$name-node$1" \
    unshare --mount --pid --uts --ipc --fork --kill-child bash "$self" "$state" inside "$1"
  within 10 test -s "$state/init-node$1" || fail "node$1 does not start: $state/log/node$1.log"
  note "$(cat "$state/init-node$1")"
}
inside() { # I; this is process 1 of the node, and all in it ends with this process
  local outer_pid
  read -r outer_pid _ </proc/self/stat # /proc is still the machine's own
  mount -t proc proc /proc
  hostname "node$1"
  mount --bind "$state/hosts" /etc/hosts
  echo 'nameserver 127.0.0.1' >"$state/resolv.conf" # refuses at once; others are out of reach
  mount --bind "$state/resolv.conf" /etc/resolv.conf
  mount -t tmpfs -o mode=1777 shm /dev/shm
  mount -t tmpfs -o mode=1777 tmp "$state/tmp"
  ulimit -c 0
  echo "$outer_pid" >"$state/init-node$1.new"
  mv "$state/init-node$1.new" "$state/init-node$1"
  run_slurmd "$1" &
  sleep infinity &
  while :; do wait || true; done # also buries orphans
}

run_slurmd() { # I
  env -i PATH="$PATH" HOME=/root LANG=C.UTF-8 SLURM_CONF="$SLURM_CONF" \
    slurmd -D -N "node$1" -f "$SLURM_CONF"
}
in_node() { # I COMMAND…
  local i=$1
  shift
  nsenter --target="$(cat "$state/init-node$i")" --net --mount --pid --uts --ipc "$@"
}

# --- faults -----------------------------------------------------------------------------------

cable() { ip -n "$switch" link set "port$1" "$2"; } # I up|down
power_off() { # I: no connection is closed in good order
  cable "$1" down
  kill -KILL "$(cat "$state/init-node$1")"
}
boot() { # I
  cable "$1" up
  run_node "$1"
}
slurmd_of() { # I: its process id on this machine
  pgrep -f "^slurmd -D -N node$1 -f $SLURM_CONF" | head -n 1
}
start_controller() {
  background slurmctld.out nsenter --net="/run/netns/$switch" slurmctld -D -f "$SLURM_CONF"
  echo "$!" >"$state/controller.pid"
}
restart_controller() {
  kill -KILL "$(cat "$state/controller.pid")"
  sleep 5
  start_controller
  within 30 in_switch sinfo || fail "the controller does not come back: $state/log"
}
fault() { # NAME [I]
  case $1 in
    power-off) power_off "$2" ;;
    boot) boot "$2" ;;
    unplug) cable "$2" down ;;
    plug) cable "$2" up ;;
    kill-slurmd) kill -KILL "$(slurmd_of "$2")" ;;
    start-slurmd) in_node "$2" bash "$self" "$state" slurmd "$2" </dev/null >>"$state/log/node$2.log" 2>&1 & ;;
    restart-controller) restart_controller ;;
    *) fail "unknown fault '$1'" ;;
  esac
}

# --- commands ---------------------------------------------------------------------------------

all_idle() { [ "$(in_switch sinfo -h -N -p main -o %T | grep -cx idle)" = "$1" ]; }

up() { # N
  local n=$1 i
  mkdir -p "$state"/{log,munge,controller,tmp}
  chmod 755 "$state" "$state/munge"
  (umask 077 && head -c 1024 /dev/urandom >"$state/munge.key")
  write_configuration "$n"
  background munged.log munged --foreground --key-file="$state/munge.key" \
    --socket="$state/munge/socket" --pid-file="$state/munge/pid" --seed-file="$state/munge.seed" \
    --log-file="$state/log/munged.log"
  make_switch
  within 10 munge -S "$state/munge/socket" -n || fail "munged does not answer: $state/log"
  start_controller
  for ((i = 1; i <= n; i++)); do start_node "$i"; done
  within 60 all_idle "$n" || fail "nodes are not idle: $(in_switch sinfo -h -N -p main -o "%n %T"); $state/log"
}
down() {
  local space
  end_all
  rm -f "$state/processes"
  for space in $(ip netns list | awk '{print $1}'); do
    case $space in "$switch" | "$name"-node[0-9]*) ip netns del "$space" ;; esac
  done
}

case $action in
  up) up "$1" ;;
  down) down ;;
  env) printf 'export SLURM_CONF=%s TMPDIR=%s\n' "$SLURM_CONF" "$state/tmp" ;;
  login) in_switch "$@" ;;
  inside) inside "$1" ;;
  slurmd) run_slurmd "$1" ;;
  fault) fault "$@" ;;
  *) fail "unknown action '$action'" ;;
esac
