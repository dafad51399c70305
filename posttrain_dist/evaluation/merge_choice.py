"""Which weights of a quantised base take in an adapter: measured on held-out rows.

The adapter was trained beside NF4 weights. Merged into the 16-bit weights of the files it stands
beside others than it was trained beside; merged into what NF4 made of them, it keeps their error.
Which of the two is nearer to base + adapter differs, so both are measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from posttrain_dist.config import RunConfig
from posttrain_dist.errors import DataError
from posttrain_dist.tuning.adapters.merged_tensors import MergeInto

if TYPE_CHECKING:
    import torch

    from posttrain_dist.evaluation.adapter_losses import HeldOut
    from posttrain_dist.models.policy import Policy

# Supervised tokens that are compared: the mean difference is known to about a per cent.
MAX_TOKENS = 4096


class MergeChoice(NamedTuple):
    """What takes the adapter in, and why."""

    into: MergeInto
    facts: dict[str, str]  # for the model card: label -> value
    text: str  # for the user; empty: nothing was chosen


class _Measured(NamedTuple):
    loss: float
    difference: float  # mean absolute, of each token's loss to that of base + adapter


def choose_weights(
    config: RunConfig, prepared: Path, kept: Mapping[str, torch.Tensor], dtype: torch.dtype
) -> MergeChoice:
    """The weights whose merged model is nearer to NF4 base + adapter, by each token's loss.

    Args:
        config: of the run; its base is not quantised in its files.
        prepared: its prepared data.
        kept: every tensor that the tuning keeps, whole.
        dtype: what the merged model will be written in.
    """
    from posttrain_dist.evaluation.adapter_losses import HeldOut
    from posttrain_dist.models.folder import resolve

    try:
        heldout = HeldOut(config, prepared)
        batches = list(_bounded(heldout))
    except DataError:  # the prepared data is gone
        batches = []
    if not batches:
        return _unmeasured("there are no held-out rows")
    base = resolve(config.model.path)
    if (device := _device_of(base, heldout.device)) is None:
        return _unmeasured("the base has no room in memory in 16 bits")
    wanted_N = _reference(heldout, batches, kept)
    measured = {}
    for into, loss_N in _merged(heldout.on(device), base, batches, kept, dtype):
        difference = float((loss_N - wanted_N).abs().mean())
        measured[into] = _Measured(float(loss_N.mean()), difference)
    nearest = min(MergeInto, key=lambda into: measured[into].difference)
    return MergeChoice(nearest, *_described(nearest, measured, wanted_N))


def _unmeasured(why: str) -> MergeChoice:
    """What the adapter was trained beside."""
    facts = {"merged into": f"the dequantised NF4 weights; not measured: {why}"}
    text = f"{why}, so nothing is measured: merged into what NF4 made of the weights"
    return MergeChoice(MergeInto.dequantised, facts, text)


def _described(
    nearest: MergeInto, measured: Mapping[MergeInto, _Measured], wanted_N: torch.Tensor
) -> tuple[dict[str, str], str]:
    """Facts and text of a choice."""
    names = {
        MergeInto.original: "the original weights",
        MergeInto.dequantised: "the dequantised NF4 weights",
    }
    tokens = f"{len(wanted_N):,} held-out tokens"
    facts = {
        "merged into": names[nearest],
        "loss of NF4 base + adapter": f"{float(wanted_N.mean()):.4f} ({tokens})",
    }
    for into, found in measured.items():
        facts[f"merged into {names[into]}"] = (
            f"loss {found.loss:.4f}, a token's loss differs by {found.difference:.4g} on average"
        )
    figures = "; ".join(f"{label}: {value}" for label, value in list(facts.items())[1:])
    return facts, f"merged into {names[nearest]}, which is nearer. {figures}"


def _bounded(heldout: HeldOut) -> Iterator[Any]:
    """The first held-out batches with `MAX_TOKENS` supervised tokens."""
    tokens = 0
    for batch in heldout.batches():
        if tokens >= MAX_TOKENS:
            return
        tokens += batch.num_targets
        yield batch


def _reference(
    heldout: HeldOut, batches: list[Any], kept: Mapping[str, torch.Tensor]
) -> torch.Tensor:
    """Each token's loss of NF4 base + adapter."""
    from posttrain_dist.tuning.base import fill_parameters

    tuning: Any = replace(heldout.config.tuning, init_from=None)  # type: ignore[call-arg]
    model = heldout.load_model(nf4=True)
    tuning.attach(model)
    fill_parameters(model, kept)
    return _losses(heldout.policy(model, tuning), batches, heldout.device)


def _merged(
    heldout: HeldOut,
    base: Path,
    batches: list[Any],
    kept: Mapping[str, torch.Tensor],
    dtype: torch.dtype,
) -> Iterator[tuple[MergeInto, torch.Tensor]]:
    """Each token's loss of each merged model: of the very tensors that an export would write."""
    import torch

    from posttrain_dist.tuning.adapters.merged_tensors import merged_tensors

    model: Any = heldout.load_model(nf4=False, dtype=dtype)
    own = model.state_dict()
    policy = heldout.policy(model, None)
    tuning = heldout.config.tuning
    for into in MergeInto:
        with torch.no_grad():
            for name, tensor in merged_tensors(base, tuning, kept, dtype=dtype, into=into):
                inside = name if name in own else f"{model.base_model_prefix}.{name}"
                if inside in own:
                    own[inside].copy_(tensor)
        yield into, _losses(policy, batches, heldout.device)


def _device_of(base: Path, device: torch.device) -> torch.device | None:
    """Where a base that is not quantised has room: the GPU, else the host; None: nowhere."""
    import torch

    from posttrain_dist.tuning.adapters.base_tensors import tensor_files

    files = set(tensor_files(base).values())
    needed_bytes = 1.2 * sum(file.stat().st_size for file in files)
    if device.type == "cuda" and needed_bytes < torch.cuda.mem_get_info(device)[0]:
        return device
    return torch.device("cpu") if needed_bytes < _available_bytes() else None


def _available_bytes() -> float:
    """Memory of the host that nothing needs; infinite where it is not known."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
        return int(text.partition("MemAvailable:")[2].split()[0]) * 1024.0
    except (OSError, ValueError, IndexError):
        return math.inf


def _losses(policy: Policy, batches: list[Any], device: torch.device) -> torch.Tensor:
    """The loss [N] of each supervised token, in float64 on the host."""
    import torch

    found = []
    with torch.no_grad():
        for each in batches:
            batch = each.to(device)
            hidden_ND = policy.hidden(batch)
            nll_N = policy.head.loss(hidden_ND, batch.labels_N, denominator=1.0).nll_N
            found.append(nll_N[: batch.num_targets].double().cpu())
    return torch.cat(found)
