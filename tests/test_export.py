"""What comes out of a run: a folder that plain transformers loads, whole and in the right dtype."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from posttrain_dist.checkpoint.hf_folder import RunFacts, write_hf_folder
from posttrain_dist.config import DataConfig, Dtype, ModelConfig, RunConfig, TrainConfig, complete
from posttrain_dist.engine import AdamW, DeepSpeed, Single
from posttrain_dist.errors import CheckpointError
from posttrain_dist.export import export_checkpoint
from posttrain_dist.files import read_rows
from posttrain_dist.metrics import LoggingConfig, WandbMode
from posttrain_dist.prepare import prepare
from posttrain_dist.train import train


@pytest.fixture(scope="module")
def base(tiny_llama, rows_file):
    return complete(
        RunConfig(
            model=ModelConfig(path=str(tiny_llama)),
            data=DataConfig(train=str(rows_file), max_length=64),
            optimizer=AdamW(lr=3e-3),
            train=TrainConfig(steps=2, batch_size=4, micro_batch_size=1),
            logging=LoggingConfig(wandb=WandbMode.off),
        )
    )


@pytest.fixture(scope="module")
def tied(base, tmp_path_factory, builders):
    """The same run with a model whose head is its embedding."""
    folder = builders.model(tmp_path_factory.mktemp("tied"), tie_word_embeddings=True)
    return replace(base, model=ModelConfig(path=str(folder)))


@pytest.fixture(scope="module")
def runs(base, tied, tmp_path_factory, run_workers):
    """Two ranks, bfloat16 and float32, and a tied model: name -> run folder."""
    root = tmp_path_factory.mktemp("export")
    made = {}
    for dtype in (Dtype.float32, Dtype.bfloat16):
        for stage, offload in ((0, False), (1, False), (2, False), (3, False), (3, True)):
            if offload and dtype is Dtype.float32:
                continue
            engine = DeepSpeed(stage=stage, offload=offload, persistence_threshold=0)
            config = replace(base, engine=engine, train=replace(base.train, dtype=dtype))
            folder = root / f"{dtype.name}-zero{stage}{'-offload' if offload else ''}"
            folder.mkdir()
            prepare(config, folder / "prepared")
            (folder / "config.yaml").write_text(config.to_yaml())
            made[folder.name] = folder
    made["tied"] = root / "tied"
    config = replace(tied, engine=DeepSpeed(stage=3, persistence_threshold=0))
    prepare(config, root / "tied" / "prepared")
    (root / "tied" / "config.yaml").write_text(config.to_yaml())
    run_workers("train_runs.py", 2, *made.values())
    return made


def last_row(folder):
    return read_rows(folder / "metrics.jsonl")[-1]


@pytest.mark.parametrize("name", ["float32-zero3", "tied"])
def test_export_of_zero3_gives_the_logits_that_the_trainer_evaluated(runs, name):
    """The last evaluation of the trainer, again by plain transformers on the export."""
    import transformers

    from posttrain_dist.data.prepared.arrays import Examples

    folder = runs[name]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "export")
    assert model.dtype == torch.float32
    examples = Examples.open(folder / "prepared", "eval")
    total = weight = 0.0
    for i in range(len(examples)):
        ids = torch.from_numpy(examples[i].input_ids_L.astype("int64"))
        nll = torch.nn.functional.cross_entropy(
            model(input_ids=ids[None]).logits[0, :-1], ids[1:], reduction="none"
        )
        mask = torch.from_numpy(examples[i].weight_L[1:].copy())
        total, weight = total + float((nll * mask).sum()), weight + float(mask.sum())
    assert last_row(folder)["eval/loss"] == pytest.approx(total / weight, rel=1e-6)


def test_a_tied_head_stays_tied_and_trains_as_in_one_process(runs, tied, tmp_path):
    from safetensors.torch import load_file

    prepare(tied, tmp_path / "prepared")
    train(tied, tmp_path)
    for key in ("train/loss", "eval/loss"):
        assert last_row(runs["tied"])[key] == pytest.approx(last_row(tmp_path)[key], rel=1e-6)
    weights = load_file(runs["tied"] / "export" / "model.safetensors")
    assert "lm_head.weight" not in weights and "model.embed_tokens.weight" in weights


def test_export_carries_tokenizer_template_and_end_token(runs, tiny_llama):
    import transformers

    export = runs["float32-zero3"] / "export"
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    original = transformers.AutoTokenizer.from_pretrained(tiny_llama)
    assert tokenizer.chat_template == original.chat_template
    assert tokenizer.get_vocab() == original.get_vocab()
    generation = transformers.GenerationConfig.from_pretrained(export)
    assert generation.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")


def test_every_engine_trains_bfloat16_like_single(runs, base, tmp_path):
    """The float32 master weights are there: two steps agree with plain torch's master weights."""
    config = replace(base, engine=Single(), train=replace(base.train, dtype=Dtype.bfloat16))
    prepare(config, tmp_path / "single" / "prepared")
    train(config, tmp_path / "single")
    expected = last_row(tmp_path / "single")["eval/loss"]
    start = read_rows(tmp_path / "single" / "metrics.jsonl")[0]
    moved = start["eval/loss"] - expected
    for name, folder in runs.items():
        if name.startswith("bfloat16"):
            assert abs(last_row(folder)["eval/loss"] - expected) < 0.1 * abs(moved), name


