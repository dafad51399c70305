"""Which files the rows of each split come from."""

from __future__ import annotations

from posttrain_dist.data import DataConfig
from posttrain_dist.data.embedded import split_path
from posttrain_dist.errors import ConfigError

EMBEDDED = "embedded"


def sources(data: DataConfig, rows: str, *, only_heldout: bool = False) -> dict[str, str]:
    """Split ("train", "eval") -> file, folder or glob.

    Without "eval", held-out rows are a share of the training rows.

    Args:
        data: what to read.
        rows: the format that the objective reads.
        only_heldout: leave out "train" where the held-out rows have a file of their own.

    Raises:
        ConfigError: the embedded data does not have such rows.
    """
    heldout = data.eval
    if heldout is None and data.train == EMBEDDED:
        heldout = EMBEDDED
    paths = {} if only_heldout and heldout is not None else {"train": data.train}
    if heldout is not None:
        paths["eval"] = heldout
    for split, path in paths.items():
        if path == EMBEDDED and rows != "messages":
            raise ConfigError(
                f"the embedded data holds conversations, and this objective reads {rows} rows",
                where="data.train" if data.train == EMBEDDED else f"data.{split}",
                fix='give a JSONL file with rows such as {"text": "..."}',
            )
        if path == EMBEDDED:
            paths[split] = str(split_path("train" if split == "train" else "heldout"))
    return paths
