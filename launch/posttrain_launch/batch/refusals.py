"""What sbatch, or the queue, has against a job: the key of the configuration to change."""

from __future__ import annotations

from typing import NamedTuple


class Cure(NamedTuple):
    """Which key is at fault, and what to do."""

    key: str
    fix: str


_PARTITION = Cure("cluster.partition", "use one of those that `sinfo -s` lists")
_ACCOUNT = Cure(
    "cluster.account", "use one of `sacctmgr show associations user=$USER format=account,partition`"
)
_QOS = Cure("cluster.qos", "use one of `sacctmgr show associations user=$USER format=qos%60`")
_TIME = Cure("cluster.time", "set less than the limit of the partition (`sinfo -o '%P %l'`)")
_NODES = Cure("cluster.nodes", "set as many as the partition has or allows (`sinfo -o '%P %D'`)")
_CPUS = Cure("cluster.cpus_per_node", "set as many as a node has (`sinfo -o '%P %c'`)")
_GPUS = Cure(
    "cluster.gpus_per_node",
    "set what nodes have (`sinfo -o '%P %G'`), by the name that the site has for them "
    "(cluster.gpu_type, cluster.gpu_request=gres)",
)
_MEMORY = Cure("cluster.memory_per_node", "set less than nodes have (`sinfo -o '%P %m'`, in MB)")
_FEATURE = Cure("cluster.constraint", "use features that `sinfo -o '%P %f'` lists")
_EXCLUDE = Cure("cluster.exclude", "name nodes that there are (`sinfo -N`)")
_RESERVATION = Cure("cluster.reservation", "use one of `scontrol show reservation`")
_SIZE = Cure(
    "cluster.nodes",
    "set cluster.nodes, cpus_per_node, gpus_per_node, memory_per_node and constraint to what "
    "`sinfo -o '%P %D %c %G %m %f'` lists",
)
_LIMITS = Cure(
    "cluster",
    "set less (cluster.nodes, cluster.time), or another cluster.qos, as `sacctmgr show qos` allows",
)
_NO_LOGIN = Cure("cluster", "submit on a login node of the cluster: this machine has no slurm.conf")
_CONTROLLER = Cure("cluster", "try again when `scontrol ping` says that the controller is up")

# Parts of what sbatch prints, in lower case; the first that is found counts.
_ANSWERS: tuple[tuple[str, Cure], ...] = (
    ("invalid partition", _PARTITION),
    ("requested partition configuration", _PARTITION),
    ("account", _ACCOUNT),  # "Invalid account or account/partition combination specified"
    ("invalid qos", _QOS),
    ("time limit", _TIME),
    ("invalid --time", _TIME),
    ("invalid feature", _FEATURE),
    ("invalid constraint", _FEATURE),
    ("generic resource", _GPUS),  # "Invalid generic resource (gres) specification"
    ("gres", _GPUS),
    ("memory", _MEMORY),
    ("cpu count", _CPUS),
    ("more processors", _CPUS),
    ("node count", _NODES),
    ("too many nodes", _NODES),
    ("invalid node name", _EXCLUDE),
    ("reservation", _RESERVATION),
    ("node configuration is not available", _SIZE),
    ("violates", _LIMITS),
    ("configuration source", _NO_LOGIN),
    ("unable to contact slurm controller", _CONTROLLER),
    ("socket timed out", _CONTROLLER),
)
_OTHER = Cure("cluster", "change the cluster.* value that it names (partition, account, time …)")

# Reasons for which a job stays PENDING until somebody changes it.
_NEVER: tuple[tuple[str, Cure], ...] = (
    ("PartitionNodeLimit", _NODES),
    ("PartitionTimeLimit", _TIME),
    ("PartitionConfig", _PARTITION),
    ("PartitionDown", _PARTITION),
    ("PartitionInactive", _PARTITION),
    ("BadConstraints", _SIZE),
    ("InvalidAccount", _ACCOUNT),
    ("AccountNotAllowed", _ACCOUNT),
    ("InvalidQOS", _QOS),
    ("QOSNotAllowed", _QOS),
    ("ReservationDeleted", _RESERVATION),
    (
        "DependencyNeverSatisfied",
        Cure("cluster.extra", "take the dependency out, and submit again"),
    ),
    ("JobHeldUser", Cure("cluster", "scontrol release {job}")),
    ("JobHeldAdmin", Cure("cluster", "ask the administrators, who hold it")),
    (
        "launch failed requeued held",
        Cure("cluster", "see the node's log, then scontrol release {job}"),
    ),
)
# Of one job's own size: AssocMaxNodePerJobLimit, QOSMaxWallDurationPerJobLimit, …
_OWN_SIZE = ("PerJob", "QOSMin", "MaxWall")


def cure_of(answer: str) -> Cure:
    """What to change, of what sbatch answered."""
    text = answer.lower()
    return next((cure for part, cure in _ANSWERS if part in text), _OTHER)


def never_starts(why: str) -> Cure | None:
    """What to change, of the reason that squeue has for a waiting job; None: it may yet start."""
    for name, cure in _NEVER:
        if name.lower() in why.lower():
            return cure
    if why.startswith(("Assoc", "QOS")) and any(part in why for part in _OWN_SIZE):
        return _LIMITS
    return None
