"""A reward model from its first step to the folder that plain transformers scores answers with."""

from __future__ import annotations

import json
import shutil
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch
from compared_answers import write
from safetensors.torch import load_file

from posttrain_dist.build import make_policy
from posttrain_dist.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.data.packs.collate import collate
from posttrain_dist.data.prepared.arrays import Examples
from posttrain_dist.engine import AdamW, DeepSpeed
from posttrain_dist.errors import ConfigError, ModelError
from posttrain_dist.evaluation.heldout import evaluate
from posttrain_dist.export import export_checkpoint
from posttrain_dist.files import read_rows
from posttrain_dist.generation.local_folder import load_model as load_to_generate
from posttrain_dist.merge import merge_checkpoint
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.models import Checkpointing
from posttrain_dist.models.folder import check_folder
from posttrain_dist.models.load import load_base, load_model
from posttrain_dist.objectives.preference.reward import Reward
from posttrain_dist.objectives.sft import Sft
from posttrain_dist.preflight import check_inputs
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train
from posttrain_dist.tuning.base import Quantize
from posttrain_dist.tuning.full import Full
from posttrain_dist.tuning.lora import Lora

END, PAD = 0, 1


def make(config: RunConfig, folder, pairs: int = 48, heldout: int = 24):
    """A run folder whose prepared data are pairs; it is trained."""
    folder.mkdir(exist_ok=True)
    prepare(replace(config, objective=Sft()), folder / "prepared")
    write(folder / "prepared", pairs, heldout)
    (folder / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    train(config, folder)
    return folder


@pytest.fixture(scope="module")
def config(tiny_llama, rows_file):
    return complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            objective=Reward(),
            optimizer=AdamW(lr=3e-3),
            train=TrainConfig(steps=24, batch_size=2, dtype=Dtype.float32, save_every=12),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )


