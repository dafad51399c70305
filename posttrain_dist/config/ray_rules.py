"""What must hold among the values of a Ray cluster: sizes of a worker, labels, its variables."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping

from posttrain_dist.errors import ConfigError, Rule

# Words of a variable's name that stand for a secret; TOKENIZERS_PARALLELISM holds none of them.
_SECRETS = re.compile(
    r"(^|_)(TOKENS?|(API)?KEYS?|SECRETS?|PASS(WD|WORD|PHRASE)?|CREDENTIALS?|AUTH|PAT)(_|$)"
)
API_ADDRESS = "RAY_API_SERVER_ADDRESS"  # Ray's own variable for its job API
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# Ray gives each worker its devices, and its processes their token and address.
_OF_RAY = re.compile(r"RAY_.*|CUDA_VISIBLE_DEVICES")
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9_./-]*[A-Za-z0-9])?")
_SELECTOR = re.compile(r"!?(in\([A-Za-z0-9_., -]+\)|[A-Za-z0-9]([A-Za-z0-9_.-]*[A-Za-z0-9])?)")
_KEYS = {
    "CPU": "cluster.cpus_per_worker",
    "GPU": "cluster.gpus_per_worker",
    "memory": "cluster.memory_per_worker_gib",
}


def share_rules(
    workers: int | None, gpus_per_worker: float, memory_gib: float | None, most: int
) -> list[Rule]:
    """GPUs and memory of a worker are amounts that it can train with."""
    return [
        Rule(
            0 <= gpus_per_worker <= 1,
            "cluster.gpus_per_worker",
            f"is {gpus_per_worker}, and a worker trains on one GPU, on a part of one, or on CPUs",
            "set it to 1, to a part such as 0.5, or to 0 for CPUs; more GPUs: cluster.workers",
        ),
        Rule(
            gpus_per_worker in (0, 1) or workers in (None, 1),
            "cluster.gpus_per_worker",
            f"is {gpus_per_worker} with cluster.workers={workers}, and NCCL takes no two workers "
            "of a run on one GPU",
            "set cluster.workers=1, or cluster.gpus_per_worker=1",
        ),
        Rule(
            memory_gib is None or 0 < memory_gib <= most,
            "cluster.memory_per_worker_gib",
            f"is {memory_gib}, must be above 0 and at most {most:,}",
            "set it to the memory of its node that a worker needs, or leave it out",
        ),
    ]


def resource_rules(resources: Mapping[str, float]) -> list[Rule]:
    """Resources beside CPU, GPU and memory, by the names that the nodes were started with."""
    rules = []
    for name, amount in resources.items():
        key = f"cluster.resources_per_worker.{name}"
        if name in _KEYS:
            what, fix = "is a resource with a key of its own", f"set {_KEYS[name]}"
            rules.append(Rule(False, key, what, fix))
        elif not (math.isfinite(amount) and amount > 0):
            rules.append(Rule(False, key, f"is {amount}, must be above 0", "set it to 1"))
        elif amount > 1 and amount != int(amount):
            what = f"is {amount}, and Ray gives parts of one alone, not of several"
            rules.append(Rule(False, key, what, f"set it to {math.ceil(amount)}"))
    return rules


def label_rules(labels: Mapping[str, str]) -> list[Rule]:
    """Names and values of labels are those that Ray reads."""
    return [
        Rule(
            bool(_LABEL.fullmatch(name) and _SELECTOR.fullmatch(value)),
            f"cluster.labels.{name}",
            f"is {value!r}, which Ray does not read",
            "write a value, !value, in(a,b) or !in(a,b), as in cluster.labels.zone=west",
        )
        for name, value in labels.items()
    ]


def environment_rules(environment: Mapping[str, str]) -> list[Rule]:
    """Variables of the workers: no secrets, which Ray's dashboard would show, and none of Ray's."""
    rules = []
    for name, value in environment.items():
        key = f"cluster.environment.{name}"
        if not _NAME.fullmatch(name) or "\0" in value:
            what = "cannot be a variable of a process"
            rules.append(Rule(False, key, what, "use letters, digits and _ in its name"))
        elif _SECRETS.search(name.upper()):
            what = "looks like a secret by its name, and would stand in config.yaml"
            fix = f"set {name} on the nodes, in the environment of `ray start` or by a 0600 file"
            rules.append(Rule(False, key, what, fix))
        elif _OF_RAY.fullmatch(name):
            what = "is set by Ray for each of its processes"
            rules.append(Rule(False, key, what, "set it where the nodes are started"))
    return rules


def job_api(address: str | None) -> str:
    """The address of Ray's job API, given or of the environment: "http://host:8265".

    Raises:
        ConfigError: there is none, or it is one of something else.
    """
    address = address or os.environ.get(API_ADDRESS) or ""
    if is_job_api(address):
        return address.rstrip("/")
    host = address.rpartition("/")[2].rpartition(":")[0] or "HOST"
    what = f"is {address}, which is no address of Ray's job API" if address else "is not set"
    raise ConfigError(
        what,
        where="cluster.address",
        fix=f"write cluster.address=http://{host}:8265, the dashboard of the head; on a node of "
        "the cluster, posttrain train cluster=ray cluster.address=HOST:PORT needs no job",
    )


def is_job_api(address: str) -> bool:
    """Whether it is HTTP, and not the port where nodes join."""
    return address.startswith(("http://", "https://"))
