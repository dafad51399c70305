"""Rules of `cluster=slurm`: every value that becomes a line of a job is one that Slurm reads.

A value stands in a line `#SBATCH --key=value` of a script: one with a line break would add a line
of its own, one with a space or a `#` would end early.
"""

from __future__ import annotations

import re

from posttrain_dist.config.cluster import MAX_MACHINES, Cluster, Slurm
from posttrain_dist.errors import Rule, at_least

# Not of digits alone: minutes, as which nobody means the 28800 that YAML makes of 8:00:00.
_TIME = re.compile(
    r"\d+:[0-5]?\d(:[0-5]?\d)?|\d+-([01]?\d|2[0-3])(:[0-5]?\d){0,2}|UNLIMITED|infinite"
)
_SECONDS = (1, 60, 3600, 86400)
MIN_TIME_S = 120
_MEMORY = re.compile(r"\d+[KMGT]?B?", re.IGNORECASE)
_NAME = r"[A-Za-z0-9_][\w.+@-]*"
_NAMES = re.compile(rf"{_NAME}(,{_NAME})*")
_ONE_NAME = re.compile(_NAME)
_FEATURES = re.compile(r"[\w.+:&|*,()\[\]!-]+")
_NODES = re.compile(r"[\w.-]+(\[[\d,-]+\][\w.-]*)*")
_MAIL = re.compile(r"[\w.+-]+(@[\w-]+(\.[\w-]+)*)?")
_MODULE = re.compile(r"[\w.+@/:=~-]+")
_INTERFACE = re.compile(r"[\w.,:=^-]+")
_MOUNT = re.compile(r"/[^:,\"\\]*(:/[^:,\"\\]*(:(ro|rw))?)?")
_SECRET = re.compile(r"\w*(KEY|TOKEN|SECRET|PASSWORD)\w*=(?![\"']?[$/~])[\"']?\S", re.IGNORECASE)
MAIL_EVENTS = (
    *("NONE", "ALL", "BEGIN", "END", "FAIL", "REQUEUE", "INVALID_DEPEND", "STAGE_OUT"),
    *("TIME_LIMIT", "TIME_LIMIT_90", "TIME_LIMIT_80", "TIME_LIMIT_50", "ARRAY_TASKS"),
)
# Options that the job script stands on, and whose change would break it.
_TAKEN = {
    "array": "start a sweep with posttrain train -m … hydra/launcher=slurm_array",
    "wait": "write posttrain submit --wait",
    "wrap": "put lines of shell into cluster.setup",
    "ntasks": "set cluster.nodes: one task on each node starts Ray",
    "ntasks-per-node": "set cluster.nodes: one task on each node starts Ray",
    "chdir": "set output_root",
    "output": "leave it out: the log is logs/slurm-<job>.log of the run folder",
    "error": "leave it out: the log is logs/slurm-<job>.log of the run folder",
    "open-mode": "leave it out: a job that is queued again keeps its log",
    "parsable": "leave it out",
    "test-only": "write posttrain submit --dry-run",
}


def job_rules(cluster: Cluster) -> list[Rule]:
    """What must hold among the values of `cluster=slurm`."""
    if not isinstance(cluster, Slurm):
        return []
    return [
        at_least("cluster.nodes", cluster.nodes, 1, MAX_MACHINES),
        at_least("cluster.cpus_per_node", cluster.cpus_per_node, 1, MAX_MACHINES),
        at_least("cluster.gpus_per_node", cluster.gpus_per_node, 0, MAX_MACHINES),
        at_least("cluster.start_deadline_s", cluster.start_deadline_s, 1),
        at_least("cluster.preflight_deadline_s", cluster.preflight_deadline_s, 10, 86_400),
        *_time(cluster),
        _form("memory_per_node", cluster.memory_per_node, _MEMORY, "write a size such as 64G"),
        *_names(cluster),
        *_lists(cluster),
        *_container(cluster),
        *(_extra(f"cluster.extra[{i}]", each) for i, each in enumerate(cluster.extra)),
        Rule(
            cluster.preflight or not cluster.exclude_bad_nodes,
            "cluster.exclude_bad_nodes",
            "is on, and cluster.preflight=false looks at no node",
            "set cluster.preflight=true",
        ),
        Rule(
            cluster.requeue or not cluster.exclude_bad_nodes,
            "cluster.exclude_bad_nodes",
            "is on, and cluster.requeue=false never queues a job again",
            "set cluster.requeue=true, or name the nodes in cluster.exclude",
        ),
    ]


