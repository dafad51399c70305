"""The tokenizer of a model folder, without transformers where that is possible.

model_tokenizer.py     what our code uses of a tokenizer, as a value
plain_files.py         ... from tokenizer.json itself, where transformers would change nothing of it
transformers_child.py  ... from transformers, in a process of its own
tokenizer_cache.py     ... kept on disk
new_tokens.py          tokens that a run adds

transformers decides what a tokenizer is: many of its classes build another pipeline than
tokenizer.json describes. But importing it takes seconds of every command and of every process that
tokenises.
"""

from __future__ import annotations

from pathlib import Path

from posttrain_dist.models.tokenizer.model_tokenizer import ModelTokenizer
from posttrain_dist.models.tokenizer.plain_files import read_plain
from posttrain_dist.models.tokenizer.tokenizer_cache import cached
from posttrain_dist.models.tokenizer.transformers_child import read_by_transformers

__all__ = ["ModelTokenizer", "read_tokenizer"]


def read_tokenizer(folder: Path, cache: Path | None) -> ModelTokenizer:
    """The tokenizer of a model folder, as AutoTokenizer reads it.

    Args:
        folder: of the model.
        cache: folder where what transformers made of it is kept; null: it is not kept.

    Raises:
        Exception: whatever transformers raises on files that are no tokenizer.
    """
    plain = read_plain(folder)
    if plain is not None:
        return plain
    return cached(folder, cache, read_by_transformers)
