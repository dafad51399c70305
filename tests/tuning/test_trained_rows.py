"""Rows of added tokens that LoRA trains: beside plain `peft`, full tuning, and merged."""

from __future__ import annotations

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
import tuned_models as tuned
from safetensors.torch import load_file

from posttrain_dist.config import (
    DataConfig,
    Dtype,
    Full,
    ModelConfig,
    RunConfig,
    TrainConfig,
    complete,
)
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.engine import AdamW
from posttrain_dist.errors import ConfigError
from posttrain_dist.evaluation.adapter_losses import evaluate_adapters
from posttrain_dist.files import read_rows
from posttrain_dist.flow import Example
from posttrain_dist.generation.local import LocalGenerator
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.objectives.base import TokenCount, TokenLoss
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train
from posttrain_dist.tuning.base import fill_parameters
from posttrain_dist.tuning.bottleneck import Bottleneck, Placement
from posttrain_dist.tuning.lora import Lora

TOKENS = ["<a>", "<b>", "<c>", "<d>"]  # of a model with three rows that no token uses
NEW = range(293, 297)
LORA = Lora(rank=4, alpha=6.0, targets="attention")
FORMS = {
    "untied": ("Llama", {}),
    "tied": ("Llama", {"tie_word_embeddings": True}),
    # Multiplies embeddings in their module, caps logits.
    "scaled": ("Gemma3", {"final_logit_softcapping": 3.0, "sliding_window": 6}),
}
each_form = pytest.mark.parametrize("form", FORMS)


@pytest.fixture(scope="module")
def folders(tmp_path_factory, builders):
    made = {}

    def get(form):
        if form not in made:
            architecture, changes = FORMS[form]
            if architecture == "Gemma3":
                architecture = "Gemma3Text"
            made[form] = tmp_path_factory.mktemp(form)
            build(builders, made[form], architecture, changes)
        return made[form]

    return get


def build(builders, folder, architecture, changes):
    if architecture != "Gemma3Text":
        return builders.model(folder, architecture, **changes)
    builders.tokenizer(folder)
    torch.manual_seed(0)
    config = transformers.Gemma3TextConfig(
        **{**builders.size, "vocab_size": 296, "eos_token_id": 0, "pad_token_id": 1, **changes}
    )
    model = transformers.Gemma3ForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.mul_(4.0)
    model.save_pretrained(folder)
    return folder


def rows() -> list[Example]:
    """Samples in which old and new tokens are input and target."""
    found = []
    for i, row in enumerate(tuned.examples()):
        ids_L = row.input_ids_L.copy()
        ids_L[i % 2 :: 3] = np.resize(np.array(NEW), len(ids_L[i % 2 :: 3]))
        found.append(replace(row, input_ids_L=ids_L))
    return found


def tuned_policy(folder, tuning=LORA):
    return tuned.tuned_policy(folder, tuning, add_tokens=TOKENS)


def grown(folder):
    """The base with rows for the tokens, by transformers; what they hold does not matter."""
    own = transformers.AutoModelForCausalLM.from_pretrained(
        folder, attn_implementation="eager", dtype=torch.float32
    )
    own.resize_token_embeddings(297, mean_resizing=False)
    return own


@each_form
def test_it_begins_as_the_grown_base_and_trains_these_rows_alone(folders, form):
    batch = collate(rows())
    full, policy = (tuned_policy(folders(form), tuning) for tuning in (Full(), LORA))
    full_loss, expected = tuned.run(full, batch)
    loss, found = tuned.run(policy, batch)
    assert torch.equal(loss, full_loss)
    assert policy.check_head(batch) < 1e-5
    delta = {n: g for n, g in found.items() if "token_adapter" in n}
    places = ["model.embed_tokens"] + ["lm_head"] * (form == "untied")
    assert delta.keys() == {f"{p}.token_adapter.trainable_tokens_delta" for p in places}
    for place in places:  # a tied matrix has the gradients of both
        rows_KD = expected[f"{place}.weight"][NEW.start : NEW.stop]
        gradient = delta[f"{place}.token_adapter.trainable_tokens_delta"]
        assert rows_KD.abs().max() > 1e-4
        torch.testing.assert_close(gradient, rows_KD, rtol=1e-5, atol=1e-7)
    assert {n for n in found if "token_adapter" not in n} == {
        n for n, _ in policy.causal_lm.named_parameters() if ".lora_" in n
    }