def test_checkpoints_of_every_stage_export_without_ranks(runs, tmp_path):
    from safetensors.torch import load_file

    for name, folder in runs.items():
        streamed = load_file(export_checkpoint(folder, tmp_path / name) / "model.safetensors")
        exported = load_file(folder / "export" / "model.safetensors")
        assert streamed.keys() == exported.keys(), name
        for key in exported:
            assert streamed[key].dtype == exported[key].dtype, (name, key)
            assert torch.equal(streamed[key], exported[key]), (name, key)


def test_a_large_export_is_cut_into_shards_that_load(tiny_llama, tmp_path):
    import transformers

    model = transformers.AutoModelForCausalLM.from_pretrained(tiny_llama)
    tensors = list(model.state_dict().items())
    out = write_hf_folder(
        iter(tensors), tiny_llama, tmp_path / "out", dtype=torch.float32,
        facts=RunFacts(end_token_ids=[7, 2]), shard_bytes=20_000,
    )  # fmt: skip
    assert len(list(out.glob("model-*-of-*.safetensors"))) > 2
    again = transformers.AutoModelForCausalLM.from_pretrained(out)
    assert all(torch.equal(again.state_dict()[name], tensor) for name, tensor in tensors)
    # The model's own end token stays behind those of the turns.
    assert transformers.GenerationConfig.from_pretrained(out).eos_token_id == [7, 2, 0]


def test_a_diverged_model_is_not_exported(tiny_llama, tmp_path):
    bad = [("w", torch.tensor([1.0, float("nan")]))]
    with pytest.raises(CheckpointError, match="w holds NaN"):
        write_hf_folder(bad, tiny_llama, tmp_path / "x", dtype=torch.float32, facts=RunFacts())
    assert not (tmp_path / "x").exists()
    zero = [("w", torch.zeros(3))]
    with pytest.raises(CheckpointError, match="every weight is zero"):
        write_hf_folder(zero, tiny_llama, tmp_path / "x", dtype=torch.float32, facts=RunFacts())


def test_a_run_without_checkpoint_says_so(tmp_path, base):
    with pytest.raises(CheckpointError, match="is no run folder"):
        export_checkpoint(tmp_path)
    (tmp_path / "config.yaml").write_text(base.to_yaml())
    with pytest.raises(CheckpointError, match="has no whole checkpoint"):
        export_checkpoint(tmp_path)