def time_limit_s(cluster: Slurm) -> int | None:
    """The time limit in seconds; None: there is none, or the partition's."""
    text = cluster.time
    if text is None or not text[0].isdigit():
        return None
    days, dash, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    if dash:  # days-hours[:minutes[:seconds]]
        parts = [int(days), *parts]
        return sum(n * unit for n, unit in zip(parts, reversed(_SECONDS), strict=False))
    return sum(n * unit for n, unit in zip(reversed(parts), _SECONDS, strict=False))


def _form(key: str, value: str | None, form: re.Pattern[str], fix: str) -> Rule:
    what = f"is {value!r}, which Slurm does not read"
    return Rule(value is None or bool(form.fullmatch(value)), f"cluster.{key}", what, fix)


def _time(cluster: Slurm) -> list[Rule]:
    fix = (
        "write hours:minutes:seconds or days-hours:minutes:seconds, such as 08:00:00; in a "
        'YAML file in quotes, time: "08:00:00", for it is a number there otherwise'
    )
    form = _form("time", cluster.time, _TIME, fix)
    limit_s = time_limit_s(cluster) if form.holds else None
    long = Rule(
        limit_s is None or limit_s >= MIN_TIME_S,
        "cluster.time",
        f"is {cluster.time!r}, too short for a run to begin, train and save",
        f"set it to {MIN_TIME_S // 60} minutes or more",
    )
    return [form, long]


def _names(cluster: Slurm) -> list[Rule]:
    word = "write the name alone, as the site's Slurm has it"
    features = "write features of nodes without spaces, such as a100&ib"
    return [
        _form("partition", cluster.partition, _NAMES, f"{word}: sinfo -s lists them"),
        _form("account", cluster.account, _ONE_NAME, word),
        _form("qos", cluster.qos, _ONE_NAME, word),
        _form("reservation", cluster.reservation, _NAMES, f"{word}: scontrol show reservation"),
        _form("gpu_type", cluster.gpu_type, _ONE_NAME, f"{word}: sinfo -o %G lists them"),
        _form("constraint", cluster.constraint, _FEATURES, features),
        _form("mail", cluster.mail, _MAIL, "write one address, such as me@example.org"),
        _form("network_interface", cluster.network_interface, _INTERFACE, "write eth0, or ib0"),
    ]


def _lists(cluster: Slurm) -> list[Rule]:
    nodes = "write nodes as Slurm names them, such as node7 or node[10-12]"
    modules = "write what stands behind `module load`, such as cuda/12.8"
    events = f"use some of {', '.join(MAIL_EVENTS)}"
    line = "write one line of shell for each entry; what needs more stands in a file: source FILE"
    return [
        *(_form(f"exclude[{i}]", x, _NODES, nodes) for i, x in enumerate(cluster.exclude)),
        *(_form(f"modules[{i}]", x, _MODULE, modules) for i, x in enumerate(cluster.modules)),
        *(
            Rule(x in MAIL_EVENTS, f"cluster.mail_events[{i}]", f"is {x!r}", events)
            for i, x in enumerate(cluster.mail_events)
        ),
        *(
            Rule(bool(x.strip()) and x.isprintable(), f"cluster.setup[{i}]", f"is {x!r}", line)
            for i, x in enumerate(cluster.setup)
        ),
        *(
            Rule(
                _SECRET.search(x) is None,
                f"cluster.setup[{i}]",
                "sets what looks like a secret, and would stand in config.yaml and the job script",
                "read it from a file that only you can read: export NAME=$(cat ~/.name)",
            )
            for i, x in enumerate(cluster.setup)
        ),
    ]


def _container(cluster: Slurm) -> list[Rule]:
    image = cluster.container
    mount = "write /folder, /folder:/inside or /folder:/inside:ro"
    return [
        Rule(
            image is None or (image.isprintable() and bool(image) and " " not in image),
            "cluster.container",
            f"is {image!r}, which is no image",
            "write a file such as /images/posttrain.sqsh (pyxis) or posttrain.sif (apptainer), or "
            "a name such as docker://registry/image:tag",
        ),
        Rule(
            image is not None or not cluster.container_mounts,
            "cluster.container_mounts",
            "is set, and there is no container",
            "set cluster.container=<image>, or leave the mounts out",
        ),
        *(
            Rule(
                x.isprintable() and bool(_MOUNT.fullmatch(x)),
                f"cluster.container_mounts[{i}]",
                f"is {x!r}, which is no mount",
                mount,
            )
            for i, x in enumerate(cluster.container_mounts)
        ),
    ]


def _extra(key: str, option: str) -> Rule:
    name = option.partition("=")[0].lstrip("-")
    if name in _TAKEN:
        return Rule(False, key, f"is {option!r}, which the job script sets itself", _TAKEN[name])
    holds = option.startswith("-") and option.isprintable() and name != ""
    return Rule(
        holds, key, f"is {option!r}", "write one option of sbatch for each entry: --nice=100"
    )
