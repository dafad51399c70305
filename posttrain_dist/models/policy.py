"""Policy: the module that an engine wraps; backbone, head and objective in one forward."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import nn

from posttrain_dist.errors import ModelError
from posttrain_dist.flow import Batch, Loss
from posttrain_dist.models import parity
from posttrain_dist.models.architectures.failures import named_failures
from posttrain_dist.models.architectures.known import DROPS_KEYWORDS, KEEPS_ROWS, TRAINED
from posttrain_dist.models.architectures.packing_check import check_packing
from posttrain_dist.models.architectures.row_keywords import hand_row_to_attention
from posttrain_dist.models.classifier.scalar_head import ScalarHead, compare_alone, head_module
from posttrain_dist.models.embeddings.neftune import EmbeddingNoise
from posttrain_dist.models.head import Head, HeadKernels
from posttrain_dist.models.last_layer import select_supervised_rows
from posttrain_dist.models.shape import ModelShape
from posttrain_dist.models.varlen import RowKeys


class Extends(Protocol):
    """A tuning, as far as the forward is concerned; see `tuning/base.py`."""

    @property
    def copies(self) -> int:
        """How often the row that `extend` gives holds the batch, one copy after the other."""

    def extend(self, batch: Batch) -> Batch:
        """The row that the model runs on."""

    def embed(self, model: nn.Module, batch: Batch) -> torch.Tensor | None:
        """Its embeddings [T, D]; None: the model's own."""

    def row_keywords(self, model: nn.Module, batch: Batch) -> dict[str, Any]:
        """More keywords for every attention."""

    def off(self, model: nn.Module) -> AbstractContextManager[None]:
        """What was inserted does nothing while the context lasts."""