@each_form
def test_saved_they_are_the_same_in_plain_peft(folders, tmp_path, form):
    import peft

    policy = tuned_policy(folders(form))
    tuned.scatter(policy.causal_lm, LORA)
    network = policy.config.to_dict()
    saved = LORA.to_adapter(tuned.kept_of(policy, LORA), network)
    folder = tuned.write_folder(tmp_path / "adapter", saved, folders(form))
    own = peft.PeftModel.from_pretrained(grown(folders(form)), str(folder)).eval()
    before = tuned_policy(folders(form))
    for row in rows()[:2]:
        ids = torch.from_numpy(row.input_ids_L).long()
        with torch.no_grad():
            expected = own(input_ids=ids[None]).logits[0]
        found = tuned.policy_logits(policy, row)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)
        moved = (tuned.policy_logits(before, row) - found).abs()
        assert moved.max() > 0.05 and moved[:, NEW.start :].max() > 0.05
    names = {name for name in saved.tensors if "token_adapter" in name}
    mine = peft.get_peft_model_state_dict(own, save_embedding_layers=False)
    assert names == {name for name in mine if "token_adapter" in name}
    again = tuned_policy(folders(form))
    short = {name.rpartition(".")[2]: list(NEW) for name in saved.config["trainable_token_indices"]}
    for indices in (saved.config["trainable_token_indices"], short, list(NEW)):  # as peft has them
        config = {**saved.config, "trainable_token_indices": indices}
        fill_parameters(again.causal_lm, LORA.from_adapter(saved._replace(config=config), network))
    for name, tensor in tuned.kept_of(policy, LORA).items():
        assert torch.equal(tuned.kept_of(again, LORA)[name], tensor), name


@each_form
def test_merged_they_are_rows_of_the_model(folders, form):
    policy = tuned_policy(folders(form))
    tuned.scatter(policy.causal_lm, LORA)
    kept, network = tuned.kept_of(policy, LORA), policy.config.to_dict()
    files = load_file(folders(form) / "model.safetensors")
    merged = {name: LORA.merge(name, t, kept, network) for name, t in files.items()}
    own = grown(folders(form))
    own.load_state_dict(merged, strict=form == "untied")
    own.tie_weights()
    old = files["model.embed_tokens.weight"][:293]
    assert torch.equal(merged["model.embed_tokens.weight"][:293], old)
    row = rows()[1]
    with torch.no_grad():
        expected = own(input_ids=torch.from_numpy(row.input_ids_L).long()[None]).logits[0]
    torch.testing.assert_close(tuned.policy_logits(policy, row), expected, rtol=1e-5, atol=2e-5)


def test_embeddings_that_are_trained_in_full_have_their_rows_in_them(folders):
    tuning = replace(LORA, modules_to_save=["embed_tokens"])
    policy = tuned_policy(folders("untied"), tuning)
    trained = {n for n, p in policy.causal_lm.named_parameters() if p.requires_grad}
    assert {n for n in trained if ".lora_" not in n} == {
        "model.embed_tokens.weight",
        "lm_head.token_adapter.trainable_tokens_delta",
    }
    _, gradients = tuned.run(policy, collate(rows()))
    assert all(gradients[n].abs().max() > 0 for n in trained if "lora_A" not in n)
    with pytest.raises(ConfigError, match="the head is a target itself"):
        tuned_policy(folders("untied"), replace(LORA, targets=["lm_head"]))


