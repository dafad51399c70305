"""What it gains to compute the prompt of several answers once: pairs, and groups of 8.

    OMP_NUM_THREADS=1 python benchmarks/shared_prompt.py      # on a GPU where there is one

Forward and backward of a random Llama over one packed row, in turn in one process: `shared` has
each prompt once, with its answers behind it, `repeated` has it before each of them
(data.share_prompt=false). Both have the log-probability of every answer token, and a gradient of
each, as preference objectives do. 70 % of a sequence, prompt and answer, are prompt.

A gain is held against the ratio of multiply-adds, `work`, the head included:

    3 · P · T  +  3 · L · A · sum(l · (l + 2b))  +  4 · D · V · N   with P parameters of the layers,
    less those of the last layer's MLP on tokens that predict nothing; T tokens, N targets, L
    layers, A = heads · head size, l tokens of a sample and b before it

Times on a CPU are of the processor, so that one thread may be measured on a machine that is shared.
One row per arm and case goes to benchmarks/results/shared_prompt.jsonl.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import rows
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from posttrain_dist.build import make_policy
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.data.prepared.trees import repeat_beginnings
from posttrain_dist.flow import Batch, Example, Loss
from posttrain_dist.models import Attention
from posttrain_dist.models.attention import implementation, register
from posttrain_dist.models.policy import Policy
from posttrain_dist.models.shape import ModelShape
from posttrain_dist.models.varlen import AttentionRequirements
from posttrain_dist.objectives.base import TokenCount, TokenLoss

CASES = {"pairs": 2, "groups of 8": 8}  # answers to a prompt
PROMPT_SHARE = 0.7
SHARED, REPEATED = "shared", "repeated"


@dataclass(frozen=True, slots=True)
class Sizes:
    """Of the model and of the rows."""

    hidden: int
    layers: int
    feed_forward: int
    heads: int
    kv_heads: int
    vocabulary: int
    sequence: int  # tokens of a prompt and one answer
    row: int  # tokens of the repeated row


CPU = Sizes(512, 4, 1408, 8, 4, 4096, sequence=512, row=4096)
GPU = Sizes(2048, 16, 5632, 32, 8, 32_768, sequence=2048, row=32_768)
SMOKE = Sizes(32, 2, 48, 4, 2, 96, sequence=20, row=160)


class LogProbs(TokenLoss):
    """Minus the sum of the answers' log-probabilities, made as preference objectives make them."""

    def loss(
        self, hidden_ND: torch.Tensor, head: Any, batch: Batch, denominators: TokenCount
    ) -> Loss:
        """By the differentiable log-probabilities of the head."""
        logprob_N = head.logprob(hidden_ND, batch.labels_N).logprob_N
        total = -(logprob_N * batch.weight_N).sum() / denominators.tokens
        return Loss(total, torch.zeros(1, len(self.columns), device=total.device))


def make_model(sizes: Sizes, device: torch.device) -> Policy:
    """A random model: float32 on a CPU, bfloat16 with the kernel of a row on a GPU."""
    register()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    config = LlamaConfig(
        hidden_size=sizes.hidden,
        num_hidden_layers=sizes.layers,
        intermediate_size=sizes.feed_forward,
        num_attention_heads=sizes.heads,
        num_key_value_heads=sizes.kv_heads,
        vocab_size=sizes.vocabulary,
        max_position_embeddings=sizes.sequence,
        tie_word_embeddings=False,
    )
    needed = AttentionRequirements.of(ModelShape.of(config.to_dict()), dtype)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=dtype, attn_implementation=implementation(Attention.auto, needed)
    )
    return make_policy(model.to(device), 1, None).train()


