"""A tuning freezes, inserts, extends and embeds; the rest of the training does not know."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob
from torch import nn

from posttrain_dist.build import build_policy
from posttrain_dist.config import Full, ModelConfig, RunConfig, complete
from posttrain_dist.data.packs.collate import collate, filler
from posttrain_dist.engine import AdamW
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.flow import Batch, Example
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.tuning.base import Tuning
from posttrain_dist.tuning.virtual import insert_virtual_tokens

CPU = torch.device("cpu")


@dataclass(kw_only=True, slots=True)
class Norms(Tuning):
    """Only the weights of norms are trained."""

    def trained(self, name: str) -> bool:
        return "norm" in name


@dataclass(kw_only=True, slots=True)
class Virtual(Tuning):
    """Trained vectors before each sample; the model itself is frozen."""

    tokens: int = 1

    @property
    def unmergeable(self) -> str:
        return "virtual tokens are no weight of the model"

    def trained(self, name: str) -> bool:
        return name.startswith("virtual.")

    def attach(self, model: nn.Module) -> None:
        model.virtual = nn.Embedding(self.tokens, model.config.hidden_size)
        Tuning.attach(self, model)

    def extend(self, batch: Batch) -> Batch:
        return insert_virtual_tokens(batch, self.tokens)

    def embed(self, model: nn.Module, batch: Batch) -> torch.Tensor:
        ids_T = batch.input_ids_T
        own_TD = model.virtual((-1 - ids_T).clamp(min=0))
        words_TD = model.get_input_embeddings()(ids_T.clamp(min=0))
        return torch.where((ids_T < 0)[:, None], own_TD, words_TD)


def examples() -> list[Example]:
    """Two roots, the second followed by two samples."""
    draw = np.random.default_rng(0)
    made = []
    for sample_id, (length, parent) in enumerate([(7, None), (11, None), (4, 1), (6, 1)]):
        ids_L = draw.integers(5, 200, length).astype(np.int32)
        weight_L = (draw.random(length) < 0.7).astype(np.float32)
        weight_L[0], weight_L[-1] = parent is not None, 1
        made.append(Example(ids_L, weight_L, 0, sample_id, parent=parent))
    return made


def policy_of(folder, tuning: Tuning, engine: SingleEngine) -> Policy:
    model = load_model(
        ModelConfig(path=str(folder)),
        folder,
        dtype=torch.float32,
        seed=0,
        materialise=engine.materialise(),
        attach=tuning.attach,
    )
    policy = Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), 1, tuning)
    engine.attach(policy)
    return policy


def test_what_is_not_trained_stays_and_the_rest_moves_as_it_would(tiny_llama):
    weights = {}
    for tuning in (Full(), Norms()):
        engine = SingleEngine(AdamW(clip=0.0), CPU)
        policy = policy_of(tiny_llama, tuning, engine)
        before = {n: p.detach().clone() for n, p in policy.causal_lm.named_parameters()}
        engine.train(True)
        loss = engine.forward(collate(examples()), TokenLoss(), TokenCount(20.0))
        engine.backward(loss.total, last=True)
        engine.step(1e-2)
        after = dict(policy.causal_lm.named_parameters())
        weights[type(tuning)] = after
        moved = {name for name in before if not torch.equal(before[name], after[name])}
        assert moved == {name for name in before if tuning.trained(name)}
        assert len(engine._optimizer.state()) == len(moved)  # no moments of what is frozen
    norms = [name for name in before if "norm" in name]
    assert 0 < len(norms) < len(before)
    for name in norms:
        torch.testing.assert_close(weights[Norms][name], weights[Full][name], rtol=1e-6, atol=0)


def test_a_virtual_token_before_each_sample(tiny_llama):
    import transformers

    engine = SingleEngine(AdamW(clip=0.0), CPU)
    tuning = Virtual(tokens=2)
    policy = policy_of(tiny_llama, tuning, engine)
    batch = collate(examples())
    extended = tuning.extend(batch)
    ids = extended.input_ids_T
    assert extended.cu_seqlens_S == extended.bounds_S.tolist() == [0, 9, 22, 26, 32]
    assert (ids[[0, 1, 9, 10]].tolist(), int((ids < 0).sum())) == ([-1, -2, -1, -2], 4)
    assert torch.equal(ids[ids >= 0], batch.input_ids_T)
    assert extended.position_ids_T[[0, 2, 9, 22, 26]].tolist() == [0, 2, 0, 13, 13]

    loss = engine.forward(batch, TokenLoss(), TokenCount(3.0))
    engine.backward(loss.total, last=True)
    own = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager")
    virtual = policy.causal_lm.virtual.weight.detach().clone().requires_grad_()
    rows, expected, total = examples(), [], torch.zeros(())
    for row in rows:
        before = [] if row.parent is None else rows[row.parent].input_ids_L
        ids = torch.tensor([*before, *row.input_ids_L]).long()
        embeds = torch.cat([virtual, own.get_input_embeddings()(ids)])
        logits = own(inputs_embeds=embeds[None]).logits[0, 1:-1]  # from the last virtual token on
        nll = nn.functional.cross_entropy(logits, ids, reduction="none")[len(before) :]
        weight = torch.from_numpy(row.weight_L)
        expected.append(nll[weight > 0].detach())
        total = total + (nll * weight).sum() / 3.0
    total.backward()
    nll_N = loss.nll_N[: batch.num_targets]
    torch.testing.assert_close(nll_N, torch.cat(expected), rtol=1e-5, atol=1e-5)
    gradient = policy.causal_lm.virtual.weight.grad
    torch.testing.assert_close(gradient, virtual.grad, rtol=1e-4, atol=1e-6)
    assert {n for n, p in policy.named_parameters() if p.grad is not None} == {
        "causal_lm.virtual.weight"
    }
    assert policy.check_head(batch) < 1e-4  # the start-up check runs on the extended row
    nothing = engine.forward(filler(TokenLoss()), TokenLoss(), TokenCount(3.0))
    assert float(nothing.total.detach()) == 0


def test_whether_it_can_be_merged():
    assert Full().mergeable and Full().whole_model
    assert not Virtual().mergeable and "no weight of the model" in Virtual().unmergeable


@pytest.mark.parametrize("tuning", [Full(), Norms()])
def test_build_asks_the_tuning_of_the_config(tiny_llama, tuning):
    config = complete(RunConfig(model=ModelConfig(path=str(tiny_llama))))
    engine = SingleEngine(AdamW(), CPU)
    policy = build_policy(replace(config, tuning=tuning), engine, torch.float32, ["all"])
    for name, parameter in policy.causal_lm.named_parameters():
        assert parameter.requires_grad is tuning.trained(name), name
