"""What prefixes begin with: a text that stands before every sample, or zeros that learn."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from virtual_cases import examples, policy_of

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.flow import Example
from posttrain_dist.models.folder import load_tokenizer
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.prefix_tuning import Prefix
from posttrain_dist.tuning.prompt_tuning import Prompt

TEXT = "the quick brown"


def losses(policy, rows):
    batch = collate(rows)
    with torch.no_grad():
        return policy(batch, TokenLoss(), TokenCount(1.0)).nll_N[: batch.num_targets]


def test_a_prefix_from_text_is_the_base_model_behind_that_text(tmp_path, builders):
    """Window and softcap included: keys and values are those of the layers that have them."""
    window = {"sliding_window": 4, "query_pre_attn_scalar": 8, "attn_logit_softcapping": 2.0}
    for name, changes in {"Llama": {}, "Gemma2": window}.items():
        folder = builders.model(tmp_path / name, name, **changes)
        ids = load_tokenizer(folder).backend_tokenizer.encode(TEXT).ids
        prefix = policy_of(folder, Prefix(tokens=len(ids), init_text=TEXT), spread=0)
        before = np.array(ids, np.int32)

        def behind(row: Example, before: np.ndarray = before) -> Example:
            if row.parent is not None:
                return row
            weight_L = np.concatenate([np.zeros(len(before), np.float32), row.weight_L])
            return replace(
                row, input_ids_L=np.concatenate([before, row.input_ids_L]), weight_L=weight_L
            )

        expected = losses(policy_of(folder, None), [behind(row) for row in examples()])
        torch.testing.assert_close(losses(prefix, examples()), expected, rtol=1e-5, atol=1e-5)
        prompt = policy_of(folder, Prompt(tokens=len(ids), init_text=TEXT), spread=0)
        torch.testing.assert_close(losses(prompt, examples()), expected, rtol=1e-5, atol=1e-5)


def test_zeros_are_no_base_model_but_all_of_them_learn(tiny_llama):
    """Attention that goes to values of zero is lost: the losses differ; every value has a gradient,
    and keys have theirs once the values have moved."""
    policy = policy_of(tiny_llama, Prefix(tokens=2), spread=0)
    table = policy.causal_lm.prefix.weight
    assert float(table.detach().abs().max()) == 0
    base = losses(policy_of(tiny_llama, None), examples())
    assert float((losses(policy, examples()) - base).abs().max()) > 0.01
    optimizer = torch.optim.Adam([table], lr=1e-2)
    totals = []
    for _ in range(12):
        optimizer.zero_grad()
        total = policy(collate(examples()), TokenLoss(), TokenCount(10.0)).total
        total.backward()
        totals.append(float(total.detach()))
        gradient = table.grad.view(2, 2, 2, -1)  # token, layer, key or value
        assert bool((gradient.abs().amax(dim=-1) > 0).all())
        optimizer.step()
    assert totals[-1] < totals[0] - 0.1
