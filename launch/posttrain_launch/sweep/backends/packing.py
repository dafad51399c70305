"""Whether a run's workers find a place beside others: bundles of resources on nodes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

Bundle = dict[str, float]  # {"CPU": 4.0, "GPU": 0.5}
EPSILON = 1e-6  # thirds of a GPU do not add up to one


class Room:
    """What is left of a cluster.

    Args:
        nodes: what each node has in all.
        free: what of the whole cluster nobody holds now.
        taken: bundles of our own runs: those that have no workers yet look free, the others not.
        others: what others held when nothing of ours ran.
    """

    def __init__(
        self,
        nodes: Sequence[Bundle],
        free: Bundle,
        taken: Iterable[Sequence[Bundle]],
        others: Bundle,
    ) -> None:
        self.nodes = list(nodes)
        self._left = [dict(node) for node in nodes]
        total = total_of(nodes)
        ours: Bundle = {}
        for bundles in taken:
            if not _place(bundles, self._left):  # where Ray has put them is not known here
                for bundle in bundles:
                    _place([bundle], self._left)
            for bundle in bundles:
                for name, amount in bundle.items():
                    ours[name] = ours.get(name, 0.0) + amount
        self._free = {
            name: min(
                total[name] - others.get(name, 0.0) - ours.get(name, 0.0), free.get(name, 0.0)
            )
            for name in total
        }

    def take(self, bundles: Sequence[Bundle]) -> bool:
        """Give a run its place, if there is one."""
        needed = {name: sum(b.get(name, 0.0) for b in bundles) for name in self._free}
        if any(needed[name] > self._free[name] + EPSILON for name in needed):
            return False
        if not _place(bundles, self._left):
            return False
        self._free = {name: self._free[name] - needed[name] for name in needed}
        return True


def total_of(nodes: Sequence[Bundle]) -> Bundle:
    """What all nodes have together."""
    return {name: sum(node.get(name, 0.0) for node in nodes) for name in ("CPU", "GPU")}


def fits(bundles: Sequence[Bundle], nodes: Sequence[Bundle]) -> bool:
    """Whether the bundles find a place on empty nodes."""
    return _place(bundles, [dict(node) for node in nodes])


def _place(bundles: Sequence[Bundle], left: list[Bundle]) -> bool:
    """Take each bundle from the first node that has it; all of them, or none."""
    before = [dict(node) for node in left]
    for bundle in bundles:
        for node in left:
            if all(node.get(name, 0.0) + EPSILON >= amount for name, amount in bundle.items()):
                for name, amount in bundle.items():
                    node[name] -= amount
                break
        else:
            left[:] = before
            return False
    return True