@pytest.fixture(scope="module")
def full(config, tmp_path_factory):
    return make(config, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def lora(config, tmp_path_factory):
    tuned = replace(config, tuning=Lora(rank=4), train=replace(config.train, steps=6))
    return make(complete(tuned), tmp_path_factory.mktemp("lora"))


def conversations(folder):
    """The held-out answers behind their prompts: token ids, in the order of the split."""
    examples = Examples.open(folder / "prepared", "eval")
    prompts, found = {}, []
    for i in range(len(examples)):
        each = examples[i]
        ids = each.input_ids_L.astype("int64").tolist()
        if each.parent is None:
            prompts[each.sample_id] = ids
        else:
            found.append(prompts[each.parent] + ids)
    return found


def scores(model, conversations, side="right"):
    """One batch of plain transformers."""
    longest = max(map(len, conversations))
    rows, masks = [], []
    for ids in conversations:
        fill = [0] * (longest - len(ids))
        pads, ones = [PAD] * len(fill), [1] * len(ids)
        rows.append(ids + pads if side == "right" else pads + ids)
        masks.append(ones + fill if side == "right" else fill + ones)
    with torch.no_grad():
        logits = model(torch.tensor(rows), attention_mask=torch.tensor(masks)).logits
    assert logits.shape == (len(rows), 1)
    return logits[:, 0]


def reload(folder):
    import transformers

    return transformers.AutoModelForSequenceClassification.from_pretrained(folder).eval()


def test_a_separable_channel_is_learned(full):
    rows = read_rows(full / "metrics.jsonl")
    assert rows[-1]["eval_reward/accuracy"] >= 0.95
    assert {key for key in rows[-1] if key.startswith("eval_reward_channel_accuracy/")}
    assert rows[-1]["eval/loss"] < 0.3 < rows[0]["eval/loss"]


def test_the_export_scores_alone_padded_and_batched_as_training_did(full):
    model = reload(full / "export")
    assert type(model).__name__ == "LlamaForSequenceClassification"
    assert model.config.num_labels == 1 and model.config.pad_token_id == PAD != END
    ids = conversations(full)
    right, left = scores(model, ids), scores(model, ids, "left")
    alone = torch.cat([scores(model, [one]) for one in ids])
    torch.testing.assert_close(right, alone, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(left, alone, rtol=1e-5, atol=1e-5)
    margins = (alone[0::2] - alone[1::2]).double()
    loss = torch.nn.functional.softplus(-margins).mean().item()
    last = read_rows(full / "metrics.jsonl")[-1]
    assert last["eval/loss"] == pytest.approx(loss, rel=1e-5)
    assert last["eval_reward/margin"] == pytest.approx(margins.mean().item(), rel=1e-5)


def test_the_folder_says_how_it_is_asked(full):
    import transformers

    export = full / "export"
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    assert tokenizer.pad_token == "<|pad|>" and tokenizer.padding_side == "right"
    card = (export / "README.md").read_text(encoding="utf-8")
    assert "'<|end|>'" in card
    config = json.loads((export / "config.json").read_text())
    assert config["problem_type"] == "regression"  # vLLM then gives the number itself
    assert "lm_head.weight" not in load_file(export / "model.safetensors")
    assert not (export / "generation_config.json").exists()


def test_checkpoints_export_the_same_and_a_resumed_run_goes_the_same_way(full, config, tmp_path):
    again = export_checkpoint(full, tmp_path / "again")
    first = load_file(full / "export" / "model.safetensors")
    for name, tensor in load_file(again / "model.safetensors").items():
        assert torch.equal(tensor, first[name]), name
    half = replace(
        config, train=replace(config.train, resume=str(full / "checkpoints/step-000012"))
    )
    resumed = make(half, tmp_path / "resumed")
    for name, tensor in load_file(resumed / "export" / "model.safetensors").items():
        assert torch.equal(tensor, first[name]), name


def test_a_reward_model_is_trained_on_and_answers_nothing(full, config, tmp_path):
    export = full / "export"
    model = ModelConfig(path=str(export))
    drawn = load_base(model, export, dtype=torch.float32, seed=1, scalar=True)
    assert torch.equal(drawn.score.weight, load_file(export / "model.safetensors")["score.weight"])
    with pytest.raises(ModelError, match="is a reward model"):
        check_inputs(replace(config, model=model, objective=Sft()))
    with pytest.raises(ModelError, match="is a reward model"):
        load_to_generate(export)
    measured = evaluate(complete(replace(config, model=model)), full / "prepared")
    last = read_rows(full / "metrics.jsonl")[-1]
    assert measured["loss"] == pytest.approx(last["eval/loss"], rel=1e-5)
    assert measured["accuracy"] == last["eval_reward/accuracy"]
    network = json.loads((export / "config.json").read_text())
    network["id2label"] = {"0": "a", "1": "b"}
    (tmp_path / "config.json").write_text(json.dumps(network))
    with pytest.raises(ModelError, match="a classifier of 2 labels"):
        check_folder(tmp_path, need_weights=False)


def test_a_head_is_drawn_by_the_seed_alone(tiny_llama):
    model = ModelConfig(path=str(tiny_llama))
    heads = []
    for seed, noise in ((3, 0), (3, 1), (4, 1)):
        torch.manual_seed(noise)
        loaded = load_base(model, tiny_llama, dtype=torch.float32, seed=seed, scalar=True)
        heads.append(loaded.score.weight.detach())
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    assert float(heads[0].std()) == pytest.approx(33**-0.5, rel=0.4)


def test_a_pattern_that_leaves_out_the_head_is_refused(config, tmp_path):
    frozen = replace(config, tuning=type(config.tuning)(train="model[.]layers.*"))
    with pytest.raises(ConfigError, match=r"score\.weight"):
        make(frozen, tmp_path / "frozen")


def test_plain_peft_and_the_merged_folder_score_as_the_trained_adapter(lora, tiny_llama, tmp_path):
    import transformers
    from peft import PeftModel

    base = transformers.AutoModelForSequenceClassification.from_pretrained(
        tiny_llama, num_labels=1, pad_token_id=PAD
    )
    ids = conversations(lora)
    adapted = PeftModel.from_pretrained(base, lora / "adapter").eval()
    found = scores(adapted, ids)
    margins = (found[0::2] - found[1::2]).double()
    last = read_rows(lora / "metrics.jsonl")[-1]
    assert last["eval_reward/margin"] == pytest.approx(margins.mean().item(), rel=1e-4)
    merged = merge_checkpoint(lora, tmp_path / "merged")
    torch.testing.assert_close(scores(reload(merged), ids), found, rtol=1e-4, atol=1e-5)
    assert "lm_head.weight" not in load_file(merged / "model.safetensors")


def test_packed_scores_equal_those_of_the_folder(full):
    """The rows of training themselves: two units in a forest."""
    examples = Examples.open(full / "prepared", "eval")
    batch = collate([examples[i] for i in range(6)], own_rows=True)
    export = full / "export"
    model = load_model(
        ModelConfig(path=str(export)),
        export,
        dtype=torch.float32,
        seed=0,
        materialise=nullcontext(),
        scalar=True,
    )
    policy = make_policy(model, 2, None).eval()
    with torch.no_grad():
        packed = policy.head.reward(policy.hidden(batch))[:4]
    torch.testing.assert_close(
        packed, scores(reload(export), conversations(full)[:4]), rtol=1e-5, atol=1e-5
    )


def test_the_text_that_the_card_scores_is_that_of_training(tmp_path, builders):
    """Real rows, and a template that writes a line break behind the end of every turn."""
    import transformers

    model = builders.model(tmp_path / "model")
    template = (model / "chat_template.jinja").read_text(encoding="utf-8")
    broken = template.replace("<|end|>", "<|end|>\n")
    assert broken != template
    (model / "chat_template.jinja").write_text(broken, encoding="utf-8")
    rows = [
        {"prompt": f"name {i}", "chosen": f"good {i}", "rejected": f"worse {i} {i}", "task_type": t}
        for i, t in enumerate(("a", "b") * 12)
    ]
    data = DataConfig(train=str(builders.write(tmp_path / "rows.jsonl", rows)), max_length=64)
    config = complete(
        RunConfig(
            model=ModelConfig(path=str(model)),
            data=replace(data, eval_fraction=0.25),
            objective=Reward(),
            train=TrainConfig(steps=2, batch_size=2, dtype=Dtype.float32),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )
    prepare(config, tmp_path / "run" / "prepared")
    train(config, tmp_path / "run")
    export = tmp_path / "run" / "export"
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    code = (export / "README.md").read_text(encoding="utf-8").split("```python\n")[1]
    code = code.split("```")[0].replace("<this folder>", str(export))
    tokens = conversations(tmp_path / "run")
    texts = {tokenizer.decode(ids) for ids in tokens}
    asked = [
        [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row[answer]}]
        for row in rows
        for answer in ("chosen", "rejected")
    ]
    known = {"conversations": asked}
    exec(code, known)  # the lines of the card, as one would paste them
    assert texts <= set(known["texts"]) and len(texts) == len(tokens) > 4
    by_text = dict(zip(known["texts"], known["rewards"].tolist(), strict=True))
    found = scores(reload(export), tokens).tolist()
    assert [by_text[tokenizer.decode(ids)] for ids in tokens] == pytest.approx(found, abs=1e-5)
    margins = torch.tensor(found)[0::2] - torch.tensor(found)[1::2]
    last = read_rows(tmp_path / "run" / "metrics.jsonl")[-1]
    assert last["eval_reward/margin"] == pytest.approx(float(margins.mean()), abs=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_every_zero_stage_trains_the_same_reward_model(config, lora, tmp_path, run_workers, world):
    """Loss, metrics and weights of few steps, from a causal LM, beside one process."""
    few = replace(config, train=replace(config.train, steps=4, save_every=None))
    checkpointed = replace(few.model, activation_checkpointing=Checkpointing.full)
    single = make(few, tmp_path / "single")
    folders, expected = [], {}
    for stage in (0, 1, 2, 3):
        for tuning in (Full(), Lora(rank=4)):
            engine = DeepSpeed(stage=stage, persistence_threshold=0)
            changed = replace(few, engine=engine, tuning=tuning, model=checkpointed)
            folder = tmp_path / f"{type(tuning).__name__.lower()}-{stage}"
            folder.mkdir()
            (folder / "config.yaml").write_text(complete(changed).to_yaml(), encoding="utf-8")
            shutil.copytree(single / "prepared", folder / "prepared")
            folders.append(folder)
            expected[folder] = single if isinstance(tuning, Full) else None
    adapted = make(complete(replace(few, tuning=Lora(rank=4))), tmp_path / "adapted")
    run_workers("train_runs.py", world, *folders, timeout_s=600)
    for folder in folders:
        want = expected[folder] or adapted
        ours, theirs = (read_rows(each / "metrics.jsonl")[-1] for each in (folder, want))
        for key in ("train/loss", "eval/loss", "eval_reward/margin"):
            assert ours[key] == pytest.approx(theirs[key], rel=2e-4, abs=1e-6), (folder.name, key)
        part = "export/model" if expected[folder] else "adapter/adapter_model"
        first, second = (load_file(each / f"{part}.safetensors") for each in (folder, want))
        assert first.keys() == second.keys()
        for name in first:
            # As a whole: where a gradient is near 0, rounding decides what Adam makes of it.
            apart = (first[name] - second[name]).norm()
            assert apart <= 2e-5 + 1e-4 * second[name].norm(), (folder.name, name)


@pytest.mark.slow
def test_a_base_in_nf4_new_tokens_and_an_adapter_of_sft_become_reward_models(
    config, nf4_llama, tmp_path
):
    """Each of its own: the head is there, it is trained, and what was added is kept."""
    few = replace(
        config,
        model=ModelConfig(path=str(nf4_llama)),
        train=replace(config.train, steps=4, save_every=None),
    )
    nf4 = Lora(rank=4, quantize=Quantize.nf4)
    quantized = make(complete(replace(few, tuning=nf4)), tmp_path / "nf4", heldout=4)
    tensors = load_file(quantized / "adapter" / "adapter_model.safetensors")
    assert tensors["base_model.model.score.weight"].shape == (1, 64)
    merged = merge_checkpoint(quantized, tmp_path / "merged")
    found = load_file(merged / "model.safetensors")["score.weight"]
    assert torch.equal(found, tensors["base_model.model.score.weight"])

    sft = complete(replace(few, objective=Sft(), tuning=Lora(rank=4)))
    folder = tmp_path / "sft"
    folder.mkdir()
    prepare(sft, folder / "prepared")
    train(sft, folder)
    tokens = ModelConfig(path=str(nf4_llama))
    goes_on = replace(few, model=tokens, tuning=Lora(rank=4, init_from=str(folder / "adapter")))
    check_inputs(complete(goes_on))
    make(complete(goes_on), tmp_path / "on", heldout=4)

    grown = replace(few, model=replace(few.model, add_tokens=["<|better|>"]), tuning=Lora(rank=4))
    made = make(complete(grown), tmp_path / "grown", heldout=4)
    saved = json.loads((made / "adapter" / "adapter_config.json").read_text())
    assert saved["task_type"] == "SEQ_CLS" and saved["modules_to_save"] == ["score"]
    assert list(saved["trainable_token_indices"]) == ["model.embed_tokens"]


def test_a_language_model_is_no_reward_model_to_evaluate(config, tmp_path):
    """Its head would be a new one, whose numbers mean nothing."""
    from posttrain_dist.evaluation.heldout import evaluate

    with pytest.raises(ModelError, match="no head that scores answers") as caught:
        evaluate(complete(config), tmp_path)
    assert "the export of a run with objective=reward" in caught.value.fix
