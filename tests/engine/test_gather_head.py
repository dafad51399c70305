"""Under ZeRO-3 the head's weight is gathered once for all chunks of rows."""

from __future__ import annotations

import json


def test_one_gather_for_all_chunks(run_workers, builders, tmp_path):
    folder = builders.model(tmp_path / "model", tie_word_embeddings=False)
    for output in run_workers("gather_head.py", 2, folder):
        told = json.loads(output.split("TOLD ")[1].splitlines()[0])
        assert told["shard"] == 0  # nothing of it is here between steps
        assert told["rows"] == 128  # 32 chunks of 4
        assert told["freed"] == [told["whole"]]  # whole when it was let go, once
        assert told["norm"] > 0
