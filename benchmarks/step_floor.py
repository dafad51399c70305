"""Where the time of a step goes: its profile, and what its matrix products alone would take."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TextIO

import step_data
import torch

KINDS = {
    "matrix products": ("mm", "addmm", "bmm", "baddbmm", "mkldnn", "linear"),
    "attention": ("attention", "sdpa"),
    "optimizer and clipping": ("adam", "foreach", "linalg_vector_norm"),
    "copies and fills": ("copy_", "cat", "index", "fill_", "zero_", "gather", "embedding"),
}


class Profile:
    """Profiles the steps after the second, and prints where their time went."""

    def __init__(self, out: TextIO) -> None:
        self._out, self._steps, self._since = out, 0, 0.0
        self._profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])

    def ready(self) -> None:
        """The model is there."""

    def done(self, loss: float, norm: float) -> None:
        """A step is done."""
        self._steps += 1
        if self._steps == 2:
            self._profiler.start()
            self._since = time.perf_counter()

    def print_shares(self) -> None:
        """Print seconds a step by kind of operation; what no operation took is Python's."""
        seconds = time.perf_counter() - self._since
        self._profiler.stop()
        found = dict.fromkeys([*KINDS, "other operations"], 0.0)
        for event in self._profiler.key_averages():
            name = event.key.lower()
            kind = next((k for k, words in KINDS.items() if any(w in name for w in words)), None)
            found[kind or "other operations"] += event.self_cpu_time_total / 1e6
        found["between operations"] = seconds - sum(found.values())
        steps = self._steps - 2
        line = [
            {"arm": kind, "p50_s": own / steps, "share": own / seconds}
            for kind, own in found.items()
        ]
        print(json.dumps({"profile": line}), file=self._out, flush=True)


# ------------------------------------------------------------------------------- products


def products(
    folder: Path, sync: Any, make_source: Callable[[list[Any]], Any], dtype: torch.dtype
) -> None:
    """Every step's matrix products and nothing else: the time that no program can go below.

    Three for each weight matrix and micro-batch, as our step makes them: the output, the gradient
    of the input, the gradient of the weight. The last layer's MLP and the head take the supervised
    rows alone. Attention's own products are left out.
    """
    sizes, steps = step_data.read_sizes(folder), step_data.read(folder)
    source = make_source(steps)
    weights = [
        (torch.ones(shape, dtype=dtype), torch.zeros(shape, dtype=dtype), is_selected)
        for shape, is_selected in matrices(sizes)
    ]
    sync.ready()
    for k in range(1, len(steps) + 1):
        for batch in source.step(k):
            supervised = int((batch.weight_N > 0).sum())
            for weight_OI, gradient_OI, is_selected in weights:
                rows = supervised if is_selected else batch.num_tokens
                _multiply(weight_OI, gradient_OI, rows)
        sync.done(1.0, 1.0)


def matrices(sizes: Any) -> Iterator[tuple[tuple[int, int], bool]]:
    """(shape, whether only supervised rows meet it) of each weight matrix of a step."""
    d, f, kv = sizes.hidden, sizes.feed_forward, sizes.hidden * sizes.kv_heads // sizes.heads
    for layer in range(sizes.layers):
        is_last = layer == sizes.layers - 1
        yield from (((width, d), False) for width in (d, kv, kv, d))
        yield from (((f, d), is_last), ((f, d), is_last), ((d, f), is_last))
    yield (sizes.vocabulary, sizes.hidden), True


def _multiply(weight_OI: torch.Tensor, gradient_OI: torch.Tensor, rows: int) -> None:
    for start in range(0, rows, _ROWS):  # a head's logits do not stand in memory at once
        count = min(_ROWS, rows - start)
        input_RI = weight_OI.new_ones(count, weight_OI.shape[1])
        output_RO = torch.mm(input_RI, weight_OI.t())
        torch.mm(output_RO, weight_OI)
        torch.mm(output_RO.t(), input_RI, out=gradient_OI)


_ROWS = 1024
