"""A new model folder renders and tokenises the prompts of training rows as training did."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from posttrain_dist.data.chat.rendering.served import Served
from posttrain_dist.data.prefix import common_prefix_length
from posttrain_dist.errors import CheckpointError

_SHOWN = 12  # tokens of either text from where they differ
_FIX = (
    "if files of the tokenizer in the model folder changed since the data was prepared, put them "
    "back; then `posttrain export` writes the newest checkpoint"
)


def check_served(folder: Path, served: Served, target: Path, notice: Callable[[str], None]) -> None:
    """Compare the prompts of a few training rows, as plain transformers makes them of `folder`.

    Args:
        folder: with tokenizer and chat templates written.
        target: what the folder will be called, for errors.
        notice: called with a line if there is no row to compare.

    Raises:
        CheckpointError: transformers cannot load the tokenizer, the template refuses a row, or a
            prompt has other tokens than in training.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(
            folder, local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers raise bare Exception on a damaged file
        raise CheckpointError(
            f"the tokenizer of the export cannot be loaded: {error}", where=str(target), fix=_FIX
        ) from error
    if not served.rows:
        notice(
            "no training row has a prompt that the chat template of the export can be checked by"
        )
    for number, row in enumerate(served.rows, start=1):
        try:
            ids = row.prompt.encode(tokenizer)
        except Exception as error:  # as above, and whatever a template may raise
            raise CheckpointError(
                f"its chat template refuses the prompt of training row {number}: {error}",
                where=str(target),
                fix=_FIX,
            ) from error
        if ids != row.token_ids:
            same = common_prefix_length(ids, row.token_ids)
            here, there = (
                repr(tokenizer.decode(each[same : same + _SHOWN])) for each in (ids, row.token_ids)
            )
            raise CheckpointError(
                f"the prompt of training row {number} is another text than it was in training: "
                f"from token {same} on the export gives {here}, and {there} was trained",
                where=str(target),
                fix=_FIX,
            )
