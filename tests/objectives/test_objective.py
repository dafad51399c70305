"""What an objective declares is counted, summed, shown and checked, whatever it is."""

from __future__ import annotations

import json
import runpy
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from posttrain_kernels import linear_cross_entropy, linear_logprob

from posttrain_dist import dist
from posttrain_dist.config import SLOTS, RunConfig, complete
from posttrain_dist.data.packs.collate import collate, filler
from posttrain_dist.engine import AdamW
from posttrain_dist.engine.single import SingleEngine
from posttrain_dist.errors import ConfigError, DataError
from posttrain_dist.flow import Extra
from posttrain_dist.loop import evaluate, fit
from posttrain_dist.metrics.channels import ChannelMeter, eval_metrics, train_metrics
from posttrain_dist.models import ModelConfig
from posttrain_dist.models.head import HeadKernels
from posttrain_dist.models.load import load_model
from posttrain_dist.models.policy import Policy
from posttrain_dist.objectives.base import TokenLoss
from posttrain_dist.objectives.sft import Sft

ratio = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("ratio.py"))))
Ratio, RatioCount, Units = ratio.Ratio, ratio.RatioCount, ratio.Units
CPU = torch.device("cpu")
CHANNELS = ["even", "odd"]


@pytest.fixture
def engine(tiny_llama):
    engine = SingleEngine(AdamW(), CPU)
    config = ModelConfig(path=str(tiny_llama))
    model = load_model(
        config, tiny_llama, dtype=torch.float32, seed=0, materialise=engine.materialise()
    )
    engine.attach(Policy(model, HeadKernels(linear_cross_entropy, linear_logprob), 2))
    return engine


def expected(folder, units) -> dict[str, float]:
    """The metrics of one step by plain transformers: every answer behind its own prompt."""
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    sums = torch.zeros(2, 3, dtype=torch.float64)  # nll, weight, ratio of each channel
    ratios, pairs = 0.0, 0
    for prompt, *answers in units:
        for answer in answers:
            pairs += 1
            ids = torch.tensor([*prompt.input_ids_L, *answer.input_ids_L])
            logits = model(input_ids=ids[None].long()).logits[0].double()
            logprob = logits.log_softmax(-1)[:-1].gather(1, ids[1:, None].long())[:, 0]
            logprob = logprob[len(prompt.input_ids_L) - 1 :].detach()
            weight = torch.from_numpy(answer.weight_L).double()
            ratio = (logprob / torch.from_numpy(answer.extra["old_logprob_L"]).double())[weight > 0]
            ratios += float(ratio.sum())
            weighted = (ratio * weight[weight > 0]).sum()
            sums[answer.channel] += torch.stack([-(logprob * weight).sum(), weight.sum(), weighted])
    nll, weight, ratio = sums.sum(dim=0).tolist()
    channels = dict(zip(CHANNELS, sums.tolist(), strict=True))
    return {
        "train/loss": nll / weight,
        "ratio/ratio": ratio / weight,
        "ratio/paired": pairs,
        **{f"channel_loss/{c}": row[0] / row[1] for c, row in channels.items()},
        **{f"channel_share/{c}": row[1] / weight for c, row in channels.items()},
        **{f"ratio_channel_ratio/{c}": row[2] / row[1] for c, row in channels.items()},
        "ratio_channel_paired/even": pairs,
        "ratio_channel_paired/odd": 0,
        "total": nll / weight + ratios / pairs,
    }


def test_two_components_are_summed_in_one_call_and_divide_the_loss(engine, tiny_llama, monkeypatch):
    totals, reduced = [], []
    forward = engine.forward
    plain_sum = dist.all_sum

    def watched(batch, objective, denominators):
        assert type(denominators) is RatioCount
        loss = forward(batch, objective, denominators)
        totals.append(float(loss.total.detach()))
        return loss

    def summed(tensor):
        reduced.append(tensor.numel())
        return plain_sum(tensor)

    monkeypatch.setattr(engine, "forward", watched)
    monkeypatch.setattr(dist, "all_sum", summed)
    meter = ChannelMeter(CHANNELS, Ratio(), CPU)
    infos = fit(
        engine=engine,
        source=Units(),
        objective=Ratio(),
        meter=meter,
        describe=meter.train_metrics,
        learning_rate=lambda step: 0.0,
        steps=2,
    )
    wanted = expected(tiny_llama, Units().units(1))
    total = wanted.pop("total")
    next(infos)
    reduced.clear()
    metrics = next(infos).metrics
    # Both components and the stop request, then at the logged step the meter's [2, 4] and tokens.
    assert reduced == [3, 9]
    assert len(totals) == 3 and sum(totals) == pytest.approx(total, rel=1e-5)
    for name in ("train/lr", "train/grad_norm", "train/tokens_per_s"):
        metrics.pop(name)
    assert metrics == pytest.approx(wanted, rel=1e-5)


def test_an_evaluation_has_the_same_columns(engine, tiny_llama):
    wanted = expected(tiny_llama, Units().units(1))
    meter = ChannelMeter(CHANNELS, Ratio(), CPU)
    metrics = meter.eval_metrics(evaluate(engine, Units().step(1), Ratio(), meter))
    del wanted["total"]
    renamed = {
        "eval/loss" if name == "train/loss" else f"eval_{name}": value
        for name, value in wanted.items()
        if "share" not in name
    }
    assert metrics == pytest.approx(renamed, rel=1e-5)


