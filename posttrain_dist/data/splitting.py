"""Hold rows out of a data set: a share of every channel, no row on both sides."""

from __future__ import annotations

import hashlib
import json
import zlib
from collections import Counter
from collections.abc import Sequence

import numpy as np

from posttrain_dist.flow import Record

Numbered = tuple[int, Record]  # (position of the row in its data set, row)


def split_off(
    records: Sequence[Record], fraction: float, seed: int
) -> tuple[list[Numbered], list[Numbered], int]:
    """Hold out a share of every channel: (train, held-out, rows drawn but left to train).

    A channel of more than one row gives at least one and keeps at least one. A row that stands
    in the data twice is never held out; one drawn is replaced by the next.
    """
    times = Counter(map(content_key, records))
    channels: dict[str, list[int]] = {}
    for i, record in enumerate(records):
        channels.setdefault(record.channel, []).append(i)
    heldout: set[int] = set()
    moved = 0
    for channel, rows in channels.items():
        # Of its own name, so that one more channel leaves the split of the others alone.
        random = np.random.default_rng([seed, zlib.crc32(channel.encode())])
        wanted = min(max(1, round(fraction * len(rows))), len(rows) - 1) if fraction else 0
        for at in random.permutation(len(rows)).tolist():
            if wanted == 0:
                break
            if times[content_key(records[rows[at]])] > 1:
                moved += 1
                continue
            heldout.add(rows[at])
            wanted -= 1
    numbered = list(enumerate(records))
    return (
        [row for row in numbered if row[0] not in heldout],
        [row for row in numbered if row[0] in heldout],
        moved,
    )


def content_key(record: Record) -> bytes:
    """Equal for rows with the same content, whatever their channel."""
    content = json.dumps([record.messages, record.text], sort_keys=True)
    return hashlib.sha256(content.encode()).digest()
