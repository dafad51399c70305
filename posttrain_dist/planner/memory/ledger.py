"""Allocations of one rank, in the order in which they happen; the peak of each phase, by item."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from posttrain_dist.planner.plan import Item, Phase, PhaseName


class Block:
    """One allocation. Freed when nobody holds it.

    Attributes:
        viewed: of a gradient: what holds it is a view, which torch does not add to in place.
    """

    __slots__ = ("holders", "item", "num_bytes", "viewed")

    def __init__(self, item: Item, num_bytes: int) -> None:
        self.item, self.num_bytes, self.holders = item, num_bytes, 1
        self.viewed = False


class Ledger:
    """Adds up what is allocated, and keeps of each phase the fullest moment.

    Args:
        room: bytes of the device that a run may take; None: as many as it wants.
    """

    def __init__(self, room: int | None = None) -> None:
        self._room = room
        self._now: Counter[Item] = Counter()
        self._total = 0
        self._phase: PhaseName | None = None
        self._highest = -1  # of this phase so far
        self._rising = False  # more than ever in this phase; written down when it falls
        self._since = 0  # most since the last `highest_since`
        self._peaks: dict[PhaseName, tuple[int, dict[Item, int]]] = {}
        # What is done on the device where there is room: its highest total; else bytes of the host.
        self._with_room: Counter[PhaseName] = Counter()
        self._on_host: Counter[PhaseName] = Counter()

    @property
    def total_bytes(self) -> int:
        """Allocated now."""
        return self._total

    def items(self) -> dict[Item, int]:
        """Allocated now, by item."""
        return dict(self._now)

    def allocate(self, item: Item, num_bytes: int) -> Block:
        """Take memory; the caller is its first holder."""
        self._now[item] += num_bytes
        self._total += num_bytes
        if self._total > self._highest:
            self._highest, self._rising = self._total, True
        return Block(item, num_bytes)

    def hold(self, block: Block) -> Block:
        """One holder more."""
        block.holders += 1
        return block

    def release(self, block: Block) -> None:
        """One holder less; the last one frees it."""
        assert block.holders > 0, "released once too often"
        block.holders -= 1
        if block.holders == 0:
            if self._rising:
                self._write_down()
            if self._total > self._since:
                self._since = self._total
            self._now[block.item] -= block.num_bytes
            self._total -= block.num_bytes

    def resize(self, block: Block, num_bytes: int) -> None:
        """Free it, and take so much in its place."""
        more = num_bytes - block.num_bytes
        if more < 0 and self._rising:
            self._write_down()
        block.num_bytes = num_bytes
        self._now[block.item] += more
        self._total += more
        if self._total > self._highest:
            self._highest, self._rising = self._total, True

    def touch(self, item: Item, num_bytes: int) -> None:
        """Take memory and give it back at once: a temporary."""
        total = self._total + num_bytes
        if total > self._highest:
            self.release(self.allocate(item, num_bytes))
        elif total > self._since:
            self._since = total

    def highest_since(self) -> int:
        """The most that was allocated since this was last asked."""
        highest, self._since = max(self._since, self._total), self._total
        return highest

    def touch_if_room(self, num_bytes: int, *, on_host: int) -> None:
        """A temporary of a program that looks whether the device has room, and else takes the host.

        It counts for no peak, because no run needs it.

        Args:
            on_host: bytes of the host that it takes instead.
        """
        if self._phase is None:  # nobody asks for a peak
            return
        total = self._total + num_bytes
        if self._room is None or total <= self._room:
            self._with_room[self._phase] = max(self._with_room[self._phase], total)
        else:
            self._on_host[self._phase] = max(self._on_host[self._phase], on_host)

    @contextmanager
    def phase(self, name: PhaseName) -> Iterator[None]:
        """What is allocated inside counts for this phase too, as does what was there before."""
        before = self._phase
        self._enter(name)
        try:
            yield
        finally:
            self._enter(before)

    def phases(self) -> tuple[Phase, ...]:
        """The fullest moment of each phase that there was, in the order of PhaseName."""
        if self._rising:
            self._write_down()
        return tuple(
            Phase(
                name,
                {item: n for item, n in self._peaks[name][1].items() if n},
                if_room=max(0, self._with_room[name] - self._peaks[name][0]),
                on_host=self._on_host[name],
            )
            for name in PhaseName
            if name in self._peaks
        )

    def _enter(self, name: PhaseName | None) -> None:
        if self._rising:
            self._write_down()
        self._phase = name
        self._highest = self._peaks[name][0] if name is not None and name in self._peaks else -1
        if self._total > self._highest:
            self._highest, self._rising = self._total, True

    def _write_down(self) -> None:
        self._rising = False
        if self._phase is not None:
            self._peaks[self._phase] = (self._total, dict(self._now))
