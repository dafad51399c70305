"""The nouns of training, in their order of flow. Read this file first.

    file line -> Record -> Example -> Batch -> Loss -> StepInfo -> sinks, checkpoint

Shape legend, used in names all over the project:
    T  tokens of one packed row            S  samples in the row
    N  supervised tokens of the row        D  hidden size
    V  vocabulary                          C  channels
    K  columns of the channel table

A preference is a unit of samples: the prompt, and behind it each answer (`Example.parent`), with

    role_S    -1 of a prompt and in fillers, 0 of an answer, 1 of an answer to another prompt (KTO)
    value_S   what an answer is worth: of two, the higher one is preferred; 0 of a prompt
    margin_S  by how much at least, of the preferred one of a pair; else 0
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from enum import Enum
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

# ------------------------------------------------------------------------------------- data


# {"role", "content"} and what the chat template reads beside them: "tool_calls", "tool_call_id",
# "name", "reasoning_content".
Message = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Answer:
    """One of the answers that a row compares or rates, and what it is worth."""

    messages: tuple[Message, ...]  # begins with a turn of the assistant
    value: float  # the higher one is preferred; a score; 1 desirable and 0 undesirable
    margin: float = 0.0  # by how much at least, of the preferred one of a pair


@dataclass(frozen=True, slots=True)
class Record:
    """One row as the user wrote it, already validated, whatever format it came in.

    A row holds one of: `messages` (of a row with `answers`: what each of them follows), `text`,
    `input_ids`.
    """

    channel: str  # the row's `task_type`, else the name of its file
    where: str  # "file:line", for every message about this row
    messages: tuple[Message, ...] = ()
    tools: tuple[dict[str, Any], ...] = ()  # descriptions, as the chat template takes them
    # What the chat template reads beside these: the row's `chat_template_kwargs`.
    variables: Mapping[str, Any] = field(default_factory=dict)
    # One per message: its weight in the loss, 0 for none, null as the mask policy says; or empty.
    weights: tuple[float | None, ...] = ()
    weight: float = 1.0  # of the whole row, times those of its turns; 0: the row is left out
    text: str | None = None  # a row that no chat template is applied to
    supervised_from: int = 0  # characters of `text` that are the prompt
    input_ids: tuple[int, ...] = ()
    labels: tuple[int, ...] = ()  # one per token of `input_ids`, the token itself or -100
    answers: tuple[Answer, ...] = ()  # that are compared or rated; as the row has them
    check: str | None = None  # "exact": the last assistant turn is the one right answer
    reference: dict[str, Any] = field(default_factory=dict)  # other columns of a prompt-only row
    notes: tuple[str, ...] = ()  # the checks that it failed when it was read


@dataclass(frozen=True, slots=True)
class Example:
    """A sample as tokens. `weight_L[i]` is the weight of token i as a TARGET (0 = masked)."""

    input_ids_L: npt.NDArray[np.int32]
    weight_L: npt.NDArray[np.float32]
    channel: int  # index into the run's list of channel names
    sample_id: int  # position of the sample in its data set, stable over epochs
    truncated: bool = False  # the row was longer than data.max_length
    # For `Batch.extra`: `name_L`, one number per token, becomes `name_N` of the supervised ones;
    # `name_S` is one number. Whole numbers stay whole.
    extra: Mapping[str, npt.NDArray[np.generic] | float] = field(default_factory=dict)
    # sample_id of the sample whose tokens this one follows: the nearest before it in the row.
    parent: int | None = None
    # Samples of one unit stand side by side and are never split over packs: a prompt and the
    # answers to it that are compared. None: the sample is a unit of its own.
    unit: int | None = None


class By(Enum):
    """Who fills a field of `Batch.extra`."""

    data = "data"  # the prepared data has it
    model = "model"  # a model that answers are scored by, before the step
    source = "source"  # whatever else makes batches; data files do not


@dataclass(frozen=True, slots=True)
class Extra:
    """A field of `Batch.extra` that an objective needs.

    Attributes:
        name: `..._N`, one number per supervised token, or `..._S`, one per sample.
        index: int64, where -1 means none, as a filler has it; else float32, where it has 0.
        by: who fills it.
    """

    name: str
    index: bool = False
    by: By = By.source


@dataclass(slots=True)
class Batch:
    """One packed row: samples laid end to end, no padding between them.

    The model input is T tokens; the loss needs only the N supervised positions. `labels_N` is
    already shifted: the hidden state at `supervised_N[i]` predicts `labels_N[i]`.
    Attention and positions never cross a sample, but for a sample with a parent: its tokens
    follow those of the parent (and of the parent's parent), which are in the row once however
    many samples follow them. The parent's last hidden state predicts each one's first token.
    """

    input_ids_T: torch.Tensor  # int64
    position_ids_T: torch.Tensor  # int64, restarts at 0 with every root, goes on in its children
    cu_seqlens_S: list[int]  # S + 1 host integers: sample s is [cu[s], cu[s + 1])
    bounds_S: torch.Tensor  # int32, the same on the device, for kernels
    max_seqlen: int  # tokens of the longest sample
    # N is a multiple of 128, so that few shapes occur: behind the `num_targets` real ones the last
    # of them is repeated with weight 0.
    supervised_N: torch.Tensor  # int64, positions in the row whose hidden state is used
    labels_N: torch.Tensor  # int64, the token that each such position predicts
    channel_N: torch.Tensor  # int64, channel of each supervised token
    sample_N: torch.Tensor  # int64, the sample of the row that each supervised token belongs to
    weight_N: torch.Tensor  # float32; 0 only in padding and fillers
    num_targets: int
    weight_sum: float  # of weight_N, in float64
    sample_id_S: list[int]  # -1 for a filler
    parent_S: list[int]  # an earlier sample of the row; -1: none, the sample is a root
    unit_S: list[int]  # samples of one unit have one number, from 0
    targets_S: list[int]  # real targets of each sample
    # What objectives need beyond this: `..._N` per supervised token (0 in padding), `..._S` per
    # sample.
    extra: dict[str, torch.Tensor] = field(default_factory=dict)
    # The `..._S` of them once more, on the host: to count by, without a device sync.
    host_S: dict[str, list[float]] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        """Real tokens of the row: those of fillers are not counted."""
        bounds = zip(pairwise(self.cu_seqlens_S), self.sample_id_S, strict=True)
        return sum(end - start for (start, end), sample_id in bounds if sample_id >= 0)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch with its tensors on `device`; the host does not wait for the copy."""
        import torch

        device = torch.device(device)
        pin = device.type == "cuda"  # a copy from pageable memory makes the host wait

        def move(value: Any) -> Any:
            if isinstance(value, dict):
                return {name: move(entry) for name, entry in value.items()}
            if not isinstance(value, torch.Tensor):
                return value
            source = value.pin_memory() if pin and not value.is_cuda else value
            return source.to(device, non_blocking=True)

        return Batch(**{f.name: move(getattr(self, f.name)) for f in fields(self)})


# ------------------------------------------------------------------------------------- loss


@dataclass(frozen=True, slots=True)
class Column:
    """A column of an objective's channel table: a sum over samples or tokens of a channel.

    The metric is sum(name) / sum(per), over micro-batches, ranks and steps; without `per` it is
    the sum itself.
    """

    name: str
    per: str | None = None  # another column
    part: bool = False  # of what `Objective.derived` makes, and no metric itself


class Loss(NamedTuple):
    """What an objective returns for one micro-batch.

    A tuple, because the hooks of ZeRO-3 find the tensors of tuples and dicts only.

    `total` is already divided by the step's global denominators, so that the totals of all
    micro-batches on all ranks add up to the loss of the step. `channels_CK` is detached: the
    objective's `columns`, one row per channel; sums, so they add up too.
    """

    total: torch.Tensor  # scalar, carries the gradient
    channels_CK: torch.Tensor  # float32 [C, K]
    nll_N: torch.Tensor | None = None  # detached float32, unweighted loss of each token
    correct_N: torch.Tensor | None = None  # bool: no other token exceeds the label
    # What a token counts in metrics of single tokens; None: `Batch.weight_N`. Of a preference the
    # tokens of answers that are not wanted count 0.
    counted_N: torch.Tensor | None = None


# ------------------------------------------------------------------------------------- step


@dataclass(slots=True)
class StepInfo:
    """One line of metrics.jsonl. Step k means: after k updates; step 0 is before training."""

    step: int
    metrics: dict[str, float] = field(default_factory=dict)  # name -> value; empty: not logged
    sample_ids: list[int] = field(default_factory=list)  # of all ranks, for samples.log
    last: bool = False  # the run ends after this step
    stopped: bool = False  # ... because someone asked it to stop
    # ... because this update was not finite, and the weights are lost; 0: none was.
    nonfinite_step: int = 0

    def row(self) -> dict[str, Any]:
        """The object written to metrics.jsonl."""
        return {"step": self.step, **self.metrics}