def make_rows(sizes: Sizes, answers: int) -> dict[str, Batch]:
    """The same answers in both arms."""
    draw = np.random.default_rng(0)
    prompt = round(PROMPT_SHARE * sizes.sequence)
    trees: list[list[Example]] = []
    for unit in range(sizes.row // (answers * sizes.sequence)):
        ids = draw.integers(0, sizes.vocabulary, sizes.sequence * answers).astype(np.int32)
        parts = np.split(ids, [prompt + i * (sizes.sequence - prompt) for i in range(answers + 1)])
        trees.append(
            [
                Example(
                    part,
                    np.full(len(part), float(i > 0), np.float32),
                    0,
                    i,
                    parent=0 if i else None,
                    unit=unit,
                )
                for i, part in enumerate(parts[: answers + 1])
            ]
        )
    repeated = [replace(path, sample_id=0) for tree in trees for path in repeat_beginnings(tree)]
    return {
        SHARED: collate([sample for tree in trees for sample in tree]),
        REPEATED: collate(repeated),
    }


def multiply_adds(sizes: Sizes, batch: Batch) -> dict[str, float]:
    """Of one forward and backward: of the layers' weights, of attention, of the head."""
    width = sizes.hidden // sizes.heads
    kv = sizes.kv_heads * width
    mlp = 3 * sizes.hidden * sizes.feed_forward
    layer = sizes.hidden * (2 * sizes.hidden + 2 * kv) + mlp
    tokens, targets = batch.cu_seqlens_S[-1], batch.num_targets
    before: list[int] = []
    causal = 0
    for (start, end), parent in zip(pairwise(batch.cu_seqlens_S), batch.parent_S, strict=True):
        length = end - start
        own = 0 if parent < 0 else before[parent] + _length(batch, parent)
        before.append(own)
        causal += length * (length + 2 * own)
    return {
        "layers": 3.0 * (sizes.layers * layer * tokens - mlp * (tokens - targets)),
        "attention": 3.0 * sizes.layers * sizes.heads * width * causal,
        "head": 4.0 * sizes.hidden * sizes.vocabulary * targets,
    }


def _length(batch: Batch, sample: int) -> int:
    return batch.cu_seqlens_S[sample + 1] - batch.cu_seqlens_S[sample]


def step(policy: Policy, batch: Batch) -> torch.Tensor:
    """Forward and backward; leaves no gradient of the call before."""
    policy.zero_grad()
    loss = policy(batch, LogProbs(), TokenCount(batch.weight_sum)).total
    loss.backward()
    return loss.detach()


def measure(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """All rows of one command."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    sizes = SMOKE if arguments.smoke else GPU if device.type == "cuda" else CPU
    policy = make_model(sizes, device)
    packs = {
        (case, arm): batch.to(device)
        for case, answers in CASES.items()
        for arm, batch in make_rows(sizes, answers).items()
    }
    losses = {name: float(step(policy, batch)) for name, batch in packs.items()}
    turns: dict[tuple[str, str], Callable[[], Any]] = {
        name: partial(step, policy, batch) for name, batch in packs.items()
    }
    on_gpu = device.type == "cuda"
    taken = rows.take_turns(
        turns,
        rounds=arguments.rounds,
        wait=torch.cuda.synchronize if on_gpu else lambda: None,
        until=time.monotonic() + arguments.seconds,
        clock=time.perf_counter if on_gpu else time.process_time,
    )
    table = []
    for (case, arm), seconds in taken.items():
        work = {each: multiply_adds(sizes, packs[case, each]) for each in (SHARED, REPEATED)}
        ratio = sum(work[REPEATED].values()) / sum(work[arm].values())
        faster = rows.times_faster(taken[case, REPEATED], seconds)
        quantiles = rows.quantiles(seconds)
        sequences = packs[case, REPEATED].cu_seqlens_S[-1]
        row = {
            "case": case,
            "arm": arm,
            "attention": policy.config._attn_implementation.removeprefix("posttrain_"),
            "hidden": sizes.hidden,
            "layers": sizes.layers,
            "vocabulary": sizes.vocabulary,
            "sequence": sizes.sequence,
            "tokens": packs[case, arm].cu_seqlens_S[-1],
            "sequence_tokens": sequences,
            "threads": torch.get_num_threads(),
            **quantiles,
            "tokens_per_s": sequences / quantiles["p50_s"],
            "head_share": work[arm]["head"] / sum(work[arm].values()),
            "token_ratio": sequences / packs[case, arm].cu_seqlens_S[-1],
            "work_ratio": ratio,
            "times_faster": faster,
            "reached": faster / ratio,
            "error": abs(losses[case, arm] / losses[case, REPEATED] - 1),
        }
        table.append(row)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=240, help="no round begins after")
    parser.add_argument("--smoke", action="store_true", help="a tiny model, to see that it runs")
    parser.add_argument("--results", type=Path, default=rows.RESULTS)
    arguments = parser.parse_args()
    table = measure(arguments)
    for row in table:
        print(
            f"{row['case']:12} {row['arm']:9} {row['p50_s']:8.3f} s  "
            f"{row['tokens_per_s']:10,.0f} tokens/s  {row['times_faster']:.2f}x of "
            f"{row['work_ratio']:.2f}x: {row['reached']:.1%}  {row['error']:.0e}"
        )
    facts = rows.facts(("torch", "transformers"))
    rows.append("shared_prompt", [{**facts, **row} for row in table], arguments.results)


if __name__ == "__main__":
    main()
