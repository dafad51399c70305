"""Attention over one packed row: every sample attends to itself alone, and to its parents.

With prefix tuning, to the prefix of its layer before that: keys and values in the keyword `prefix`.

Registered with transformers' AttentionInterface, so that the model classes stay untouched. The
sample bounds travel as keywords through the backbone: `cu_seqlens` and `parent_S` (host integers),
and for kernels `bounds_S` (int32 on the device), `max_seqlen` and, where samples follow others,
`row_keys`. No [T, T] mask is built, and no mask function is registered: transformers then makes
none, nor waits for the device to look for packs.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface

from posttrain_dist.errors import ModelError
from posttrain_dist.models import Attention
from posttrain_dist.models.varlen import (
    AttentionArgs,
    AttentionRequirements,
    RowPrefix,
    flash_attention,
    flash_missing,
    varlen,
    varlen_missing,
)

SDPA, EAGER = "posttrain_sdpa", "posttrain_eager"
VARLEN, FLASH = "posttrain_varlen", "posttrain_flash"

_log = logging.getLogger(__name__)

ROW_KEYWORDS = ("cu_seqlens", "bounds_S", "max_seqlen", "parent_S", "row_keys", "prefix")
# What layers hand to their attention beside its own keywords: the row, and what attention inside
# a sample does not depend on. Whatever else there is would be left out without a word.
_KNOWN = {
    *(*ROW_KEYWORDS, "supervised_N", "position_ids", "is_causal"),
    *("use_cache", "output_attentions", "output_hidden_states", "return_dict"),
}


def register() -> None:
    """Make all implementations known to transformers; may be called again."""
    AttentionInterface.register(SDPA, _for_transformers(_sample_by_sample(_sdpa)))
    AttentionInterface.register(EAGER, _for_transformers(_sample_by_sample(_eager)))
    AttentionInterface.register(VARLEN, _for_transformers(varlen))
    AttentionInterface.register(FLASH, _for_transformers(flash_attention))


def _for_transformers(attend: Callable[..., torch.Tensor]) -> Callable[..., Any]:
    """`attend(query, key, value, args)` as the layers of transformers call it."""

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        *,
        scaling: float | None = None,
        dropout: float = 0.0,
        sliding_window: int | None = None,
        softcap: float | None = None,
        **row: Any,
    ) -> tuple[torch.Tensor, None]:
        _refuse_unknown(module, attention_mask, row)
        prefix: RowPrefix | None = row.get("prefix")
        args = AttentionArgs(
            scaling=query.shape[-1] ** -0.5 if scaling is None else scaling,
            dropout=dropout,
            window=sliding_window,
            softcap=softcap,
            cu_seqlens=row["cu_seqlens"],
            bounds_S=row.get("bounds_S"),
            max_seqlen=row.get("max_seqlen"),
            parent_S=row.get("parent_S"),
            keys=row.get("row_keys") if prefix is None else prefix.keys,
            prefix_kv=_layer_prefix(module, prefix, key, value),
        )
        return attend(query, key, value, args), None

    return attention


def _refuse_unknown(
    module: torch.nn.Module, attention_mask: torch.Tensor | None, row: dict[str, Any]
) -> None:
    """Refuse a layer that asks its attention for what this one would not do."""
    others = [name for name, value in row.items() if value is not None and name not in _KNOWN]
    name, what = type(module).__name__, ""
    if row.get("cu_seqlens") is None:
        what = f"{name} is not told where samples begin"
    elif attention_mask is not None:
        what = f"{name} has an attention mask of its own"
    elif row.get("is_causal") is False or getattr(module, "is_causal", None) is False:
        what = f"{name} attends in both directions"
    elif others:
        what = f"{name} gives its attention {others[0]}, which is not known here"
    if what:
        raise ModelError(
            f"{what}: over packed rows its attention would be another one",
            where="model.path",
            fix="use an architecture that docs/models.md lists as trained",
        )


def _layer_prefix(
    module: torch.nn.Module, prefix: RowPrefix | None, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor | None:
    """The prefix of one layer, [2, H, k, d]; None: there is none, or it has no key.

    Raises:
        ModelError: the layer does not say which it is, or its heads are not those of the prefix.
    """
    if prefix is None or not prefix.kv_L[0].shape[2]:
        return None
    layer = getattr(module, "layer_idx", None)
    what = "" if isinstance(layer, int) and layer < len(prefix.kv_L) else "does not know its layer"
    if not what:
        found = prefix.kv_L[layer]  # type: ignore[index]
        sizes = [(x.shape[1], x.shape[3]) for x in (key, value, *found[:, None])]
        if len(set(sizes)) == 1:
            return found
        what = f"has keys of {sizes[0]} and values of {sizes[1]} (heads, width), not {sizes[2]}"
    raise ModelError(
        f"{type(module).__name__} {what}, so that it cannot have a prefix",
        where="tuning",
        fix="use tuning=prompt or tuning=lora",
    )


def implementation(choice: Attention, requirements: AttentionRequirements) -> str:
    """The registered name for a config value; the log says which and why.

    Raises:
        ModelError: what was asked for cannot serve this model here.
    """
    name, reason = _choose(choice, requirements)
    _log.info("attention: %s, %s", name.removeprefix("posttrain_"), reason)
    return name


def _choose(choice: Attention, requirements: AttentionRequirements) -> tuple[str, str]:
    capped = f"the model caps its attention logits at {requirements.softcap}"
    no_varlen = varlen_missing(requirements)
    if choice is Attention.varlen and no_varlen:
        raise ModelError(no_varlen, where="model.attention", fix="use model.attention=auto")
    if choice is Attention.sdpa and requirements.softcap:
        what = f"{capped}, which sdpa cannot do"
        raise ModelError(what, where="model.attention", fix="use model.attention=auto")
    if choice is not Attention.auto:
        names = {Attention.varlen: VARLEN, Attention.sdpa: SDPA, Attention.eager: EAGER}
        return names[choice], "as model.attention says"
    if not no_varlen:
        return VARLEN, "one kernel for the whole row"
    if not flash_missing(requirements):
        return FLASH, f"flash-attn is installed, and of torch's own: {no_varlen}"
    return (EAGER, capped) if requirements.softcap else (SDPA, f"sample by sample: {no_varlen}")


# --------------------------------------------------------------------------- sample by sample


def _sample_by_sample(attend: Any) -> Callable[..., torch.Tensor]:
    """Apply `attend` to each sample of the row; heads first: query [1, H, T, d].

    Cut and joined by one operation each: a slice a sample would fill the whole row with zeros in
    backward, once for every sample. There is no choice by length: on a CPU with AVX2, in float32,
    forward and backward of sdpa's flash kernel beat its `math` backend at 16 to 1024 tokens and
    heads of 32, 64 and 128 (1.1 to 5.7 times), and shared heads without copies beat repeated ones.
    """

    def row(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, args: AttentionArgs
    ) -> torch.Tensor:
        lengths = [end - start for start, end in pairwise(args.cu_seqlens)]
        queries, keys, values = (list(torch.split(x, lengths, dim=2)) for x in (query, key, value))
        parent_S = args.parent_S or [-1] * len(lengths)
        outputs = []
        for sample, parent in enumerate(parent_S):
            if parent >= 0:  # an earlier sample: its own already stand behind its parent's
                keys[sample] = torch.cat([keys[parent], keys[sample]], dim=2)
                values[sample] = torch.cat([values[parent], values[sample]], dim=2)
            elif args.prefix_kv is not None:
                # Cast for each sample, so that the gradients of all are added up in float32.
                before = args.prefix_kv.to(key.dtype)[:, None]
                keys[sample] = torch.cat([before[0], keys[sample]], dim=2)
                values[sample] = torch.cat([before[1], values[sample]], dim=2)
            q, k, v = queries[sample], keys[sample], values[sample]
            mask = _mask(q.shape[2], k.shape[2], args.window, query.device)
            outputs.append(attend(q, k, v, mask, args).transpose(1, 2))
        return torch.cat(outputs, dim=1)

    return row


def _mask(
    length: int, num_keys: int, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """[length, num_keys] booleans (True: may attend) of the last `length` of `num_keys` tokens,
    where they follow others or a window cuts them; None: plain causal.
    """
    if length == num_keys and (window is None or length <= window):
        return None
    place = torch.arange(num_keys, device=device)
    distance = place[num_keys - length :, None] - place[None, :]
    seen = distance >= 0
    return seen if window is None else seen & (distance < window)


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    args: AttentionArgs,
) -> torch.Tensor:
    if args.softcap:
        raise ModelError("a layer caps its attention logits, which sdpa cannot do")
    options = {
        "attn_mask": mask,
        "is_causal": mask is None,
        "dropout_p": args.dropout,
        "scale": args.scaling,
    }
    if q.is_cuda:  # shared heads there leave only the slow backend in float32 or with a mask
        k, v = _shared(k, q), _shared(v, q)
        return scaled_dot_product_attention(q, k, v, **options)  # type: ignore[arg-type]
    return scaled_dot_product_attention(q, k, v, enable_gqa=True, **options)  # type: ignore[arg-type]


def _eager(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    args: AttentionArgs,
) -> torch.Tensor:
    """softmax(softcap · tanh(q kᵀ · scaling / softcap) + causal) v, softmax in float32."""
    k, v = _shared(k, q), _shared(v, q)
    scores = torch.matmul(q, k.transpose(-1, -2)) * args.scaling
    if args.softcap:
        scores = args.softcap * torch.tanh(scores / args.softcap)
    if mask is None:
        length = q.shape[2]
        mask = torch.ones(length, length, dtype=torch.bool, device=q.device).tril()
    scores = scores.masked_fill(~mask, float("-inf"))
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(v.dtype)
    weights = torch.nn.functional.dropout(weights, p=args.dropout, training=args.dropout > 0)
    return torch.matmul(weights, v)


def _shared(x: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A key or value head for each query head."""
    groups = query.shape[1] // x.shape[1]
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)
