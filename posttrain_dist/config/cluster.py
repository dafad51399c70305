"""The group `cluster`: how the processes of a run come about. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum

from posttrain_dist.config.ray_rules import (
    environment_rules,
    label_rules,
    resource_rules,
    share_rules,
)
from posttrain_dist.errors import Rule, at_least

MAX_MACHINES = 100_000  # nodes, CPUs, GPUs


@dataclass(kw_only=True, slots=True)
class Cluster:
    """The slot `cluster`: how the processes of a run come about."""


@dataclass(kw_only=True, slots=True)
class Local(Cluster):
    """This process, no Ray."""


class Placement(Enum):
    """Where the workers of a run go, in Ray's words."""

    PACK = "PACK"  # on as few nodes as there are places
    SPREAD = "SPREAD"  # on as many nodes as there are
    STRICT_PACK = "STRICT_PACK"  # all on one node
    STRICT_SPREAD = "STRICT_SPREAD"  # each on a node of its own


@dataclass(kw_only=True, slots=True)
class Ray(Cluster):
    """Ray Train workers, on a local Ray or on a running cluster."""

    workers: int | None = None  # null: one per GPU of the cluster, or 1 where it has none
    # "host:port" of a running Ray, or "auto"; null: start one here. For `posttrain submit` its job
    # API, "http://host:8265".
    address: str | None = None
    cpus_per_worker: float = 1.0
    gpus_per_worker: float = 1.0  # a part: several runs of one worker share a GPU; 0: on CPUs
    memory_per_worker_gib: float | None = None  # that Ray keeps for each worker on its node
    resources_per_worker: dict[str, float] = field(default_factory=dict)  # as in `ray start`
    placement: Placement | None = None  # null: PACK on GPUs, SPREAD on the CPUs of several nodes
    labels: dict[str, str] = field(default_factory=dict)  # of the nodes that may be taken
    environment: dict[str, str] = field(default_factory=dict)  # variables of the workers
    max_failures: int = 1  # times that a lost worker is replaced and the run resumed
    shared_folders: bool = True  # false: `posttrain submit` on a machine without their files
    program: str | None = None  # posttrain on the nodes, for `submit`; null: as here, or by PATH


class GpuRequest(Enum):
    """How a site's Slurm is asked for GPUs."""

    gpus_per_node = "gpus_per_node"  # --gpus-per-node=h100:8
    gres = "gres"  # --gres=gpu:h100:8


class ContainerRuntime(Enum):
    """What runs a container image."""

    pyxis = "pyxis"  # NVIDIA's plugin of Slurm, over enroot: srun --container-image
    apptainer = "apptainer"  # and Singularity, whose commands are the same: apptainer exec


@dataclass(kw_only=True, slots=True)
class Slurm(Ray):
    """Ray inside a Slurm job; `posttrain submit` writes the job. `address` is set in the job."""

    nodes: int = 1
    gpus_per_node: int | None = None  # 0: a job on CPUs; `posttrain submit` wants it said
    cpus_per_node: int | None = None  # null: 4 for each GPU of a node, 2 where it has none
    memory_per_node: str | None = None  # as Slurm's --mem: "64G"; "0": all of a node
    time: str | None = None  # as Slurm's --time, "08:00:00"; `posttrain submit` wants it said
    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None  # features of the nodes, as Slurm's --constraint: "a100&ib"
    exclude: list[str] = field(default_factory=list)  # nodes: ["node7", "node[10-12]"]
    reservation: str | None = None
    mail: str | None = None  # address that Slurm writes to
    mail_events: list[str] = field(default_factory=lambda: ["END", "FAIL"])
    gpu_type: str | None = None  # as the site's Slurm calls it: "h100"
    gpu_request: GpuRequest = GpuRequest.gpus_per_node
    requeue: bool = True  # back into the queue at the time limit, after preemption, a lost node
    modules: list[str] = field(default_factory=list)  # module load, in this order
    # Lines of shell before Python: ["source /env/bin/activate"]; one that fails ends the job.
    setup: list[str] = field(default_factory=list)
    container: str | None = None  # image that everything but the job script runs in
    container_runtime: ContainerRuntime = ContainerRuntime.pyxis
    # More folders that the container sees, "/data", "/data:/mnt" or "/data:/mnt:ro"; those of the
    # run, its model and its data are seen already.
    container_mounts: list[str] = field(default_factory=list)
    preflight: bool = True  # look at every node before anything is loaded on it
    preflight_deadline_s: int = 180  # that modules and setup may take, and then the look
    start_deadline_s: int = 300  # until Ray has all nodes and GPUs of the job
    exclude_bad_nodes: bool = False  # queue the job again without the nodes that preflight refuses
    network_interface: str | None = None  # for gloo and NCCL, e.g. "eth0"; null: they choose
    extra: list[str] = field(default_factory=list)  # more sbatch options: ["--nice=100"]


def cluster_rules(cluster: Cluster) -> list[Rule]:
    """What must hold among the values of the group `cluster`."""
    if not isinstance(cluster, Ray):
        return []
    return [
        at_least("cluster.workers", cluster.workers, 1, MAX_MACHINES),
        at_least("cluster.max_failures", cluster.max_failures, 0),
        Rule(
            0 < cluster.cpus_per_worker <= MAX_MACHINES,
            "cluster.cpus_per_worker",
            f"is {cluster.cpus_per_worker}, must be above 0 and at most {MAX_MACHINES:,}",
            "set it to 1 or more",
        ),
        *share_rules(
            cluster.workers, cluster.gpus_per_worker, cluster.memory_per_worker_gib, MAX_MACHINES
        ),
        *resource_rules(cluster.resources_per_worker),
        *label_rules(cluster.labels),
        *environment_rules(cluster.environment),
        Rule(
            "@" not in (cluster.address or ""),
            "cluster.address",
            "holds a user's name or password, and would stand in config.yaml",
            "leave it out, and set RAY_AUTH_TOKEN or RAY_AUTH_TOKEN_PATH in the environment",
        ),
    ]
