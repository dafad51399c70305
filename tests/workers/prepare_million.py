"""Prepare a million rows and write their report; prints the most memory that it took, in MiB.

    prepare_million.py <folder> <rows>

Rows are encoded once for one chunk, which comes again and again with other contents: what encodes
them are other processes, whose memory is not looked at here.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from posttrain_dist.config import DataConfig, ModelConfig, RunConfig, complete
from posttrain_dist.prepare import build_dataset, prepare_cached
from posttrain_dist.prepare.chunk import Chunk
from posttrain_dist.prepare.data_report import write_data_report
from posttrain_dist.report.data.data_page import write_data_page

NUM_ROWS = 10_000  # that are encoded
folder, wanted = Path(sys.argv[1]), int(sys.argv[2])
plain = build_dataset.encode


def encode(*args: Any) -> Iterator[Iterator[Chunk]]:
    for chunks in plain(*args):
        yield (again for chunk in chunks for again in repeated(chunk))


def repeated(chunk: Chunk) -> Iterator[Chunk]:
    """The chunk as often as all chunks together hold the rows that are wanted."""
    random, size = np.random.default_rng(len(chunk.key_R)), len(chunk.key_R)
    for _ in range(wanted // NUM_ROWS):
        keys = random.integers(0, 1 << 64, size, np.uint64)
        near = random.integers(0, 1 << 64, chunk.near_RB.shape, np.uint64)
        yield dataclasses.replace(chunk, key_R=keys, near_RB=near)


build_dataset.encode = encode
line = '{"messages": [{"role": "user", "content": "q%d"}, {"role": "assistant", "content": "a"}]}\n'
(folder / "rows.jsonl").write_text("".join(line % i for i in range(NUM_ROWS)))
config = complete(
    RunConfig(
        model=ModelConfig(path="tiny_base"),
        data=DataConfig(train=str(folder / "rows.jsonl"), cache=str(folder / "cache")),
    )
)
report = write_data_report(config, prepare_cached(config), folder)
write_data_page(report, folder)
assert sum(counts["rows"] for counts in report["splits"]["train"].values()) > 0.9 * wanted
peak = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith("VmHWM"))
print("torch" in sys.modules, int(peak.split()[1]) // 1024)
