"""What it gains to compute the supervised rows only in the last decoder layer, of a 7B model.

    OMP_NUM_THREADS=1 python benchmarks/last_layer.py

Forward and backward of one Llama layer (D = 4096, 32 heads, 8 of keys and values, MLP of 14,336) in
float32 over a pack of samples, all arms and masks in turn in one process:

    whole layer         all rows; those that are supervised are taken behind it
    MLP rows            posttrain_dist/models/last_layer.py: the MLP computes supervised rows only
    q, o and MLP rows   also queries, output projection and the norms behind attention

A gain is given as a share of the layer and of 32 such layers, which is an upper bound of that of a
step: embedding, head and optimizer are left out. Before, the arms run a short pack, where their
outputs and gradients are compared with those of the whole layer. Times are of the processor, so
that one thread may be measured on a machine that is shared. One row per arm and mask goes to
benchmarks/results/last_layer.jsonl.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import rows
import torch
from transformers import LlamaConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.llama.modeling_llama import (
    LlamaDecoderLayer,
    LlamaRotaryEmbedding,
    apply_rotary_pos_emb,
)

from posttrain_dist.data.packs.collate import TARGET_MULTIPLE
from posttrain_dist.models.attention import SDPA, register
from posttrain_dist.models.last_layer import select_supervised_rows

LAYERS = 32
SHAPE = {
    "hidden_size": 4096,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "intermediate_size": 14_336,
}
SMOKE = {
    "hidden_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 96,
}


@dataclass(frozen=True, slots=True)
class Pack:
    """Inputs of a layer, and which rows of its output are used."""

    hidden_1TD: torch.Tensor
    supervised_N: torch.Tensor  # a multiple of 128, as collate pads it
    grad_1ND: torch.Tensor  # of the output
    options: dict[str, Any]  # of the layer: positions, bounds of the samples


def make_layer(shape: dict[str, int]) -> LlamaDecoderLayer:
    """A random layer whose MLP can be told its rows."""
    register()
    config = LlamaConfig(**shape, num_hidden_layers=1, attn_implementation=SDPA)
    torch.manual_seed(0)
    layer = LlamaDecoderLayer(config, 0)
    for parameter in layer.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.02)
    select_supervised_rows(torch.nn.ModuleList([layer]))
    return layer


def make_pack(layer: LlamaDecoderLayer, num_tokens: int, masked: float, samples: int = 4) -> Pack:
    """A pack of equal samples of which the first tokens are masked, as a prompt is."""
    config, length = layer.self_attn.config, num_tokens // samples
    draw = torch.Generator().manual_seed(1)
    hidden_1TD = torch.randn(1, num_tokens, config.hidden_size, generator=draw)
    position_T = torch.arange(length).repeat(samples)
    supervised_N = (position_T >= round(masked * length)).nonzero()[:, 0]
    num_real = len(supervised_N)
    supervised_N = torch.nn.functional.pad(supervised_N, (0, -num_real % TARGET_MULTIPLE))
    grad_1ND = torch.randn(1, len(supervised_N), config.hidden_size, generator=draw)
    grad_1ND[:, num_real:] = 0
    options = {
        "position_embeddings": LlamaRotaryEmbedding(config)(hidden_1TD, position_T[None]),
        "cu_seqlens": list(range(0, num_tokens + 1, length)),
    }
    return Pack(hidden_1TD.requires_grad_(), supervised_N, grad_1ND, options)


# ------------------------------------------------------------------------------- arms


def whole_layer(layer: LlamaDecoderLayer, pack: Pack) -> torch.Tensor:
    """All rows of everything."""
    output_1TD: torch.Tensor = layer(pack.hidden_1TD, **pack.options)
    return output_1TD.index_select(1, pack.supervised_N)


def mlp_rows(layer: LlamaDecoderLayer, pack: Pack) -> torch.Tensor:
    """As a policy runs its last layer."""
    output_1ND: torch.Tensor = layer(
        pack.hidden_1TD, supervised_N=pack.supervised_N, **pack.options
    )
    return output_1ND


def attention_rows(layer: LlamaDecoderLayer, pack: Pack) -> torch.Tensor:
    """Behind the keys and values, only the rows that are used."""
    attention, rows_N = layer.self_attn, pack.supervised_N
    heads = (-1, attention.head_dim)
    normed = layer.input_layernorm(pack.hidden_1TD)
    query = attention.q_proj(normed.index_select(1, rows_N)).unflatten(-1, heads)
    key = attention.k_proj(normed).unflatten(-1, heads)
    value = attention.v_proj(normed).unflatten(-1, heads)
    # The attention takes a query per row; one that is not used is zero.
    query_1THd = query.new_zeros(1, normed.shape[1], *query.shape[2:])
    query = query_1THd.index_copy(1, rows_N, query)
    query, key = apply_rotary_pos_emb(
        query.transpose(1, 2), key.transpose(1, 2), *pack.options["position_embeddings"]
    )
    attend = ALL_ATTENTION_FUNCTIONS[SDPA]
    options = {"scaling": attention.scaling, "cu_seqlens": pack.options["cu_seqlens"]}
    output, _ = attend(attention, query, key, value.transpose(1, 2), None, **options)
    attended = attention.o_proj(output.flatten(2).index_select(1, rows_N))
    hidden = pack.hidden_1TD.index_select(1, rows_N) + attended
    more: torch.Tensor = layer.mlp(layer.post_attention_layernorm(hidden))
    return hidden + more


Arm = Callable[[LlamaDecoderLayer, Pack], torch.Tensor]
WHOLE = "whole layer"
ARMS: dict[str, Arm] = {
    WHOLE: whole_layer,
    "MLP rows": mlp_rows,
    "q, o and MLP rows": attention_rows,
}


def step(arm: Arm, layer: LlamaDecoderLayer, pack: Pack) -> torch.Tensor:
    """Forward and backward; leaves no gradient of the call before."""
    layer.zero_grad()
    pack.hidden_1TD.grad = None
    output_1ND = arm(layer, pack)
    output_1ND.backward(pack.grad_1ND)
    return output_1ND.detach()


def errors(layer: LlamaDecoderLayer, pack: Pack) -> dict[str, float]:
    """Of each arm: the largest relative error of its output and gradients to the whole layer's."""
    found = {}
    truth: list[torch.Tensor] = []
    for name, arm in ARMS.items():
        output = step(arm, layer, pack)
        values = [output, pack.hidden_1TD.grad, *(p.grad for p in layer.parameters())]
        if name == WHOLE:
            truth = [value.clone() for value in values]
        apart = [(a - b).norm() / b.norm() for a, b in zip(values, truth, strict=True)]
        found[name] = float(max(apart))
    return found