def test_the_columns_of_a_token_loss_give_the_metrics_that_all_have():
    table_C4 = torch.tensor([[6.0, 4, 1, 8], [1.0, 1, 2, 2], [0, 0, 0, 0]], dtype=torch.float64)
    channels = ["a", "b", "none"]
    assert train_metrics(table_C4, channels, Sft()) == {
        "train/loss": 7 / 5,
        "channel_loss/a": 1.5,
        "channel_share/a": 0.8,
        "channel_loss/b": 1.0,
        "channel_share/b": 0.2,
    }
    assert eval_metrics(table_C4, channels, Sft()) == {
        "eval/loss": 7 / 5,
        "eval/accuracy": 0.3,
        "eval_channel_loss/a": 1.5,
        "eval_channel_loss/b": 1.0,
    }


@pytest.mark.parametrize("name", ["advantage_N", "margin_S"])
def test_a_batch_without_a_declared_field_is_refused(engine, name):
    @dataclass(kw_only=True, slots=True)
    class Needy(TokenLoss):
        extra: ClassVar[tuple[Extra, ...]] = (Extra(name),)

    batch = Units().step(1)[0]
    with pytest.raises(DataError, match=rf"the objective needy needs {name} .*is not there"):
        engine.forward(batch, Needy(), Needy().count(batch))
    wrong = replace(batch, extra={**batch.extra, name: torch.zeros(77)})
    with pytest.raises(DataError, match=rf"{name} .*has 77 numbers, not "):
        engine.forward(wrong, Needy(), Needy().count(wrong))
    source = Units()
    meter = ChannelMeter(CHANNELS, Needy(), CPU)
    infos = fit(
        engine=engine,
        source=source,
        objective=Needy(),
        meter=meter,
        describe=meter.train_metrics,
        learning_rate=lambda step: 0.0,
        steps=1,
        start=0,
    )
    with pytest.raises(DataError, match=rf"needy needs {name}"):
        list(infos)


def test_padding_and_fillers_are_finite(engine):
    """old_logprob is 0 there: a ratio that is multiplied with 0 would be no number."""
    for batch in (Units().step(1)[0], filler(Ratio())):
        assert float(batch.extra["old_logprob_N"][batch.num_targets :].abs().sum()) == 0
        loss = engine.forward(batch, Ratio(), RatioCount(5.0, 2.0))
        engine.backward(loss.total, last=True)
        assert bool(torch.isfinite(loss.total)) and bool(torch.isfinite(loss.channels_CK).all())
        assert all(torch.isfinite(p.grad).all() for p in engine.policy.parameters())


def test_extra_fields_reach_targets_samples_and_devices():
    prompt, *answers = Units().units(1)[2]
    batch = collate([prompt, *answers])
    assert batch.parent_S == [-1, 0, 0, 0] and batch.extra["pair_S"].tolist() == [-1, 20, 20, 20]
    wanted = [value for e in answers for value in e.extra["old_logprob_L"][e.weight_L > 0]]
    assert batch.extra["old_logprob_N"][: batch.num_targets].tolist() == wanted
    assert {n: t.dtype for n, t in batch.extra.items()} == {
        "old_logprob_N": torch.float32,
        "pair_S": torch.int64,
    }
    moved = batch.to("meta")
    assert {t.device.type for t in (moved.labels_N, *moved.extra.values())} == {"meta"}
    assert (moved.parent_S, moved.cu_seqlens_S) == (batch.parent_S, batch.cu_seqlens_S)
    empty = filler(Ratio())
    assert empty.extra["pair_S"].tolist() == [-1]
    assert empty.extra["old_logprob_N"].tolist() == [0.0] * len(empty.labels_N)
    lacking = replace(answers[0], extra={})
    with pytest.raises(DataError, match="sample 21 has no old_logprob_L"):
        collate([prompt, lacking])
    with pytest.raises(DataError, match="sample 21 follows sample 20, which does not stand before"):
        collate([answers[0], prompt])


@pytest.mark.parametrize("world", [2, 3])
def test_sharded_with_fillers_it_trains_as_in_one_process(engine, tiny_llama, run_workers, world):
    """Prefetched, under ZeRO-3; with two ranks one of them has a filler in each step."""
    meter = ChannelMeter(CHANNELS, Ratio(), CPU)
    infos = fit(
        engine=engine,
        source=Units(),
        objective=Ratio(),
        meter=meter,
        describe=meter.train_metrics,
        learning_rate=lambda step: 1e-2,
        steps=3,
    )
    wanted = [info.metrics for info in infos][1:]
    (output, *_) = run_workers("train_ratio.py", world, tiny_llama)
    found = json.loads(output.split("METRICS ")[1].splitlines()[0])
    for ours, reference in zip(found, wanted, strict=True):
        for metrics in (ours, reference):
            del metrics["train/tokens_per_s"]
        assert ours == pytest.approx(reference, rel=2e-5)
    assert found[2]["train/loss"] < found[0]["train/loss"]


def test_an_objective_that_data_files_cannot_feed_is_refused_before_anything_starts(monkeypatch):
    monkeypatch.setitem(SLOTS["objective"], "ratio", Ratio)
    with pytest.raises(ConfigError, match=f"objective: needs .*{Ratio.extra[0].name}"):
        complete(RunConfig(objective=Ratio()))