def test_on_a_base_in_nf4_they_and_bottlenecks_are_trained(nf4_llama):
    batch, old = collate(rows()), collate(tuned.examples())
    hidden, losses = [], {}
    for tuning, tokens in (
        (LORA, []),
        (LORA, TOKENS),
        (Bottleneck(placement=Placement.houlsby, reduction=8), []),
    ):
        policy = tuned.tuned_policy(nf4_llama, tuning, add_tokens=tokens, nf4=True)
        with torch.no_grad():
            hidden.append(policy.hidden(old))
        engine = tuned.engine_of(policy)
        engine.train(True)
        losses[type(tuning).__name__, len(tokens)] = steps = []
        for _ in range(5):
            loss = engine.forward(batch if tokens else old, TokenLoss(), TokenCount(20.0))
            engine.backward(loss.total, last=True)
            steps.append(float(loss.total.detach()))
            engine.step(1e-2)
        weights = [m.weight for m in policy.modules() if hasattr(m, "quant_state")]
        assert len(weights) == 14 and all(w.grad is None for w in weights)
    assert torch.equal(hidden[0], hidden[1]) and torch.equal(hidden[0], hidden[2])
    assert all(steps[-1] < steps[0] - 0.05 for steps in losses.values()), losses


def test_a_run_of_lora_ends_in_a_folder_that_has_them(tiny_llama, tmp_path, builders):
    import peft

    words = ["one", "two three", "four", "five six seven"] * 6
    chats = [builders.chat(f"say {w} {i}", f"<a>{w}<b>", "tool") for i, w in enumerate(words)]
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama), add_tokens=TOKENS),
            data=DataConfig(train=str(builders.write(tmp_path / "rows.jsonl", chats))),
            tuning=LORA,
            optimizer=AdamW(lr=1e-2),
            train=TrainConfig(steps=3, batch_size=2, save_every=2, dtype=Dtype.float32),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    prepare(config, tmp_path / "run" / "prepared")
    train(config, tmp_path / "run")
    rows = read_rows(tmp_path / "run" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-000003")
    train(config, tmp_path / "run")  # from step 2, with the same result
    again = read_rows(tmp_path / "run" / "metrics.jsonl")
    assert [r.get("train/loss") for r in again] == [r.get("train/loss") for r in rows]
    folder = tmp_path / "run" / "adapter"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids(TOKENS) == list(NEW)
    own = peft.PeftModel.from_pretrained(grown(tiny_llama), str(folder)).eval()
    heldout = Examples.open(tmp_path / "run" / "prepared", "eval")
    total = weight = new = 0.0
    for example in (heldout[i] for i in range(len(heldout))):
        ids = torch.from_numpy(example.input_ids_L.astype(np.int64))
        weight_L = torch.from_numpy(example.weight_L[1:].copy())
        with torch.no_grad():
            logits = own(input_ids=ids[None]).logits[0, :-1]
        nll = torch.nn.functional.cross_entropy(logits, ids[1:], reduction="none")
        total, weight = total + float((nll * weight_L).sum()), weight + float(weight_L.sum())
        new += float(((ids[1:] >= NEW.start) * weight_L).sum())
    assert again[-1]["eval/loss"] == pytest.approx(total / weight, rel=1e-5)
    found = evaluate_adapters(config, tmp_path / "run" / "prepared", {"mine": folder})
    assert found["mine"]["loss"] == pytest.approx(total / weight, rel=1e-5)
    assert found["none"]["loss"] == pytest.approx(rows[0]["eval/loss"], rel=1e-6)
    assert new >= 2 * len(heldout)
    generator = LocalGenerator.load(folder)  # grows the base for it
    prompt = tokenizer("say four 2").input_ids
    scored = generator.score([[*prompt, NEW.start]])
    with torch.no_grad():
        logits = own(input_ids=torch.tensor([prompt])).logits[0, -1]
    assert scored[0][-1] == pytest.approx(float(logits.log_softmax(-1)[NEW.start]), rel=1e-4)
