"""What is put into transformers' `generate`: log-probs of chosen tokens, and a way to stop it.

Letters of shapes: B rows of a batch, T tokens of a row, V vocabulary.
"""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch


class LogProbRecorder:
    """A logits processor of transformers that changes nothing and keeps the tokens' log-probs.

    It stands before temperature, top_k and top_p. Only one step's [B, V] is alive: which token
    was chosen is seen at the next step.
    """

    def __init__(self) -> None:
        self._newest_BV: torch.Tensor | None = None
        self._steps_B: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Take in one step."""
        if self._newest_BV is not None:
            self._take(input_ids[:, -1])
        self._newest_BV = scores.float().log_softmax(-1)
        return scores

    def log_probs(self, last_B: torch.Tensor) -> torch.Tensor:
        """[B, T] of all new tokens, once the last of them, `last_B`, is known."""
        import torch

        self._take(last_B)
        return torch.stack(self._steps_B, dim=1)

    def _take(self, chosen_B: torch.Tensor) -> None:
        assert self._newest_BV is not None
        self._steps_B.append(self._newest_BV.gather(-1, chosen_B[:, None])[:, 0])


class StopWhenSet:
    """A stopping criterion of transformers: every row is done once the event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Whether each row is done."""
        import torch

        return torch.full((input_ids.shape[0],), self.event.is_set(), device=input_ids.device)
