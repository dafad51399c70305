"""What dies inside a model's own code, as an error that names the architecture."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from posttrain_dist.errors import ModelError, PosttrainError, is_out_of_memory

_log = logging.getLogger(__name__)
# Of the machine or of other ranks, whatever the architecture.
_NOT_OF_THE_MODEL = (PosttrainError, OSError, torch.distributed.DistError)


@contextmanager
def named_failures(name: str, step: str) -> Iterator[None]:
    """Turn any exception of the model's code into a ModelError; the log keeps where it was.

    Args:
        name: of the architecture, `LlamaForCausalLM`.
        step: what is done inside, the end of `... cannot be`: "loaded".

    Raises:
        ModelError: whatever went wrong inside, unless memory, files or ranks are to blame.
    """
    try:
        yield
    except _NOT_OF_THE_MODEL:
        raise
    except Exception as error:
        if is_out_of_memory(error):
            raise
        _log.info("%s cannot be %s", name, step, exc_info=True)
        first = (str(error).splitlines() or [""])[0]
        raise ModelError(
            f"{name} cannot be {step}: {type(error).__name__}: {first}",
            where="model.path",
            fix="use an architecture that docs/models.md lists as trained; if it does list this "
            "one, config.json is not that of the weights, or this is a bug to be reported",
        ) from error
