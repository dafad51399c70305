"""The two protocols of generation, and the values that pass through them. Imports no torch.

    TokenGenerator   token ids -> token ids with log-probs, of weights that can be updated
    TextGenerator    chat -> text

One class may be both, as `local.LocalGenerator` is.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from posttrain_dist.data.chat.rendering.served import Prompt
from posttrain_dist.errors import ConfigError

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True, kw_only=True, slots=True)
class Sampling:
    """How tokens are chosen.

    Raises:
        ConfigError: a value is out of its range.
    """

    max_new_tokens: int = 256  # per completion
    temperature: float = 0.0  # 0: greedy, the most probable token; the two below do not matter
    top_p: float = 1.0  # only the most probable tokens that together have this probability
    top_k: int = 0  # only this many most probable tokens; 0: all
    # The same seed, prompts and weights give the same tokens on one machine; None: torch's own
    # random state decides and moves on.
    seed: int | None = None
    # Which of a generator's adapters answers; "none": the base model; None: what was loaded.
    adapter: str | None = None

    def __post_init__(self) -> None:
        ranges = {
            "max_new_tokens": (self.max_new_tokens >= 1, "1 or more"),
            "temperature": (0 <= self.temperature < math.inf, "0 or more"),
            "top_p": (0 < self.top_p <= 1, "above 0 and at most 1"),
            "top_k": (self.top_k >= 0, "0 or more"),
        }
        for name, (inside, wanted) in ranges.items():
            if not inside:
                what = f"is {getattr(self, name)}, must be {wanted}"
                raise ConfigError(what, where=name, fix="correct this sampling setting")


class StopReason(Enum):
    """Why a completion ends."""

    end_token = "end_token"
    length = "length"  # max_new_tokens was reached


@dataclass(frozen=True, slots=True)
class Completion:
    """The tokens that follow one prompt."""

    token_ids: list[int]  # the end token included
    # One per token, in nats: of the model's own distribution, before temperature, top_k and top_p.
    log_probs: list[float]
    stop_reason: StopReason
    version: int  # of the weights, as `TokenGenerator.update` was given it; 0: as loaded


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer to one conversation."""

    text: str  # its words, special tokens stripped
    stop_reason: StopReason
    thoughts: str = ""  # that stand before them; they are no part of `text`

    @property
    def shown(self) -> str:
        """Both, for people."""
        return f"{self.thoughts}\n\n{self.text}" if self.thoughts else self.text


class TokenGenerator(Protocol):
    """Completes and scores token ids."""

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling) -> list[Completion]:
        """One completion per prompt, in the given order. No prompt may be empty."""

    def score(self, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
        """The log-prob, in nats, of each token given those before it.

        The first token of a sequence has none: of n tokens there are n - 1 values.
        """

    def update(self, tensors: Iterable[tuple[str, torch.Tensor]], version: int) -> str:
        """Replace every weight, and return the `weight_digest` of what is served from now on.

        Args:
            tensors: (name in the Hugging Face model, whole tensor), each valid until the next;
                of tied ones one is enough. They are cast to the dtype that is served.
            version: what completions name as the version of their weights.

        Raises:
            ModelError: a name is unknown or missing, or a shape differs. From then on nothing is
                generated until an update succeeds, because the weights may be of two versions.
        """


class TextGenerator(Protocol):
    """Answers conversations. Each ends with the turn to be answered (user or tool)."""

    def reply(self, prompts: Sequence[Prompt], sampling: Sampling) -> list[Reply]:
        """The answer to each conversation, in the given order."""

    def stream(self, prompt: Prompt, sampling: Sampling) -> Generator[str, None, Reply]:
        """Yield the answer piece by piece, thoughts too; closing it stops the generation.

        Returns:
            The whole answer.
        """
