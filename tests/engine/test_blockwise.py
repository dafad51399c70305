"""AdamW of 8 bits and paged, on the CPU, against torch's AdamW."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from posttrain_dist.config import RunConfig, complete
from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.engine.blockwise import to_float
from posttrain_dist.engine.master import MasterAdamW
from posttrain_dist.errors import ConfigError

KINDS = {
    "8bit": {"state_bits": 8},
    "paged 8bit": {"state_bits": 8, "paged": True},
    "paged 32bit": {"paged": True},
}


def problem(dtype: torch.dtype = torch.float32) -> nn.ParameterDict:
    """A regression: its matrix has blocks of 8 bits, its bias is too small for them."""
    random = torch.Generator().manual_seed(0)
    shapes = {"matrix": (128, 64), "bias": (64,)}
    return nn.ParameterDict(
        {n: nn.Parameter(torch.randn(s, generator=random).to(dtype)) for n, s in shapes.items()}
    )


def run(
    parameters: nn.ParameterDict, optimizer: MasterAdamW, steps: range
) -> list[tuple[float, float]]:
    """(loss, gradient norm) of each step."""
    told = []
    for step in steps:
        random = torch.Generator().manual_seed(step)
        x = torch.randn(16, 128, generator=random).to(parameters["matrix"].dtype)
        loss = (x @ parameters["matrix"] + parameters["bias"]).square().mean()
        loss.backward()
        told.append((float(loss), float(optimizer.step(0.02))))
    return told


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_twenty_steps_are_those_of_torch(
    kind: str, dtype: torch.dtype, recwarn: pytest.WarningsRecorder
) -> None:
    """Clipping bites in every one of them, and the matrix decays."""
    plain = AdamW(clip=1.0, weight_decay=0.1)
    ours, theirs = problem(dtype), problem(dtype)
    start = ours["matrix"].detach().clone()
    reference = run(theirs, MasterAdamW(theirs.items(), plain), range(20))
    optimizer = MasterAdamW(ours.items(), AdamW(clip=1.0, weight_decay=0.1, **KINDS[kind]))
    losses = run(ours, optimizer, range(20))
    assert all(norm > 1.0 for _, norm in reference)
    blocks = KINDS[kind].get("state_bits") == 8
    if dtype == torch.float32:
        tolerance = 3e-3 if blocks else 2e-6
        for (loss, norm), (wanted, wanted_norm) in zip(losses, reference, strict=True):
            assert loss == pytest.approx(wanted, rel=tolerance)
            assert norm == pytest.approx(wanted_norm, rel=tolerance)
    moved = float((theirs["matrix"] - start).norm())
    off = float((ours["matrix"] - theirs["matrix"]).norm())
    assert off < (0.02 if blocks else 1e-3) * moved
    states = dict(optimizer.named_state())
    assert ("absmax1" in states["matrix"]) is blocks and "exp_avg" in states["bias"]
    assert not [w for w in recwarn if "aged" in str(w.message)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_goes_on_bit_for_bit(kind: str, dtype: torch.dtype) -> None:
    config = AdamW(weight_decay=0.1, **KINDS[kind])
    ours, other = problem(dtype), problem(dtype)
    first, second = MasterAdamW(ours.items(), config), MasterAdamW(other.items(), config)
    run(ours, first, range(3))
    saved = copy.deepcopy(dict(first.named_state()))  # as from a file
    second.load_named_state(saved.__getitem__)
    assert run(ours, first, range(3, 6)) == run(other, second, range(3, 6))
    for name, parameter in ours.items():
        assert torch.equal(parameter, other[name])


def test_moments_change_between_8_and_32_bits() -> None:
    """From blocks: what they stand for, exactly. Into blocks: as close as 256 codes are."""
    plain, blocks = AdamW(), AdamW(state_bits=8)
    ours, other, third = problem(), problem(), problem()
    first = MasterAdamW(ours.items(), plain)
    run(ours, first, range(3))
    exact = copy.deepcopy(dict(first.named_state()))
    second = MasterAdamW(other.items(), blocks)
    second.load_named_state(exact.__getitem__)
    coded = to_float(dict(second.named_state())["matrix"])
    for key in ("exp_avg", "exp_avg_sq"):
        wanted = exact["matrix"][key]
        by_block = (coded[key] - wanted).abs().view(-1, 256).amax(1)
        assert float((by_block / wanted.abs().view(-1, 256).amax(1)).max()) < 0.02
    back = MasterAdamW(third.items(), plain)
    back.load_named_state(dict(second.named_state()).__getitem__)
    again = dict(back.named_state())["matrix"]
    assert torch.equal(again["exp_avg"], coded["exp_avg"])
    assert torch.equal(again["master"], ours["matrix"]) and float(again["step"]) == 3


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"state_bits": 8}, "optimizer.state_bits: is 8 under DeepSpeed"),
        ({"paged": True}, "optimizer.paged: is true under DeepSpeed"),
    ],
)
def test_sharded_moments_of_8_bits_are_refused(change: dict, said: str) -> None:
    config = RunConfig(optimizer=AdamW(**change), engine=DeepSpeed(stage=2))
    with pytest.raises(ConfigError, match=said):
        complete(config)
    assert complete(RunConfig(optimizer=AdamW(**change))).optimizer.lr == 1e-5
