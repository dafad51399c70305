"""The replay of autograd beside torch itself, on small graphs, byte for byte."""

import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from posttrain_dist.planner.memory.autograd import Graph
from posttrain_dist.planner.memory.ledger import Ledger
from posttrain_dist.planner.memory.operations import activation, multiply, square
from posttrain_dist.planner.plan import Item, PhaseName

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
ROWS, WIDTH = 64, 32
BYTES = ROWS * WIDTH * 4


def test_a_block_that_is_resized_leaves_the_peaks_of_one_that_is_freed_and_made_again():
    sizes, peaks = [5, 9, 2, 2, 7, 0, 8], []
    for resizes in (True, False):
        ledger, block = Ledger(), None
        for phase, of_phase in ((PhaseName.forward, sizes[:4]), (PhaseName.backward, sizes[4:])):
            with ledger.phase(phase):
                for size in of_phase:
                    if block is not None and resizes:
                        ledger.resize(block, size)
                    else:
                        if block is not None:
                            ledger.release(block)
                        block = ledger.allocate(Item.gathered, size)
                    ledger.touch(Item.workspace, 1)
        peaks.append(ledger.phases())
    assert peaks[0] == peaks[1]
    assert [phase.allocated_bytes for phase in peaks[0]] == [10, 9]


class KeptGradients:
    """An engine that keeps gradients and gathers nothing."""

    def gather(self, parameters, *, backward):
        """Nothing."""

    def release(self, parameters, *, backward):
        """Nothing."""

    def gradient(self, parameter, block):
        """The block stays allocated."""


def planned(program):
    """Peaks of forward and backward of a program on one input that needs a gradient."""
    ledger = Ledger()
    graph = Graph(ledger, KeptGradients(), width=4, trained={"w.weight"})
    x = graph.tensor(BYTES, needs_grad=True)
    with ledger.phase(PhaseName.forward):
        out = program(graph, x)
        loss = graph.op((out,), 4, grad_bytes=[BYTES], width=4)
        del out
    with ledger.phase(PhaseName.backward):
        graph.backward(loss)
    return [phase.allocated_bytes for phase in ledger.phases()]


def measured(program, monkeypatch):
    """The same of torch; the input is no one's but the program's and this function's."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from measured_memory import StorageCounter

    for name in [path.stem for path in BENCHMARKS.glob("*.py")]:
        sys.modules.pop(name, None)
    counter = StorageCounter()
    with counter:
        x = torch.zeros(ROWS, WIDTH, requires_grad=True)
        with counter.phase("forward"):
            loss = Scalar.apply(program(x))
        with counter.phase("backward"):
            loss.backward()
    return [counter.peaks["forward"], counter.peaks["backward"]]


class Scalar(torch.autograd.Function):
    """A number whose gradient is a whole tensor, as that of a loss is."""

    @staticmethod
    def forward(ctx, x):
        ctx.shape = x.shape
        return torch.zeros(())

    @staticmethod
    def backward(ctx, gradient):
        return torch.ones(ctx.shape)


def gate(graph, x):
    half = activation(graph, x, "silu")
    return multiply(graph, half, square(graph, x))


def residual(graph, x):
    return graph.add(x, activation(graph, x, "tanh"))


def deep(graph, x):
    for _ in range(3):
        x = residual(graph, gate(graph, x))
    return x


def torch_gate(x):
    half = nn.functional.silu(x)
    return half * x.pow(2)


def torch_residual(x):
    return x + torch.tanh(x)


def torch_deep(x):
    for _ in range(3):
        x = torch_residual(torch_gate(x))
    return x


@pytest.mark.parametrize(
    ("program", "own"), [(gate, torch_gate), (residual, torch_residual), (deep, torch_deep)]
)
def test_forward_and_backward_take_what_torch_takes(monkeypatch, program, own):
    found = measured(own, monkeypatch)
    # A second gradient: in place, but under a dispatch mode torch makes a new tensor for it.
    assert planned(program)[0] == pytest.approx(found[0], abs=16)
    assert found[1] - BYTES - 16 <= planned(program)[1] <= found[1] + 16


def test_a_checkpoint_keeps_its_input_alone(monkeypatch):
    def program(graph, x):
        return graph.checkpoint(deep, x)

    def own(x):
        return checkpoint(torch_deep, x, use_reentrant=False)

    ours, torchs = planned(program), measured(own, monkeypatch)
    assert ours[0] == pytest.approx(torchs[0], abs=16)
    # torch stops running again where the last tensor that is kept is made.
    assert torchs[1] - BYTES <= ours[1] <= torchs[1] + 2 * BYTES


def test_the_peak_of_a_phase_is_its_fullest_moment():
    ledger = Ledger()
    stays = ledger.allocate(Item.weights, 10)
    with ledger.phase(PhaseName.forward):
        first = ledger.allocate(Item.activations, 5)
        ledger.release(first)
        ledger.touch(Item.head, 7)
    with ledger.phase(PhaseName.update):
        ledger.touch(Item.workspace, 3)
    ledger.release(stays)
    forward, update = ledger.phases()
    assert forward.items == {Item.weights: 10, Item.head: 7}
    assert update.items == {Item.weights: 10, Item.workspace: 3}
