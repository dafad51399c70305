"""What an objective is, and the token loss that SFT and pretraining share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple

from posttrain_dist.errors import DataError, Rule
from posttrain_dist.flow import Column, Extra, Loss

if TYPE_CHECKING:
    from collections.abc import Mapping

    import torch

    from posttrain_dist.flow import Batch
    from posttrain_dist.models.head import Head


@dataclass(kw_only=True, slots=True)
class Objective:
    """The slot `objective`: a dataclass whose fields are its knobs.

    The loop first sums `count` over all micro-batches and ranks, because gradients are made in
    the forward; `loss` gets the sums, and what it returns is already normalised.

    Attributes:
        rows: what data it reads: "messages", "text", "pairs" (answers to one prompt that are
            compared), "labels" (single ones, desirable or not) or "scores".
        extra: what it needs in `Batch.extra`.
        columns: of its channel table. "loss" must be one, and its `per` a weight; "correct" is
            the accuracy of an evaluation. Every other one that no mean is taken by becomes a
            metric below the objective's name.
        own_rows: whether `hidden_ND` are the states of the targets themselves, which a scalar
            head reads; else of the tokens before them, which predict them.
        lr_factor: times the learning rate of the tuning, where `optimizer.lr` is null.
        counts_evaluation: whether an evaluation sums `count` over all held-out rows before it goes
            forward, because `evaluation_denominators` depend on them.
        no_dropout: whether dropout is switched off, of model and adapter: log-probabilities that
            are compared would be those of two different random models.
    """

    rows: ClassVar[str] = "messages"
    extra: ClassVar[tuple[Extra, ...]] = ()
    columns: ClassVar[tuple[Column, ...]] = ()
    own_rows: ClassVar[bool] = False
    lr_factor: ClassVar[float] = 1.0
    counts_evaluation: ClassVar[bool] = False
    no_dropout: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """What its metrics stand below."""
        return type(self).__name__.lower()

    def learning_rate(self, tuning_lr: float) -> float:
        """The peak learning rate where none is set.

        Args:
            tuning_lr: that of the tuning, which is for SFT.
        """
        return float(f"{tuning_lr * self.lr_factor:.6g}")

    def rules(self) -> list[Rule]:
        """What must hold among the values of the group."""
        return []

    @property
    def without_margin(self) -> str:
        """What of it a row's margin would be ignored by, so that it is refused; empty: nothing."""
        return ""

    @property
    def trains_answers(self) -> bool:
        """Whether what it trains writes answers to conversations, as generation can show."""
        return self.rows != "text" and not self.own_rows

    def check_extra(self, batch: Batch) -> None:
        """Compare `batch.extra` with what the objective declares.

        Raises:
            DataError: a declared field is missing, or not one number per token or sample.
        """
        for declared in self.extra:
            values = batch.extra.get(declared.name)
            size = len(batch.labels_N if declared.name.endswith("_N") else batch.sample_id_S)
            if values is not None and len(values) == size:
                continue
            found = "is not there" if values is None else f"has {len(values)} numbers, not {size}"
            raise DataError(
                f"the objective {self.name} needs {declared.name} in every batch, and it {found}",
                where=f"samples {batch.sample_id_S[:4]}",
                fix="the source of the batches must fill Example.extra; data files do not",
            )

    def derived(self, sums: Mapping[str, float]) -> dict[str, float]:
        """Metrics of held-out rows that are no quotient of two columns, of one row of the table.

        Args:
            sums: of every column.
        """
        return {}

    def figures(self, sums: Mapping[str, float]) -> dict[str, Any]:
        """What is drawn of held-out rows, by name, of one row of the table.

        Args:
            sums: of every column.
        """
        return {}

    def count(self, batch: Batch) -> NamedTuple:
        """The share of this micro-batch in each of the step's denominators.

        Returns:
            A NamedTuple of floats, one field per component of the loss; of the same type for
            every batch, fillers too.
        """
        raise NotImplementedError

    def evaluation_denominators(self, counts: Any) -> Any:
        """What `loss` gets in an evaluation: ones, because sums are wanted.

        Args:
            counts: of one batch; with `counts_evaluation` the sums over all held-out rows.
        """
        return counts._make([1.0] * len(counts))

    def loss(self, hidden_ND: torch.Tensor, head: Head, batch: Batch, denominators: Any) -> Loss:
        """Loss of one micro-batch, divided by `denominators`.

        Padding (weight 0) must be dropped by `torch.where`, never by multiplying with 0: its
        fields in `batch.extra` are 0, of which a logarithm or quotient is not finite.

        Args:
            hidden_ND: last hidden states of the rows `batch.supervised_N`, in that order.
            head: the fused loss and log-probabilities.
            denominators: sums of `count` over micro-batches and ranks, of its type; a component
                that nothing of the step counts in is 0.
        """
        raise NotImplementedError


class TokenCount(NamedTuple):
    """What a token loss is divided by."""

    tokens: float  # sum of the token weights


@dataclass(kw_only=True, slots=True)
class TokenLoss(Objective):
    """Cross-entropy of the supervised tokens.

    Reference, with logits_NV = head(hidden_ND):

        loss = (F.cross_entropy(logits_NV, labels_N, reduction="none") * weight_N).sum()
        loss = loss / denominators.tokens
    """

    columns: ClassVar[tuple[Column, ...]] = (
        Column("loss", per="weight"),
        Column("weight"),
        Column("correct", per="count"),
        Column("count"),
    )

    def count(self, batch: Batch) -> TokenCount:
        """Sum of the token weights."""
        return TokenCount(tokens=batch.weight_sum)

    def loss(
        self, hidden_ND: torch.Tensor, head: Head, batch: Batch, denominators: TokenCount
    ) -> Loss:
        """Fused with the head."""
        result = head.loss(
            hidden_ND,
            batch.labels_N,
            token_weight=batch.weight_N,
            channel=batch.channel_N,
            denominator=denominators.tokens,
        )
        return Loss(result.loss, result.channels_C4, result.nll_N, result.correct_N)
