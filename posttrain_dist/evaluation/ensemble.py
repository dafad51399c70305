"""An ensemble of soft prompts on held-out rows: each prompt's score, the vote and the average.

Letters of shapes: E prompts, N supervised tokens, V vocabulary, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch

    from posttrain_dist.models.policy import Policy
    from posttrain_dist.tuning.base import AdapterTuning

# Numbers of [E, rows, V] that are alive at once.
_CHUNK = 1 << 26


class Rows(Protocol):
    """The held-out rows; `adapter_losses.HeldOut`."""

    channels: list[str]
    device: torch.device

    def batches(self) -> Any:
        """All of them, packed."""


def evaluate_ensemble(
    name: str, prompts: Mapping[str, AdapterTuning], policy: Policy, heldout: Rows
) -> dict[str, dict[str, Any]]:
    """Score prompts of one size that were trained for one task (Lester et al., arXiv:2104.08691).

    The average is of the prompts' probabilities: log (1/E sum_e p_e). The vote is the token that
    most prompts find most probable; among equal votes, the one with the highest average.

    Args:
        name: of the ensemble.
        prompts: name -> tuning, whose `init_from` is the prompt's folder.
        policy: with the first of them attached.

    Returns:
        {prompt: result, "NAME average": result, "NAME vote": accuracies alone}, each as
        `heldout.evaluate` returns it, with "channel_accuracy" beside it.
    """
    import torch

    tensors = [_tensors_of(tuning, policy) for tuning in prompts.values()]
    columns = [*prompts, f"{name} average", f"{name} vote"]
    # loss sum, weight, correct, count
    table_CX4 = torch.zeros(len(heldout.channels), len(columns), 4, dtype=torch.float64)
    policy.eval()
    with torch.no_grad():
        for each in heldout.batches():
            batch = each.to(heldout.device)
            hidden_END = torch.stack([_hidden(policy, one, batch) for one in tensors])
            nll_XN, correct_XN = _scores(policy, hidden_END, batch.labels_N)
            weight_N = batch.weight_N.double()
            counted_N = (weight_N > 0).double()
            rows_XN4 = torch.stack(
                [
                    torch.where(weight_N > 0, nll_XN * weight_N, 0.0),
                    weight_N.expand_as(nll_XN),
                    correct_XN * counted_N,
                    counted_N.expand_as(nll_XN),
                ],
                dim=-1,
            ).cpu()
            table_CX4.index_add_(0, batch.channel_N.cpu().long(), rows_XN4.transpose(0, 1))
    results = {c: _result(table_CX4[:, x], heldout.channels) for x, c in enumerate(columns)}
    results[columns[-1]] |= {"loss": None, "channels": {}}
    return results


def _tensors_of(tuning: AdapterTuning, policy: Policy) -> dict[str, torch.Tensor]:
    from posttrain_dist.tuning.adapters.adapter_folder import read_adapter

    config: Any = policy.config
    return tuning.from_adapter(read_adapter(Path(str(tuning.init_from))), config.to_dict())


def _hidden(policy: Policy, tensors: Mapping[str, torch.Tensor], batch: Any) -> torch.Tensor:
    """Hidden states [N, D] of a row behind one prompt."""
    from posttrain_dist.tuning.base import fill_parameters

    fill_parameters(policy.causal_lm, tensors)
    return policy.hidden(batch)


def _scores(
    policy: Policy, hidden_END: torch.Tensor, labels_N: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Negative log-probs and hits [E + 2, N] of the prompts, of their average, of the vote."""
    import torch

    num_prompts = len(hidden_END)
    rows = max(1, _CHUNK // (num_prompts * policy.shape.vocab_size))
    nll, correct = [], []
    for start in range(0, len(labels_N), rows):
        labels_R = labels_N[start : start + rows]
        log_p_ERV = _logits(policy, hidden_END[:, start : start + rows]).log_softmax(-1)
        mean_RV = log_p_ERV.logsumexp(0) - math.log(num_prompts)
        found_XRV = torch.cat([log_p_ERV, mean_RV[None]])
        at_XR1 = labels_R.expand(len(found_XRV), -1)[..., None]
        nll_XR = -found_XRV.gather(-1, at_XR1)[..., 0].double()
        top_XR = found_XRV.argmax(-1)
        # A vote weighs more than any difference of probabilities, which only breaks ties.
        top_RE = top_XR[:num_prompts].T
        votes_RV = mean_RV.exp().scatter_add(-1, top_RE, mean_RV.new_full(top_RE.shape, 2.0))
        hits_XR = torch.cat([top_XR, votes_RV.argmax(-1)[None]]) == labels_R
        nll.append(torch.cat([nll_XR, nll_XR[-1:]]))
        correct.append(hits_XR.double())
    return torch.cat(nll, dim=1), torch.cat(correct, dim=1)


def _logits(policy: Policy, hidden: torch.Tensor) -> torch.Tensor:
    """float32 [..., V], with the scale and cap of the model's own head."""
    logits: torch.Tensor = policy.head.module(hidden).float() * policy.shape.logit_scale
    cap = policy.shape.softcap
    return logits if not cap else (logits / cap).tanh() * cap


def _result(table_C4: torch.Tensor, channels: list[str]) -> dict[str, Any]:
    loss, weight, correct, count = table_C4.sum(0).tolist()
    rows = {c: row for c, row in zip(channels, table_C4.tolist(), strict=True) if row[1] > 0}
    return {
        "loss": loss / weight,
        "accuracy": correct / count,
        "channels": {channel: row[0] / row[1] for channel, row in rows.items()},
        "channel_accuracy": {channel: row[2] / row[3] for channel, row in rows.items()},
    }