class Policy(nn.Module):
    """A causal LM as `forward(batch, objective, denominators) -> Loss`.

    Args:
        causal_lm: a transformers `…ForCausalLM` with a backbone and an output embedding, or of a
            reward model a `…ForSequenceClassification` of one label.
        kernels: the fused operations of the head, handed over by the assembly.
        num_channels: C, rows of the channel table.
        tuning: what extends the rows, and embeds them; None: nothing does.
        neftune_alpha: of the noise on the embeddings while training; 0: none.
    """

    def __init__(
        self,
        causal_lm: nn.Module,
        kernels: HeadKernels,
        num_channels: int,
        tuning: Extends | None = None,
        neftune_alpha: float = 0.0,
    ) -> None:
        super().__init__()
        self.causal_lm = causal_lm
        self._tuning = tuning
        config: Any = causal_lm.config
        self.config = config
        self.shape = ModelShape.of(config.to_dict(), where="model.path")
        self._keeps_rows = config.model_type in KEEPS_ROWS
        with self._named_failures():
            if config.model_type in DROPS_KEYWORDS:
                hand_row_to_attention(self._backbone)
            select_supervised_rows(self._backbone, self._keeps_rows)
        self._noise: EmbeddingNoise | None = None
        if neftune_alpha:
            self._noise = EmbeddingNoise(neftune_alpha, causal_lm.get_input_embeddings())  # type: ignore[operator]
        module = head_module(causal_lm)
        self.head: Any
        if causal_lm.get_output_embeddings() is None:  # type: ignore[operator]
            self.head = ScalarHead(module, num_channels)
        else:
            self.head = Head(module, self.shape, kernels, num_channels)

    @property
    def _backbone(self) -> nn.Module:
        backbone: nn.Module = getattr(self.causal_lm, str(self.causal_lm.base_model_prefix))
        return backbone

    @property
    def copies(self) -> int:
        """How many models the tuning trains at once, each on every batch: E."""
        return 1 if self._tuning is None else self._tuning.copies

    def hidden(self, batch: Batch) -> torch.Tensor:
        """Last hidden states [E · N, D], after the final norm, of the rows `batch.supervised_N`.

        E is 1 but for an ensemble, whose copies stand one after the other.
        """
        batch = self._extended(batch)
        output = self._backbone(**self._inputs(batch), supervised_N=batch.supervised_N)
        hidden: torch.Tensor = output.last_hidden_state[0]
        return hidden.index_select(0, batch.supervised_N) if self._keeps_rows else hidden

    @contextmanager
    def base(self) -> Iterator[None]:
        """Be the model without what the tuning put into it and before its rows."""
        tuning, self._tuning = self._tuning, None
        try:
            with nullcontext() if tuning is None else tuning.off(self.causal_lm):
                yield
        finally:
            self._tuning = tuning

    def forward(self, batch: Batch, objective: Any, denominators: Any) -> Loss:
        """Loss of one micro-batch, divided by the step's global `denominators`.

        Of an ensemble it is the mean over its copies, as are `nll_N` and the sums of channels; a
        token is correct where more than half of the copies have it right.

        Raises:
            DataError: the batch lacks what the objective declares.
        """
        if self.copies > 1:
            return _mean(self.losses(batch, objective, denominators))
        objective.check_extra(batch)
        loss: Loss = objective.loss(self.hidden(batch), self.head, batch, denominators)
        return loss

    def losses(self, batch: Batch, objective: Any, denominators: Any) -> list[Loss]:
        """The loss of each of the E copies, from one pass over the backbone.

        Raises:
            DataError: the batch lacks what the objective declares.
        """
        objective.check_extra(batch)
        hidden_E = self.hidden(batch).tensor_split(self.copies)
        return [objective.loss(own, self.head, batch, denominators) for own in hidden_E]

    @torch.no_grad()
    def check_head(self, batch: Batch) -> float:
        """Compare `Head.loss` with the model's own logits; returns the largest difference.

        A softcap or logit scale that the fused head does not know, or a last layer that does more
        than the shortened one, would train another model than the one that is served. Of an
        architecture that docs/models.md does not list, each sample of the row is compared with
        itself alone under transformers' own attention, too, and so is every reward.

        Raises:
            ModelError: a token's loss differs by more than rounding, or the model's code fails.
        """
        if isinstance(self.head, ScalarHead):
            with self._named_failures():
                reward_N = self.head.reward(self.hidden(batch))
                return compare_alone(self.causal_lm, batch, reward_N)
        with self._named_failures():
            labels_N = batch.labels_N.repeat(self.copies)
            fused = self.head.loss(self.hidden(batch), labels_N, denominator=1.0).nll_N
            row = self._extended(batch)
            inputs = self._inputs(row)
            logits_TV = self.causal_lm(**inputs).logits[0]  # by no path of ours
        difference = self._compare(fused, logits_TV, row.supervised_N, labels_N)
        if self.config.model_type not in TRAINED:
            with self._named_failures():
                check_packing(self.causal_lm, inputs, logits_TV)
        return difference

    def _named_failures(self) -> AbstractContextManager[None]:
        return named_failures(type(self.causal_lm).__name__, "run on a packed row")

    def _compare(
        self,
        fused: torch.Tensor,
        logits_TV: torch.Tensor,
        rows_N: torch.Tensor,
        labels_N: torch.Tensor,
    ) -> float:
        logits_NV = logits_TV[rows_N].float()
        own = nn.functional.cross_entropy(logits_NV, labels_N, reduction="none")
        difference = float((fused - own).abs().max()) if len(own) else 0.0
        largest = float(own.abs().max()) if len(own) else 0.0
        tolerance = (2e-5 if logits_TV.dtype == torch.float32 else 3e-2) * max(1.0, largest)
        if not bool(own.isfinite().all()):
            raise ModelError(
                "the logits of the first row are NaN or infinite, though every weight is finite",
                where="model.path",
                fix="try train.dtype=float32; if it stays, config.json is not that of the weights",
            )
        if not difference <= tolerance:
            name = type(self.causal_lm).__name__
            raise ModelError(
                f"the fused loss differs from the logits of {name} by {difference:.2e} "
                f"(tolerance {tolerance:.0e}): its head does more than softcap and logit scale, or "
                "the MLP of its last layer mixes rows",
                where="model.path",
                fix="this architecture is not supported yet",
            )
        return difference

    @torch.no_grad()
    def check_parity(self, batch: Batch) -> dict[str, float]:
        """The fused head beside its reference on targets of `batch`; see models/parity.py.

        Collective over ranks that share a sharded head. A batch without targets differs by 0, and
        of a scalar head there is no fused operation to compare.

        Raises:
            ModelError: loss, a token's loss or a gradient differs by more than rounding.
        """
        if isinstance(self.head, ScalarHead):
            return {}
        dtype: torch.dtype = self.head.module.weight.dtype
        places_N = parity.some_targets(batch)
        weight_N = batch.weight_N[places_N]
        with self._named_failures():
            hidden_ND = self.hidden(batch)
        found = self.head.compare(
            hidden_ND[places_N],
            batch.labels_N[places_N],
            token_weight=weight_N,
            denominator=float(weight_N.sum()),
        )
        return parity.check(found, dtype)

    def _extended(self, batch: Batch) -> Batch:
        return batch if self._tuning is None else self._tuning.extend(batch)

    def _inputs(self, batch: Batch) -> dict[str, Any]:
        """Keywords of a backbone; those it does not know travel through it to the attention."""
        embeds_TD = None if self._tuning is None else self._tuning.embed(self.causal_lm, batch)
        if self._noise is not None and self.training:
            embeds_TD = self._noise.apply(embeds_TD, batch)
        tokens = {"input_ids": batch.input_ids_T[None]}
        if embeds_TD is not None:
            tokens = {"inputs_embeds": embeds_TD[None]}
        more = {} if self._tuning is None else self._tuning.row_keywords(self.causal_lm, batch)
        if max(batch.parent_S) >= 0 and "prefix" not in more:
            more = {**more, "row_keys": RowKeys.of(batch)}
        return {
            **tokens,
            **more,
            "position_ids": batch.position_ids_T[None],
            "cu_seqlens": batch.cu_seqlens_S,
            "bounds_S": batch.bounds_S,
            "max_seqlen": batch.max_seqlen,
            "parent_S": batch.parent_S,
            "use_cache": False,
        }


def _mean(losses: list[Loss]) -> Loss:
    """The mean of the losses of one batch; see `Policy.forward`."""
    total, channels, nll, correct, counted = zip(*losses, strict=True)
    return Loss(
        total=torch.stack(total).mean(),
        channels_CK=torch.stack(channels).mean(dim=0),
        nll_N=None if nll[0] is None else torch.stack(nll).mean(dim=0),
        correct_N=None if correct[0] is None else torch.stack(correct).sum(dim=0) * 2 > len(losses),
        counted_N=counted[0],
    )
