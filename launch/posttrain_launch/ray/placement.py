"""Where the workers of a run go: what each asks for, compared with the nodes that are there.

Ray waits without a word for a bundle that no node can ever hold, so it is compared first.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from posttrain_dist.config import Placement, Ray, Slurm
from posttrain_dist.errors import ClusterError

GIB = 1 << 30
SHOWN = 8  # nodes that an error lists
_ALL_ON_ONE, _ONE_ON_EACH = Placement.STRICT_PACK, Placement.STRICT_SPREAD


@dataclass(frozen=True, slots=True)
class Node:
    """A node of Ray that is alive."""

    name: str
    resources: Mapping[str, float]  # of all of it, free or not: {"CPU": 8.0, "GPU": 2.0}
    labels: Mapping[str, str] = field(default_factory=dict)

    def room(self, bundle: Mapping[str, float]) -> int:
        """How many workers with this bundle the node can hold."""
        return min(int(self.resources.get(name, 0) / each + 1e-9) for name, each in bundle.items())


@dataclass(frozen=True, slots=True)
class Places:
    """What Ray is asked for."""

    workers: int
    bundle: dict[str, float]  # of each worker, as {"CPU": 1.0, "GPU": 1.0, "memory": 4e9}
    strategy: Placement
    labels: dict[str, str]  # of nodes that may be taken, by Ray's selectors

    @property
    def use_gpu(self) -> bool:
        """Whether the workers train on GPUs."""
        return "GPU" in self.bundle


def read_nodes(found: Sequence[Mapping[str, Any]]) -> list[Node]:
    """The nodes that are alive, of what `ray.nodes()` gives."""
    return [
        Node(each["NodeManagerHostname"], each["Resources"], each.get("Labels") or {})
        for each in found
        if each["Alive"]
    ]


def place(cluster: Ray, nodes: Sequence[Node]) -> Places:
    """How many workers there are to be, with what each, and how they are spread.

    Raises:
        ClusterError: they do not fit on what is there; what is missing where.
    """
    nodes = _labelled(cluster, nodes)
    gpus = int(sum(node.resources.get("GPU", 0) for node in nodes))
    use_gpu = gpus > 0 and cluster.gpus_per_worker > 0
    bundle = _bundle(cluster, use_gpu)
    whole = use_gpu and cluster.gpus_per_worker == 1
    default = gpus if whole else len(nodes) if isinstance(cluster, Slurm) and not use_gpu else 1
    workers = cluster.workers or default
    strategy = cluster.placement
    if strategy is None:
        strategy = Placement.SPREAD if len(nodes) > 1 and not use_gpu else Placement.PACK
    places = Places(workers, bundle, strategy, dict(cluster.labels))
    if workers > _fits(places.strategy, bundle, nodes):
        raise _too_large(cluster, places, nodes)
    return places


def missing_now(places: Places, free: Mapping[str, float]) -> list[str]:
    """What others hold of what the workers need, as `2 of 4 GPU`: Ray waits until it is free."""
    needed = {name: each * places.workers for name, each in places.bundle.items()}
    return [
        f"{free.get(name, 0):g} of {amount:g} {name}"
        for name, amount in needed.items()
        if free.get(name, 0) < amount - 1e-9
    ]


def _bundle(cluster: Ray, use_gpu: bool) -> dict[str, float]:
    bundle = {"CPU": cluster.cpus_per_worker}
    if use_gpu:
        bundle["GPU"] = cluster.gpus_per_worker
    if cluster.memory_per_worker_gib is not None:
        bundle["memory"] = float(int(cluster.memory_per_worker_gib * GIB))
    return bundle | cluster.resources_per_worker


def _fits(strategy: Placement, bundle: Mapping[str, float], nodes: Sequence[Node]) -> int:
    """The most workers that find a place."""
    rooms = [node.room(bundle) for node in nodes]
    if strategy is _ALL_ON_ONE:
        return max(rooms, default=0)
    if strategy is _ONE_ON_EACH:
        return sum(room > 0 for room in rooms)
    return sum(rooms)


# ---------------------------------------------------------------------------------- labels


def _labelled(cluster: Ray, nodes: Sequence[Node]) -> list[Node]:
    """The nodes that `cluster.labels` allows."""
    found = [
        node
        for node in nodes
        if all(selects(text, node.labels.get(name)) for name, text in cluster.labels.items())
    ]
    if nodes and not found:
        name, text = min(  # the label that the fewest nodes have
            cluster.labels.items(),
            key=lambda each: sum(selects(each[1], node.labels.get(each[0])) for node in nodes),
        )
        there = _listed([f"{node.name} {_own_labels(node)}" for node in nodes])
        raise ClusterError(
            f"is {text}, and of {len(nodes)} nodes none has such labels: {there}",
            where=f"cluster.labels.{name}",
            fix="set it to a label that is there, or start the nodes with `ray start --labels=…`",
        )
    return found


def selects(selector: str, value: str | None) -> bool:
    """Whether a label of a node is what a selector of Ray asks for: `a`, `!a`, `in(a, b)`."""
    negated, text = selector.startswith("!"), selector.removeprefix("!")
    several = re.fullmatch(r"in\((.*)\)", text)
    wanted = [each.strip() for each in several[1].split(",")] if several else [text]
    return (value in wanted) != negated


def _own_labels(node: Node) -> str:
    shown = [f"{k}={v}" for k, v in node.labels.items() if not k.startswith("ray.io/")]
    return f"({', '.join(shown) or 'no labels'})"


# ------------------------------------------------------------------------- what does not fit


def _too_large(cluster: Ray, places: Places, nodes: Sequence[Node]) -> ClusterError:
    alone = _nowhere(places, nodes)
    if alone is not None:
        return alone
    fits = _fits(places.strategy, places.bundle, nodes)
    fixes = [f"set cluster.workers to at most {fits}"] if fits else []
    if places.strategy in (_ALL_ON_ONE, _ONE_ON_EACH):
        rooms = [f"{node.name} {node.room(places.bundle)}" for node in nodes]
        how = "all on one node" if places.strategy is _ALL_ON_ONE else "each on a node of its own"
        if _fits(Placement.PACK, places.bundle, nodes) >= places.workers:
            fixes.append("use cluster.placement=PACK")
        there = f"{len(nodes)} nodes with places for {_listed(rooms)}"
        what = f"is {places.workers}, {how}, each with {_words(places.bundle)}"
        fix = ", or ".join(fixes) or "use larger nodes, or less for each worker"
        return ClusterError(f"{what}, and there are {there}", where="cluster.workers", fix=fix)
    if share := _smaller_share(places, nodes):
        fixes.append(f"set cluster.cpus_per_worker to at most {share:g}")
    one = _fits(places.strategy, places.bundle | {"CPU": 1.0}, nodes)
    last = f"set cluster.workers to at most {one} and cluster.cpus_per_worker to 1"
    return ClusterError(
        f"is {places.workers}, each with {_words(places.bundle)}, and there are "
        f"{_there(places, nodes)}",
        where="cluster.workers",
        fix=", or ".join(fixes) or last,
    )


def _nowhere(places: Places, nodes: Sequence[Node]) -> ClusterError | None:
    """Of one thing, beside CPUs and GPUs, no node has enough for a single worker."""
    for name, each in places.bundle.items():
        most = max((node.resources.get(name, 0) for node in nodes), default=0)
        if name in ("CPU", "GPU") or most >= each:
            continue
        if name == "memory":
            return ClusterError(
                f"is {each / GIB:g}, and no node has more than {most / GIB:.3g} GiB for Ray",
                where="cluster.memory_per_worker_gib",
                fix=f"set it to at most {int(10 * most / GIB) / 10:g}",
            )
        there = _listed([f"{node.name} {node.resources.get(name, 0):g}" for node in nodes])
        return ClusterError(
            f"is {each:g}, and no node has as much: {there}",
            where=f"cluster.resources_per_worker.{name}",
            fix=f"start nodes with `ray start --resources='{{\"{name}\": 1}}'`, or leave it out",
        )
    return None


def _smaller_share(places: Places, nodes: Sequence[Node]) -> float | None:
    """CPUs of a worker with which all would fit: parts of a node's, to 0.01; the largest."""
    parts = {
        int(100 * node.resources.get("CPU", 0) / k) / 100 for node in nodes for k in range(1, 1001)
    }
    for part in sorted((part for part in parts if part > 0), reverse=True):
        if part < places.bundle["CPU"]:
            fits = _fits(places.strategy, places.bundle | {"CPU": part}, nodes)
            if fits >= places.workers:
                return part
    return None


def _words(bundle: Mapping[str, float]) -> str:
    cpus = f"{bundle['CPU']:g} CPUs"
    gpu = bundle.get("GPU")
    rest = [] if gpu is None else ["a GPU" if gpu == 1 else f"{gpu:g} of a GPU"]
    if "memory" in bundle:
        rest.append(f"{bundle['memory'] / GIB:g} GiB")
    rest += [f"{v:g} {k}" for k, v in bundle.items() if k not in ("CPU", "GPU", "memory")]
    return " and ".join([cpus, *rest])


def _there(places: Places, nodes: Sequence[Node]) -> str:
    def total(name: str) -> float:
        return sum(node.resources.get(name, 0) for node in nodes)

    gpus = f" and {total('GPU'):g} GPUs" if total("GPU") else " and no GPU"
    there = f"{total('CPU'):g} CPUs{gpus}"
    if len(nodes) == 1:
        return there
    rooms = _listed([f"{node.name} {node.room(places.bundle)}" for node in nodes])
    return f"{there} on {len(nodes)} nodes, with places for {rooms}"


def _listed(words: Sequence[str]) -> str:
    more = len(words) - SHOWN
    return ", ".join([*words[:SHOWN], *([f"{more} more"] if more > 0 else [])])