# --------------------------------------------------------------------------- measuring


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one command. What the whole layer takes does not depend on the mask."""
    layer = make_layer(SMOKE if arguments.smoke else SHAPE)
    apart = errors(layer, make_pack(layer, 160, 0.6))
    packs = {masked: make_pack(layer, arguments.tokens, masked) for masked in arguments.masks}
    first = arguments.masks[0]
    turns: dict[tuple[str, float], Callable[[], Any]] = {
        (name, masked): partial(step, arm, layer, pack)
        for masked, pack in packs.items()
        for name, arm in ARMS.items()
        if name != WHOLE or masked == first
    }
    until = time.monotonic() + arguments.seconds
    taken = rows.take_turns(
        turns, rounds=arguments.rounds, warmup=0, until=until, clock=time.process_time
    )
    table = []
    for (name, masked), seconds in taken.items():
        gain = 1 - statistics.median(
            own / whole for own, whole in zip(seconds, taken[WHOLE, first], strict=True)
        )
        row = {
            "arm": name,
            "masked": masked,
            "tokens": arguments.tokens,
            "computed": len(packs[masked].supervised_N),
            "threads": torch.get_num_threads(),
            **rows.quantiles(seconds),
            "layer_gain": gain,
            "step_gain": gain / LAYERS,
            "error": apart[name],
        }
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1024, help="T, of a pack of 4 samples")
    parser.add_argument("--masks", type=float, nargs="+", default=[0.0, 0.5, 0.75, 0.9])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60, help="no round begins after")
    parser.add_argument("--smoke", action="store_true", help="a tiny layer, to see that it runs")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    arguments = parser.parse_args()
    table = measure(arguments)
    for row in table:
        print(
            f"{row['arm']:20} {row['masked']:5} {row['p50_s']:8.3f} s  "
            f"layer {row['layer_gain']:7.1%}  step {row['step_gain']:7.2%}  {row['error']:.0e}"
        )
    facts = rows.facts(("torch", "transformers"))
    rows.append("last_layer", [{**facts, **row} for row in table], arguments.results)


if __name__ == "__main__":
    main()
