"""An adapter is saved as `peft` saves it, continued, and converted without loss."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
import tuned_models as tuned
from safetensors.torch import load_file

from posttrain_dist.data.packs.collate import collate
from posttrain_dist.errors import ModelError
from posttrain_dist.tuning.base import SavedAdapter
from posttrain_dist.tuning.ia3 import Ia3
from posttrain_dist.tuning.injection.low_rank import as_plain_lora
from posttrain_dist.tuning.lora import Lora, LoraInit

LORA = Lora(rank=4, alpha=6.0, targets=["q_proj", "lm_head"])


def saved_by(folder, tuning):
    policy = tuned.tuned_policy(folder, tuning)
    tuned.scatter(policy.causal_lm, tuning)
    return policy, tuning.to_adapter(tuned.kept_of(policy, tuning), policy.config.to_dict())


@pytest.fixture(scope="module")
def saved_lora(tiny_llama):
    return saved_by(tiny_llama, LORA)[1]


@pytest.fixture
def continued(tiny_llama, tmp_path):
    """continued(saved, tuning): a policy that continues the adapter in a folder."""

    def attach(saved, tuning):
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        tuned.write_folder(folder, saved, tiny_llama)
        return tuned.tuned_policy(tiny_llama, replace(tuning, init_from=str(folder)))

    return attach


def test_modules_that_an_adapter_trains_in_full_are_not_lost(tiny_llama, continued):
    """They would be written into the frozen base: right losses, and an adapter without them."""
    tuning = Lora(rank=2, alpha=4.0, modules_to_save=["norm", "lm_head"])
    policy, saved = saved_by(tiny_llama, tuning)
    with pytest.raises(ModelError, match=r"trains lm_head, model\.norm in full") as caught:
        continued(saved, replace(tuning, modules_to_save=[]))
    assert caught.value.fix == "set 'tuning.modules_to_save=[lm_head,model.norm]'"
    again = continued(saved, replace(tuning, modules_to_save=["lm_head", "model.norm"]))
    for name, tensor in tuned.kept_of(policy, tuning).items():
        assert torch.equal(dict(again.causal_lm.named_parameters())[name], tensor), name


@pytest.mark.parametrize(
    ("tuning", "options"),
    [
        (Lora(rank=4, alpha=6.0, dora=True, targets=["k_proj", "o_proj"]), {"use_dora": True}),
        (Lora(rank=4, alpha=6.0, targets="mlp", modules_to_save=["embed_tokens"]), {}),
        (Ia3(), {}),
    ],
)
def test_names_and_config_are_those_that_peft_itself_saves(tiny_llama, tmp_path, tuning, options):
    import peft
    import transformers

    _, saved = saved_by(tiny_llama, tuning)
    own = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    if isinstance(tuning, Lora):
        words = {"mlp": ["gate_proj", "up_proj", "down_proj"]}
        targets = tuning.targets if isinstance(tuning.targets, list) else words[tuning.targets]
        config = peft.LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=targets,
            modules_to_save=tuning.modules_to_save or None,
            task_type="CAUSAL_LM",
            **options,
        )
    else:
        config = peft.IA3Config(
            target_modules=["k_proj", "v_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            task_type="CAUSAL_LM",
        )
    peft.get_peft_model(own, config).save_pretrained(tmp_path)
    theirs = load_file(tmp_path / "adapter_model.safetensors")
    assert {n: t.shape for n, t in saved.tensors.items()} == {n: t.shape for n, t in theirs.items()}
    written = json.loads((tmp_path / "adapter_config.json").read_text())
    differ = {"target_modules", "feedforward_modules", "modules_to_save"}
    for key in saved.config.keys() - differ:
        assert saved.config[key] == written[key], key
    every = saved.config["target_modules"]
    assert every and all(own.get_submodule(name) is not None for name in every)
    if isinstance(tuning, Ia3):
        layers = range(own.config.num_hidden_layers)
        assert saved.config["feedforward_modules"] == [
            f"model.layers.{i}.mlp.down_proj" for i in layers
        ]


@pytest.mark.parametrize(
    "tuning",
    [
        LORA,
        Lora(rank=4, alpha=6.0, init=LoraInit.pissa, dora=True),
        Lora(rank=4, targets="mlp", modules_to_save=["model.norm"]),
        Ia3(),
    ],
)
def test_a_continued_adapter_is_the_model_that_was_saved(tiny_llama, continued, tuning):
    policy, saved = saved_by(tiny_llama, tuning)
    again = continued(saved, tuning)
    batch = collate(tuned.examples())
    (losses, gradients), (found, others) = (tuned.run(p, batch) for p in (policy, again))
    torch.testing.assert_close(found, losses, rtol=1e-6, atol=2e-6)
    assert gradients.keys() == others.keys()
    kept = tuned.kept_of(policy, tuning)
    assert all(torch.equal(t, kept[n]) for n, t in tuned.kept_of(again, tuning).items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "LOHA"}, "method LOHA, not LoRA"),
        ({"r": 8}, "has the rank 8, this tuning 4"),
        ({"lora_alpha": 12}, "has the scale 3, this tuning 1.5"),
        ({"use_rslora": True}, "has the scale 3, this tuning 1.5"),
        ({"use_dora": True}, "has use_dora=True"),
        ({"bias": "all"}, "trains biases"),
        ({"rank_pattern": {"q_proj": 2}}, "has a rank_pattern"),
        ({"init_lora_weights": "pissa_niter_4"}, "changes the base model's weights"),
    ],
)
def test_another_adapter_is_refused(saved_lora, changes, message):
    other = SavedAdapter({**saved_lora.config, **changes}, saved_lora.tensors)
    with pytest.raises(ModelError, match=message):
        LORA.from_adapter(other, {})
    with pytest.raises(ModelError, match="the method LORA"):
        Ia3().from_adapter(saved_lora, {})


def test_other_tensors_are_refused(saved_lora, continued):
    config, tensors = saved_lora
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    fewer = {n: t for n, t in tensors.items() if n != name}
    with pytest.raises(ModelError, match=r"lacks 1 tensors, such as .*q_proj.lora_A.default"):
        continued(SavedAdapter(config, fewer), LORA)
    with pytest.raises(ModelError, match=r"lora_A.default.weight \(4, 32\).* is not in the model"):
        continued(saved_lora, replace(LORA, targets=["lm_head"]))
    wider = {**tensors, name: torch.zeros(4, 33)}
    with pytest.raises(ModelError, match=r"\(4, 33\) of the adapter has the shape \(4, 32\) there"):
        continued(SavedAdapter(config, wider), LORA)


def test_rslora_is_converted_to_plain_lora_with_the_same_logits(tiny_llama, tmp_path):
    policy, saved = saved_by(tiny_llama, Lora(rank=4, alpha=3.0, rslora=True))
    plain = as_plain_lora(saved)
    assert not plain.config["use_rslora"] and plain.config["lora_alpha"] == 6
    row = tuned.examples()[1]
    folder = tuned.write_folder(tmp_path / "plain", plain, tiny_llama)
    logits = tuned.peft_logits(tiny_llama, folder, torch.from_numpy(row.input_ids_L).long())
    torch.testing.assert_close(tuned.policy_logits(policy, row), logits, rtol=1e-5, atol=2e-5)
    assert as_plain_lora(plain) == plain
    for tuning, name in ((Lora(rank=4, dora=True), "DoRA"), (Ia3(), "IA3")):
        with pytest.raises(ModelError, match=name) as caught:
            as_plain_lora(saved_by(tiny_llama, tuning)[1])
        assert "--merge" in caught.value.fix


def test_pissa_is_saved_as_plain_lora_of_twice_the_rank(tiny_llama):
    tuning = Lora(rank=4, alpha=6.0, rslora=True, init=LoraInit.pissa, targets=["q_proj"])
    policy = tuned.tuned_policy(tiny_llama, tuning)
    layer = policy.causal_lm.model.layers[1].self_attn.q_proj
    base = load_file(tiny_llama / "model.safetensors")["model.layers.1.self_attn.q_proj.weight"]
    a, b = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    u, s, v = torch.linalg.svd(base, full_matrices=False)
    best = (u[:, :4] * s[:4]) @ v[:4]  # Eckart and Young
    torch.testing.assert_close(tuning.scale * (b @ a), best, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.base_layer.weight, base - best, rtol=1e-4, atol=1e-5)
    tuned.scatter(policy.causal_lm, tuning)
    saved = tuning.to_adapter(tuned.kept_of(policy, tuning), policy.config.to_dict())
    assert saved.config["r"] == 8 and not saved.config["use_rslora"]
    assert saved.config["lora_alpha"] / 8 == pytest.approx(tuning.scale)
    assert saved.config["init_lora_weights"] is True
    assert {t.shape[0] if "lora_A" in n else t.shape[1] for n, t in saved.tensors.items()} == {8}
